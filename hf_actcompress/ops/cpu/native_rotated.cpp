// Rotated groups to packed codes of the levels of a Gaussian and back.  Same bits as the definitions in Python
// (rotated.py, allocation.py, hadamard.py, gaussian.py, trellis.py).

#include "native_levels.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int WINDOW = 512;
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
    const Levels levels(all.paths, all.edges, all.levels, all.decoded);
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
    const Levels levels(all.paths, all.edges, all.levels, all.decoded);
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
