// Rotated groups to packed codes of the levels of a Gaussian and back.  Same bits as the definitions in Python
// (rotated.py, allocation.py, hadamard.py, gaussian.py, trellis.py).

#include "native.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int MOST_BITS = 8, WINDOW = 512, STATES = 8;
constexpr float BOUND = 0x1p126f;

// What all groups share.  mean, inverse, root: [period, cols] or null.  signs: [cols], over the root of cols.
// edges, levels, decoded: the tables of gaussian.py or trellis.py.  moves: pairs of thresholds.
struct Plan {
    const float *mean, *inverse, *root, *signs, *edges, *levels, *decoded, *moves;
    int64_t period, n;
    int cols, bits, steps, paths;

    int64_t count() const { return (n + cols - 1) / cols; }
    int64_t table(int64_t g) const { return g % period * cols; }
    int plane() const { return cols / 8; }
};

INLINE float bf16(float x) {
    uint16_t own;
    store(&own, x);
    return load(&own);
}

// Lanes whose number differs in bit `by`, exchanged.
template <int BY>
INLINE F exchanged(F v) {
    F out;
#if defined(__AVX512F__)
    if constexpr (BY == 8) out = _mm512_shuffle_f32x4(v, v, 0x4E);
    else if constexpr (BY == 4) out = _mm512_shuffle_f32x4(v, v, 0xB1);
    else out = _mm512_permute_ps(v, BY == 2 ? 0x4E : 0xB1);
#elif defined(__AVX2__)
    if constexpr (BY == 4) out = _mm256_permute2f128_ps(v, v, 1);
    else out = _mm256_permute_ps(v, BY == 2 ? 0x4E : 0xB1);
#else
    for (int j = 0; j < LANES; ++j) out[j] = v[j ^ BY];
#endif
    return out;
}

template <int BY>
INLINE F within(F v) {
    if constexpr (BY == 0) return v;
    else {
        const I flip = (lanes() & BY) != 0 ? I{} + INT32_MIN : I{};
        return within<BY / 2>(exchanged<BY>(v) + reinterpret_cast<F>(reinterpret_cast<I>(v) ^ flip));
    }
}

// The transform of y [cols], without signs, in place.
INLINE void butterflies(float* y, int cols) {
    for (int half = cols / 2; half >= LANES; half /= 2)
        for (int i = 0; i < cols; i += 2 * half)
            for (int j = i; j < i + half; j += LANES) {
                const F a = loads(y + j), b = loads(y + j + half);
                stores(y + j, a + b);
                stores(y + j + half, a - b);
            }
    for (int c = 0; c < cols; c += LANES) stores(y + c, within<LANES / 2>(loads(y + c)));
}

template <int BY>
INLINE float lanes_added(F v) {
    if constexpr (BY == 0) return v[0];
    else return lanes_added<BY / 2>(v + exchanged<BY>(v));
}

// The sum of value(c), a register at a time: the second half is added to the first one until one number is left.
template <typename Value>
INLINE float sum_of_halves(int cols, Value value) {
    float sums[LARGEST / 2];
    int half = cols / 2;
    if (half < LANES) return lanes_added<LANES / 2>(value(0));
    for (int j = 0; j < half; j += LANES) stores(sums + j, value(j) + value(j + half));
    for (half /= 2; half >= LANES; half /= 2)
        for (int j = 0; j < half; j += LANES) stores(sums + j, loads(sums + j) + loads(sums + j + half));
    return lanes_added<LANES / 2>(loads(sums));
}

// Values of group g; a short group is filled with its last value.
template <typename T>
INLINE void fetch(const Plan& all, const T* x, int64_t g, float* y) {
    const T* own = x + g * all.cols;
    const int64_t left = all.n - g * all.cols, at = all.mean ? all.table(g) : 0;
    const float *m = all.mean + at, *s = all.inverse + at;
    if (left >= all.cols) {
        if (all.mean)
            for (int c = 0; c < all.cols; c += LANES) stores(y + c, (loads(own + c) - loads(m + c)) * loads(s + c));
        else
            for (int c = 0; c < all.cols; c += LANES) stores(y + c, loads(own + c));
        return;
    }
    for (int c = 0; c < all.cols; ++c) {
        const int64_t here = c < left ? c : left - 1;
        y[c] = load(own + here);
        if (all.mean) y[c] = (y[c] - m[here]) * s[here];
    }
}

// Mean and deviation (bf16), and the inverse of the unit in which they were computed.
INLINE float measure(const float* y, int cols, uint16_t* scale) {
    F top{};
    for (int c = 0; c < cols; c += LANES) {
        const F v = absolute(loads(y + c));
        top = v > top ? v : top;
    }
    float most = 0;
    for (int j = 0; j < LANES; ++j) most = top[j] > most ? top[j] : most;
    float unit = as_float(bits_of(most) & 0x7F800000);
    unit = unit < 1 / BOUND ? 1 / BOUND : unit > BOUND ? BOUND : unit;
    const float inverse = 1 / unit, share = 1.0f / static_cast<float>(cols);
    const float sum = sum_of_halves(cols, [=](int c) { return loads(y + c) * inverse; });
    float center = bf16(sum * share * unit);
    const float middle = center * inverse;
    const float squares = sum_of_halves(cols, [=](int c) {
        const F z = loads(y + c) * inverse - middle;
        return z * z;
    });
    float spread = -floor16(-(std::sqrt(squares * share) * unit));
    if (!(std::fabs(center) <= FLT_MAX && spread <= FLT_MAX)) center = spread = NAN;
    store(scale, center);
    store(scale + 1, spread);
    return inverse;
}

// The rotated group over its deviation, in place.
INLINE void turn(const Plan& all, float* y, float inverse, const uint16_t* scale) {
    const float middle = load(scale) * inverse, width = load(scale + 1) * inverse, over = width > 0 ? 1 / width : 0;
    for (int c = 0; c < all.cols; c += LANES) stores(y + c, (loads(y + c) * inverse - middle) * loads(all.signs + c));
    butterflies(y, all.cols);
    for (int c = 0; c < all.cols; c += LANES) stores(y + c, loads(y + c) * over);
}

// -- bits of groups: allocation.py -------------------------------------------------------------------------------
struct Windows {
    int64_t groups, count, members, full;
    explicit Windows(int64_t g)
        : groups(g), count((g + WINDOW - 1) / WINDOW), members((g + count - 1) / count), full(g - (members - 1) * count) {}
    int64_t size(int64_t w) const { return w < full ? members : members - 1; }
    int64_t first(int64_t w) const { return w * (members - 1) + std::min(w, full); }
    int64_t group(int64_t w, int64_t run) const {
        uint32_t h = static_cast<uint32_t>(run + 1) * 0x9E3779B9u;
        h = (h ^ h >> 16) * 0x7FEB352Du;
        h = (h ^ h >> 15) * 0x846CA68Bu;
        const int64_t by = full < count && run == members - 1 ? 0 : h % count;
        return run * count + (w + by) % count;
    }
};

// Bits of each group, and how many planes lie before its own.
void allocate(const Plan& all, const uint16_t* scales, uint8_t* given, int64_t* before) {
    const Windows windows(all.count());
#pragma omp parallel for schedule(static)
    for (int64_t w = 0; w < windows.count; ++w) {
        const int size = static_cast<int>(windows.size(w));
        uint32_t keys[WINDOW];
        int change[WINDOW];
        for (int i = 0; i < size; ++i) {
            uint32_t key = scales[2 * windows.group(w, i) + 1] & 0x7FFFu;
            if (key >= 0x7F80u) key = 0;
            keys[i] = (0x7FFFu - key) << 16 | static_cast<uint32_t>(i);
        }
        std::sort(keys, keys + size);
        for (int i = 0; i < size; ++i) change[i] = 0;
        const auto value = [&](int rank) { return as_float((0x7FFFu - (keys[rank] >> 16)) << 16); };
        for (int r = 0; r < size / 2; ++r) {
            const int other = size - 1 - r;
            int by = 0;
            while (by < all.steps && value(r) * all.moves[2 * by] > value(other) * all.moves[2 * by + 1]) ++by;
            change[keys[r] & 0xFFFFu] = by, change[keys[other] & 0xFFFFu] = -by;
        }
        int64_t at = windows.first(w) * all.bits;
        for (int i = 0; i < size; ++i) {
            const int64_t g = windows.group(w, i);
            given[g] = static_cast<uint8_t>(all.bits + change[i]);
            before[g] = at;
            at += given[g];
        }
    }
}

// -- tables in registers -----------------------------------------------------------------------------------------
// table[index], of N entries, a power of two; table has room for a register.
template <int N>
INLINE F looked_up(const float* table, I index) {
    if constexpr (N == 1) return splat(table[0]);
#if defined(__AVX512F__)
    else if constexpr (N <= LANES) return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), loads(table));
    else if constexpr (N > 128) return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__)
    else if constexpr (N <= LANES) return _mm256_permutevar8x32_ps(loads(table), reinterpret_cast<__m256i>(index));
    else if constexpr (N > 64) return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
    else if constexpr (N > 1) {
        F out;
        for (int j = 0; j < LANES; ++j) out[j] = table[index[j]];
        return out;
    }
#endif
    else {
        const F low = looked_up<N / 2>(table, index), high = looked_up<N / 2>(table + N / 2, index);
        return (index & (N / 2)) != 0 ? high : low;
    }
}

// Edges [2**DEPTH - 1] in the order in which a search meets them: those of step d lie from 2**d on.
struct Tree {
    float nodes[128 + 16];
    void plant(const float* edges, int depth) {
        for (int d = 0; d < depth; ++d)
            for (int i = 0; i < 1 << d; ++i) nodes[(1 << d) + i] = edges[(2 * i + 1) * (1 << (depth - 1 - d)) - 1];
    }
};

// How many edges are below x.
template <int DEPTH, int STEP = 0>
INLINE I searched(const Tree& tree, F x, I found = I{}) {
    if constexpr (STEP == DEPTH) return found;
    else {
        const F edge = looked_up<1 << STEP>(tree.nodes + (1 << STEP), found);
        return searched<DEPTH, STEP + 1>(tree, x, found + found - (x > edge));
    }
}

// -- planes ------------------------------------------------------------------------------------------------------
// The sign bits of the lanes.
INLINE int top_bits(I v) {
#if defined(__AVX512F__)
    return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(v), _mm512_setzero_si512());
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(v));
#else
    int all = 0;
    for (int j = 0; j < LANES; ++j) all |= (v[j] < 0) << j;
    return all;
#endif
}

// Bits of the lanes from column c on into a plane.
INLINE void put(uint8_t* plane, int c, int all) {
    if constexpr (LANES == 16) {
        const uint16_t two = static_cast<uint16_t>(all);
        std::memcpy(plane + c / 8, &two, 2);
    } else if constexpr (LANES == 8) {
        plane[c / 8] = static_cast<uint8_t>(all);
    } else {
        plane[c / 8] = static_cast<uint8_t>(c & 4 ? plane[c / 8] | all << 4 : all);
    }
}

// Lanes from column c on: bit `to` of each is its bit of the plane.
INLINE I got(const uint8_t* plane, int c, int to) {
    uint32_t word;
    if constexpr (LANES == 16) {
        uint16_t two;
        std::memcpy(&two, plane + c / 8, 2);
        word = two;
    } else {
        word = LANES == 8 ? plane[c / 8] : plane[c / 8] >> (c & 4);
    }
    const U bit = (U{} + word) >> reinterpret_cast<U>(lanes()) & 1u;
    return reinterpret_cast<I>(bit << to);
}

template <int BITS>
INLINE void put_code(uint8_t* out, int plane, int c, int lowest, I rest) {
    put(out, c, lowest);
    for (int p = 1; p < BITS; ++p) put(out + p * plane, c, top_bits(rest << (32 - p)));
}

// The upper planes: the code without its lowest bit.
template <int BITS>
INLINE I got_rest(const uint8_t* in, int plane, int c) {
    I rest{};
    for (int p = 1; p < BITS; ++p) rest |= got(in + p * plane, c, p - 1);
    return rest;
}

// -- single levels -----------------------------------------------------------------------------------------------
struct Levels {
    Tree trees[MOST_BITS + 1];
    float decoded[1024 + 16];  // likewise padded
    Tree subsets[MOST_BITS + 1][4];
    float own[1024 + 16];

    explicit Levels(const Plan& all) {
        const int size = all.paths ? 1024 : 256;
        std::memcpy(decoded, all.decoded, size * sizeof(float));
        std::memcpy(own, all.levels, size * sizeof(float));
        for (int b = 1; b <= MOST_BITS; ++b) {
            if (!all.paths) trees[b].plant(all.edges + (1 << (b - 1)), b - 1);
            else
                for (int s = 0; s < 4; ++s) subsets[b][s].plant(all.edges + (4 + s) * (1 << (b - 1)), b - 1);
        }
    }
};

template <int BITS>
void single_codes(const Levels& all, const float* w, int cols, uint8_t* out) {
    for (int c = 0; c < cols; c += LANES) {
        const F v = loads(w + c);
        put_code<BITS>(out, cols / 8, c, top_bits(v < 0.0f), searched<BITS - 1>(all.trees[BITS], absolute(v)));
    }
}

template <int BITS>
void single_values(const Levels& all, const uint8_t* in, int cols, float* out) {
    const float* levels = all.decoded + (1 << (BITS - 1));
    for (int c = 0; c < cols; c += LANES) {
        const F level = looked_up<1 << (BITS - 1)>(levels, got_rest<BITS>(in, cols / 8, c));
        stores(out + c, reinterpret_cast<F>(reinterpret_cast<I>(level) ^ got(in, c, 31)));
    }
}

// -- trellis -----------------------------------------------------------------------------------------------------
constexpr int subset(int state, int path) { return 2 * (path ^ (state & 1) ^ (state >> 2)) + (state >> 1 & 1); }

template <int STATE>
INLINE void advance(const F* cost, const F* error, F* found, I& choice) {
    constexpr int path = STATE & 1, before = STATE >> 1;
    const F one = cost[before] + error[subset(before, path)], other = cost[before | 4] + error[subset(before | 4, path)];
    const I better = other < one;
    found[STATE] = better ? other : one;
    choice |= better & 1 << STATE;
}

// Rows side by side: w [cols, LANES] -> codes [cols, LANES].
template <int BITS>
void path_codes(const Levels& all, const float* w, int cols, int32_t* codes) {
    constexpr int SIZE = 1 << (BITS - 1);
    int32_t back[LARGEST * LANES];
    F cost[STATES];
    for (int s = 0; s < STATES; ++s) cost[s] = splat(s ? 1e9f : 0.0f);
    for (int c = 0; c < cols; ++c) {
        const F x = loads(w + c * LANES);
        F error[4], found[STATES];
        I nearest{}, choice{};
        for (int s = 0; s < 4; ++s) {
            const I index = searched<BITS - 1>(all.subsets[BITS][s], x);
            const F off = x - looked_up<SIZE>(all.own + (4 + s) * SIZE, index);
            error[s] = off * off;
            nearest |= index << (8 * s);  // below 128
        }
        std::memcpy(codes + c * LANES, &nearest, sizeof(nearest));
        advance<0>(cost, error, found, choice), advance<1>(cost, error, found, choice);
        advance<2>(cost, error, found, choice), advance<3>(cost, error, found, choice);
        advance<4>(cost, error, found, choice), advance<5>(cost, error, found, choice);
        advance<6>(cost, error, found, choice), advance<7>(cost, error, found, choice);
        std::memcpy(back + c * LANES, &choice, sizeof(choice));
        for (int s = 0; s < STATES; ++s) cost[s] = found[s];
    }
    I state{};
    F least = cost[0];
    for (int s = 1; s < STATES; ++s) {
        const I better = cost[s] < least;
        state = better ? I{} + s : state;
        least = better ? cost[s] : least;
    }
    for (int c = cols - 1; c >= 0; --c) {
        I choice, nearest;
        std::memcpy(&choice, back + c * LANES, sizeof(choice));
        std::memcpy(&nearest, codes + c * LANES, sizeof(nearest));
        const I path = state & 1, before = state >> 1 | (choice >> state & 1) << 2;
        const I s = 2 * (path ^ (before & 1) ^ before >> 2) + (before >> 1 & 1);
        const I code = path | (nearest >> (8 * s) & 127) << 1;
        std::memcpy(codes + c * LANES, &code, sizeof(code));
        state = before;
    }
}

template <int BITS>
void path_planes(const int32_t* codes, int lane, int cols, uint8_t* out) {
    int32_t own[LARGEST];
    for (int c = 0; c < cols; ++c) own[c] = codes[c * LANES + lane];
    for (int c = 0; c < cols; c += LANES) {
        I code;
        std::memcpy(&code, own + c, sizeof(code));
        put_code<BITS>(out, cols / 8, c, top_bits(code << 31), code >> 1);
    }
}

template <int BITS>
void path_values(const Levels& all, const uint8_t* in, int cols, float* out) {
    constexpr int SIZE = 1 << (BITS - 1);
    int32_t paths[LARGEST + 3] = {};
    const auto at = [&](int c) {
        I path;
        std::memcpy(&path, paths + c, sizeof(path));
        return path;
    };
    for (int c = 0; c < cols; c += LANES) {
        const I path = got(in, c, 0);
        std::memcpy(paths + 3 + c, &path, sizeof(path));
    }
    for (int c = 0; c < cols; c += LANES) {
        const I s = 2 * (at(c + 3) ^ at(c + 2) ^ at(c)) + at(c + 1);
        stores(out + c, looked_up<4 * SIZE>(all.decoded + 4 * SIZE, s * SIZE + got_rest<BITS>(in, cols / 8, c)));
    }
}

// call(number of bits), 1 to 8
template <typename Call>
INLINE void by_bits(int bits, Call call) {
    switch (bits) {
        case 1: return call(std::integral_constant<int, 1>{});
        case 2: return call(std::integral_constant<int, 2>{});
        case 3: return call(std::integral_constant<int, 3>{});
        case 4: return call(std::integral_constant<int, 4>{});
        case 5: return call(std::integral_constant<int, 5>{});
        case 6: return call(std::integral_constant<int, 6>{});
        case 7: return call(std::integral_constant<int, 7>{});
        default: return call(std::integral_constant<int, 8>{});
    }
}

// -- groups ------------------------------------------------------------------------------------------------------
// Codes of a group -> its values, with what equalized them undone.
template <typename T>
INLINE void give(const Plan& all, const Levels& levels, int64_t g, const uint16_t* scale, int bits, const uint8_t* in,
                 T* out) {
    float y[LARGEST] = {};
    const int cols = all.cols;
    if (bits)
        by_bits(bits, [&](auto width) {
            constexpr int BITS = decltype(width)::value;
            if (all.paths) path_values<BITS>(levels, in, cols, y);
            else single_values<BITS>(levels, in, cols, y);
        });
    butterflies(y, cols);
    const float center = load(scale), spread = load(scale + 1);
    const int64_t left = all.n - g * cols, at = all.mean ? all.table(g) : 0;
    const float *m = all.mean + at, *r = all.root + at;
    const auto value = [&](int c) { return loads(y + c) * loads(all.signs + c) * spread + center; };
    T* own = out + g * cols;
    const bool nan = center != center;
    if (left < cols || nan) {
        for (int c = 0; c < cols; c += LANES) stores(y + c, value(c));
        for (int64_t c = 0; c < (left < cols ? left : cols); ++c) store(own + c, nan ? NAN : all.mean ? y[c] * r[c] + m[c] : y[c]);
    } else if (all.mean) {
        for (int c = 0; c < cols; c += LANES) stores(own + c, value(c) * loads(r + c) + loads(m + c));
    } else {
        for (int c = 0; c < cols; c += LANES) stores(own + c, value(c));
    }
}

template <typename T>
int64_t encode(const Plan& all, const T* x, uint16_t* scales, uint8_t* codes, T* out) {
    const int64_t count = all.count();
    const int plane = all.plane();
    const Levels levels(all);
    std::vector<float> inverse(count);
    std::vector<uint8_t> given(count);
    std::vector<int64_t> before(count);
    int64_t strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (int64_t g = 0; g < count; ++g) {
        float y[LARGEST];
        fetch(all, x, g, y);
        inverse[g] = measure(y, all.cols, scales + 2 * g);
        strange += load(scales + 2 * g) != load(scales + 2 * g);
    }
    allocate(all, scales, given.data(), before.data());
    const auto turned = [&](int64_t g, float* y) {
        fetch(all, x, g, y);
        turn(all, y, inverse[g], scales + 2 * g);
    };
    const auto nan = [&](int64_t g) { return load(scales + 2 * g) != load(scales + 2 * g); };
    if (!all.paths) {
#pragma omp parallel for schedule(static)
        for (int64_t g = 0; g < count; ++g) {
            uint8_t own[LARGEST];
            uint8_t* target = out ? own : codes + before[g] * plane;
            if (nan(g)) {
                std::memset(target, 0, given[g] * plane);
            } else if (given[g]) {
                float y[LARGEST];
                turned(g, y);
                by_bits(given[g], [&](auto width) {
                    single_codes<decltype(width)::value>(levels, y, all.cols, target);
                });
            }
            if (out) give(all, levels, g, scales + 2 * g, given[g], target, out);
        }
        return strange;
    }
    const Windows windows(count);
#pragma omp parallel for schedule(static)
    for (int64_t w = 0; w < windows.count; ++w)
        for (int b = 0; b <= MOST_BITS; ++b) {
            int64_t waiting[LANES];
            int size = 0;
            const auto flush = [&](auto width) {
                constexpr int BITS = decltype(width)::value;
                float y[LARGEST], side[LARGEST * LANES];
                int32_t found[LARGEST * LANES];
                uint8_t own[LARGEST];
                for (int lane = 0; lane < LANES; ++lane) {
                    if (lane < size) turned(waiting[lane], y);
                    for (int c = 0; c < all.cols; ++c) side[c * LANES + lane] = y[c];
                }
                path_codes<BITS>(levels, side, all.cols, found);
                for (int lane = 0; lane < size; ++lane) {
                    const int64_t g = waiting[lane];
                    uint8_t* target = out ? own : codes + before[g] * plane;
                    if (nan(g)) std::memset(target, 0, BITS * plane);
                    else path_planes<BITS>(found, lane, all.cols, target);
                    if (out) give(all, levels, g, scales + 2 * g, BITS, target, out);
                }
                size = 0;
            };
            for (int i = 0; i < windows.size(w); ++i) {
                const int64_t g = windows.group(w, i);
                if (given[g] != b) continue;
                if (!b) {
                    if (out) give(all, levels, g, scales + 2 * g, 0, nullptr, out);
                    continue;
                }
                waiting[size++] = g;
                if (size == LANES) by_bits(b, flush);
            }
            if (size) by_bits(b, flush);
        }
    return strange;
}

template <typename Call>
INLINE int64_t by_kind(int kind, Call call) {
    if (kind == FP32) return call(float{});
    return kind == BF16 ? call(uint16_t{}) : call(Half{});
}

}  // namespace

// x [n] of a kind -> scales [groups, 2] (bf16) and codes, or what is decoded of them in out [n].  features: mean, inverse
// and root [period, cols], or null.  tables: edges, levels, decoded levels.  Returns how many groups are not finite.
extern "C" int64_t rotated_codes(const void* x, int kind, const float* mean, const float* inverse, const float* root,
                                 int64_t period, int64_t n, int cols, int bits, int steps, int paths,
                                 const float* signs, const float* edges, const float* levels, const float* decoded,
                                 const float* moves, uint16_t* scales, uint8_t* codes, void* out) {
    const Plan all{mean, inverse, root, signs, edges, levels, decoded, moves, period, n, cols, bits, steps, paths};
    return by_kind(kind, [&](auto type) {
        using T = decltype(type);
        return encode<T>(all, static_cast<const T*>(x), scales, codes, static_cast<T*>(out));
    });
}

// The inverse.
extern "C" void rotated_values(const uint8_t* codes, const uint16_t* scales, const float* mean, const float* root,
                               int64_t period, int64_t n, int cols, int bits, int steps, int paths, const float* signs,
                               const float* decoded, const float* moves, int kind, void* out) {
    const Plan all{mean, nullptr, root, signs, decoded, decoded, decoded, moves, period, n, cols, bits, steps, paths};
    const Levels levels(all);
    std::vector<uint8_t> given(all.count());
    std::vector<int64_t> before(all.count());
    allocate(all, scales, given.data(), before.data());
    by_kind(kind, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for schedule(static)
        for (int64_t g = 0; g < all.count(); ++g)
            give(all, levels, g, scales + 2 * g, given[g], codes + before[g] * all.plane(), static_cast<T*>(out));
        return int64_t{0};
    });
}
