// Groups to codes in one pass over memory, and flags.  The arithmetic is that of the definitions in Python (groups.py,
// bitmaps.py), operation by operation, and gives the same bits.  Compiled with -ffp-contract=off, because a fused
// multiply-add rounds once where two operations round twice.

#include "native.h"

#include <cfloat>

namespace {

// All lanes of `v` joined, by halves.
template <typename Join>
INLINE float joined(F v, Join join) {
    using F4 = float __attribute__((vector_size(16)));
    F4 own[LANES / 4];
    std::memcpy(own, &v, sizeof(v));
    for (int width = LANES / 8; width; width /= 2)
        for (int j = 0; j < width; ++j) own[j] = join(own[j], own[j + width]);
    return join(join(own[0][0], own[0][2]), join(own[0][1], own[0][3]));
}

// A tensor of n elements in groups of cols, the last of which may be shorter, and what they share.
// mean, inverse, root: [period, cols] or null.  given: minimum and step of all groups, or null.
template <typename T>
struct Groups {
    const T* x;
    const float *mean, *inverse, *root, *given;
    int64_t period, n;
    int cols;
    uint32_t key;

    int64_t count() const { return (n + cols - 1) / cols; }
    int64_t table(int64_t g) const { return g % period * cols; }
};

struct Scale {
    float lo, step, unit;
};

INLINE Scale finite(float lo, float step, float steps = 1.0f) {
    const bool good = std::fabs(lo) <= FLT_MAX && step * steps <= FLT_MAX;
    return {good ? lo : NAN, good ? step : NAN, good ? 1.0f / step : 0.0f};
}

template <int TOP>
INLINE Scale scale_of(float lo, float hi) {
    lo = floor16(std::fabs(lo) < FLT_MIN ? 0.0f : lo);
    const float step = -floor16(lo * static_cast<float>(1.0 / TOP) - hi * static_cast<float>(1.0 / TOP));
    return finite(lo, step < FLT_MIN ? FLT_MIN : step, TOP);
}

// Values of group `g` in y, and its minimum and step.  A short group is filled with its last value up to `width`.
template <int TOP, typename T>
INLINE Scale prepare(const Groups<T>& all, int64_t g, float* y, int width) {
    F low = splat(INFINITY), high = splat(-INFINITY);
    I strange{};
    const T* own = all.x + g * all.cols;
    const bool features = all.mean != nullptr;
    const int64_t at = features ? all.table(g) : 0, left = all.n - g * all.cols;
    const float *m = all.mean + at, *s = all.inverse + at;
    const auto look = [&](F v) {
        low = v < low ? v : low;
        high = v > high ? v : high;
        strange |= v != v;
    };
    if (left >= all.cols) {
        for (int c = 0; c < all.cols; c += LANES) {
            F v = loads(own + c);
            if (features) v = (v - loads(m + c)) * loads(s + c);
            stores(y + c, v);
            if (!all.given) look(v);
        }
    } else {
        for (int c = 0; c < width; ++c) {
            const int64_t here = c < left ? c : left - 1;
            y[c] = load(own + here);
            if (features) y[c] = (y[c] - m[here]) * s[here];
        }
        for (int c = 0; c < width; c += LANES) look(loads(y + c));
    }
    if (all.given) return finite(all.given[0], all.given[1]);
    const float lo = joined(low, [](auto a, auto b) { return b < a ? b : a; });
    const float hi = joined(high, [](auto a, auto b) { return b > a ? b : a; });
    const bool nan = any(strange);
    return scale_of<TOP>(nan ? NAN : lo, nan ? NAN : hi);
}

// Columns that the codes of group `g` are packed in, and up to which its values are computed.
template <typename T>
INLINE int packed_columns(const Groups<T>& all, int64_t g) {
    const int64_t left = all.n - g * all.cols;
    return left >= all.cols ? all.cols : static_cast<int>((left + 7) / 8 * 8);
}
INLINE int whole_registers(int columns) { return (columns + LANES - 1) / LANES * LANES; }

// Returns the number of groups with NaN, Inf or too wide a range.
template <typename T, int BITS, bool NOISE>
int64_t encode(const Groups<T>& all, uint8_t* codes, uint16_t* scales) {
    constexpr int TOP = (1 << BITS) - 1, FIELDS = 8 / BITS;
    const int64_t count = all.count();
    const uint32_t key = all.key;
    int64_t strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (int64_t g = 0; g < count; ++g) {
        float y[LARGEST];
        const int cols = packed_columns(all, g), width = whole_registers(cols);
        const Scale scale = prepare<TOP>(all, g, y, width);
        const float lo = scale.lo, unit = scale.unit;
        uint8_t* out = codes + g * (all.cols * BITS / 8);
        if (!all.given) {
            store(scales + 2 * g, lo);  // both are bf16 already
            store(scales + 2 * g + 1, scale.step);
        }
        if (lo != lo) {
            std::memset(out, 0, cols * BITS / 8);
            ++strange;
            continue;
        }
        const uint32_t first = static_cast<uint32_t>(g) * static_cast<uint32_t>(all.cols);
        const auto code = [&](int c) {
            return rounded<TOP, NOISE>((loads(y + c) - lo) * unit, reinterpret_cast<U>(lanes()) + (first + c), key);
        };
        if (8 % BITS == 0 && cols % (FIELDS * LANES) == 0) {  // one plane: codes stay in registers
            const int run = cols / FIELDS;
            for (int j = 0; j < run; j += LANES) {
                I byte{};
                for (int f = 0; f < FIELDS; ++f) byte |= code(f * run + j) << (f * BITS);
                stores(out + j, byte);
            }
        } else {
            uint8_t own[LARGEST];
            for (int c = 0; c < width; c += LANES) stores(own + c, code(c));
            pack<BITS>(own, cols, out);
        }
    }
    return strange;
}

// What would be decoded of the codes, without making them.
template <typename T, int BITS, bool NOISE>
int64_t roundtrip(const Groups<T>& all, T* out) {
    constexpr int TOP = (1 << BITS) - 1;
    const bool features = all.mean != nullptr;
    const int64_t count = all.count();
    int64_t strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (int64_t g = 0; g < count; ++g) {
        float y[LARGEST];
        const int width = whole_registers(packed_columns(all, g));
        const Scale scale = prepare<TOP>(all, g, y, width);
        strange += scale.lo != scale.lo;
        const uint32_t first = static_cast<uint32_t>(g) * static_cast<uint32_t>(all.cols);
        const int64_t at = features ? all.table(g) : 0, left = all.n - g * all.cols;
        const float *m = all.mean + at, *r = all.root + at;
        T* own = out + g * all.cols;
        const auto value = [&](int c) {
            const U counter = reinterpret_cast<U>(lanes()) + (first + c);
            const I code = rounded<TOP, NOISE>((loads(y + c) - scale.lo) * scale.unit, counter, all.key);
            return scale.lo + __builtin_convertvector(code, F) * scale.step;
        };
        if (left >= all.cols) {
            for (int c = 0; c < all.cols; c += LANES) {
                const F v = value(c);
                stores(own + c, features ? v * loads(r + c) + loads(m + c) : v);
            }
        } else {
            for (int c = 0; c < width; c += LANES) stores(y + c, value(c));
            for (int c = 0; c < left; ++c) store(own + c, features ? y[c] * r[c] + m[c] : y[c]);
        }
    }
    return strange;
}

// Images with channels last, [pixels, channels], whose groups are runs of pixels of one channel: what would be decoded of
// them, in the same order.  As many channels, hence groups, at a time as a register has lanes.
template <typename T, int BITS, bool NOISE>
int64_t planes(const T* __restrict x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key,
               T* __restrict out) {
    constexpr int TOP = (1 << BITS) - 1;
    const int64_t runs = pixels / cols;
    int64_t odd = 0;
#pragma omp parallel for schedule(static) collapse(2) reduction(+ : odd)
    for (int64_t i = 0; i < images; ++i)
        for (int64_t r = 0; r < runs; ++r)
            for (int first = 0; first < channels; first += LANES) {
                const int64_t at = (i * pixels + r * cols) * channels + first;
                F lo = splat(INFINITY), hi = splat(-INFINITY), step{}, unit{};
                I strange{};
                U counter{};
                for (int p = 0; p < cols; ++p) {
                    const F v = loads(x + at + static_cast<int64_t>(p) * channels);
                    lo = v < lo ? v : lo;
                    hi = v > hi ? v : hi;
                    strange |= v != v;
                }
                for (int j = 0; j < LANES; ++j) {
                    const Scale scale = scale_of<TOP>(strange[j] ? NAN : lo[j], strange[j] ? NAN : hi[j]);
                    odd += scale.lo != scale.lo;
                    lo[j] = scale.lo, step[j] = scale.step, unit[j] = scale.unit;
                    counter[j] = static_cast<uint32_t>(((i * channels + first + j) * runs + r) * cols);
                }
                for (int p = 0; p < cols; ++p) {
                    const int64_t here = at + static_cast<int64_t>(p) * channels;
                    const I code = rounded<TOP, NOISE>((loads(x + here) - lo) * unit, counter + p, key);
                    stores(out + here, lo + __builtin_convertvector(code, F) * step);
                }
            }
    return odd;
}

template <typename T, int BITS>
int64_t run(const Groups<T>& all, bool noise, uint8_t* codes, uint16_t* scales, T* out) {
    if (out) return noise ? roundtrip<T, BITS, true>(all, out) : roundtrip<T, BITS, false>(all, out);
    return noise ? encode<T, BITS, true>(all, codes, scales) : encode<T, BITS, false>(all, codes, scales);
}

template <typename T, int BITS>
int64_t run_planes(bool noise, const T* x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key,
                   T* out) {
    return (noise ? planes<T, BITS, true> : planes<T, BITS, false>)(x, images, pixels, channels, cols, key, out);
}

// call(type of the values, number of bits)
template <typename Call>
int64_t by_kind(int kind, int bits, Call call) {
    return by_bits(bits, [&](auto width) {
        if (kind == FP32) return call(float{}, width);
        return kind == BF16 ? call(uint16_t{}, width) : call(Half{}, width);
    });
}

// Bitmap of x [n] in rows of 128, the last one shorter: bit f of byte j of a row of 8 w is element f w + j.
template <typename T, typename Flag>
INLINE void bitmap(const T* x, int64_t n, uint8_t* bits, Flag flag) {
    const int64_t count = (n + 127) / 128;
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < count; ++g) {
        const int64_t left = n - 128 * g;
        if (left >= 128) {
            for (int j = 0; j < 16; j += LANES) {
                I byte{};
                for (int f = 0; f < 8; ++f) byte |= flag(loads(x + 128 * g + 16 * f + j)) & 1 << f;
                stores(bits + 16 * g + j, byte);
            }
        } else {
            const int64_t run = (left + 7) / 8;
            for (int64_t j = 0; j < run; ++j) {
                int byte = 0;
                for (int f = 0; f < 8; ++f) {
                    const int64_t i = f * run + j;  // filled with zeros
                    if (i < left && flag(splat(load(x + 128 * g + i)))[0]) byte |= 1 << f;
                }
                bits[16 * g + j] = static_cast<uint8_t>(byte);
            }
        }
    }
}
}  // namespace

// x [n] of a kind; mean, inverse, root [period, cols] or null; given [2] or null.  Writes codes and scales [groups, 2]
// (bf16), or, where it is given, what is decoded of them to out [n].  Returns how many groups are not finite.
extern "C" int64_t group_codes(const void* x, int kind, int noise, int bits, const float* mean, const float* inverse,
                               const float* root, const float* given, int64_t period, int64_t n, int cols,
                               uint32_t key, uint8_t* codes, uint16_t* scales, void* out) {
    return by_kind(kind, bits, [=](auto type, auto width) {
        using T = decltype(type);
        const Groups<T> all{static_cast<const T*>(x), mean, inverse, root, given, period, n, cols, key};
        return run<T, decltype(width)::value>(all, noise, codes, scales, static_cast<T*>(out));
    });
}

// x [images, pixels, channels], whose groups are `cols` pixels of a channel: what is decoded, likewise.
extern "C" int64_t planes_roundtrip(const void* x, int kind, int noise, int bits, int64_t images, int64_t pixels,
                                    int channels, int cols, uint32_t key, void* out) {
    return by_kind(kind, bits, [=](auto type, auto width) {
        using T = decltype(type);
        return run_planes<T, decltype(width)::value>(noise, static_cast<const T*>(x), images, pixels, channels, cols,
                                                     key, static_cast<T*>(out));
    });
}

// Least and largest of x [n], both NaN where NaN or Inf is among them: found [2].
extern "C" void extremes(const void* x, int kind, int64_t n, float* found) {
    by_kind(kind, 1, [=](auto type, auto) {
        using T = decltype(type);
        const T* own = static_cast<const T*>(x);
        float lo = INFINITY, hi = -INFINITY;
        int odd = 0;
        constexpr int64_t STEP = 1 << 14;
#pragma omp parallel for schedule(static) reduction(min : lo) reduction(max : hi) reduction(| : odd)
        for (int64_t first = 0; first < n; first += STEP) {
            F low = splat(INFINITY), high = splat(-INFINITY);
            I strange{};
            const int64_t stop = first + STEP < n ? first + STEP : n;
            const auto look = [&](F v) {
                low = v < low ? v : low;
                high = v > high ? v : high;
                strange |= v != v;
            };
            int64_t i = first;
            for (; i + LANES <= stop; i += LANES) look(loads(own + i));
            for (; i < stop; ++i) look(load(own + i) + F{});
            const float least = joined(low, [](auto a, auto b) { return b < a ? b : a; });
            const float most = joined(high, [](auto a, auto b) { return b > a ? b : a; });
            lo = least < lo ? least : lo;
            hi = most > hi ? most : hi;
            odd |= any(strange);
        }
        const bool bad = odd || !(std::fabs(lo) <= FLT_MAX) || !(std::fabs(hi) <= FLT_MAX);
        found[0] = bad ? NAN : lo;
        found[1] = bad ? NAN : hi;
        return int64_t{0};
    });
}

// Where x [n] of a kind, or (kind 3) of bytes, is above `low` (NaN is), and with `both` below `high`.
extern "C" void flags(const void* x, int kind, int64_t n, float low, float high, int both, uint8_t* bits) {
    const auto run = [=](const auto* own) {
        if (both) bitmap(own, n, bits, [=](F v) { return (v > low) & (v < high); });
        else bitmap(own, n, bits, [=](F v) { return ~(v <= low); });
    };
    if (kind == FP32) run(static_cast<const float*>(x));
    else if (kind == BF16) run(static_cast<const uint16_t*>(x));
    else if (kind == FP16) run(static_cast<const Half*>(x));
    else run(static_cast<const Byte*>(x));
}

// Where x [n] is not 0; returns whether a value is neither 0 nor `value`.
extern "C" int two_flags(const void* x, int kind, int64_t n, float value, uint8_t* bits) {
    const auto run = [=](const auto* own) {
        bitmap(own, n, bits, [](F v) { return ~(v == 0.0f); });
        int strange = 0;
#pragma omp parallel for schedule(static) reduction(| : strange)
        for (int64_t first = 0; first < n; first += 4096) {
            const int64_t stop = first + 4096 < n ? first + 4096 : n;
            I odd{};
            int64_t i = first;
            for (; i + LANES <= stop; i += LANES) {
                const F v = loads(own + i);
                odd |= ~(v == 0.0f) & ~(v == value);
            }
            for (; i < stop; ++i) odd[0] |= !(load(own + i) == 0.0f) & !(load(own + i) == value);
            strange |= any(odd);
        }
        return strange;
    };
    if (kind == FP32) return run(static_cast<const float*>(x));
    return kind == BF16 ? run(static_cast<const uint16_t*>(x)) : run(static_cast<const Half*>(x));
}
