// Groups to codes in one pass over memory: what a compiler makes of kernels._group_encode reads the tensor twice.
// The arithmetic is that of the Python function, operation by operation, and gives the same bits.
// Compiled by native.py with -ffp-contract=off, because a fused multiply-add rounds once where two operations round twice.

#include "native.h"

#include <cfloat>

namespace {

INLINE float floor16(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x < 0) bits += 0xFFFF;
    return as_float(static_cast<uint32_t>(bits >> 16) << 16);
}

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

// Groups [groups, cols] and what they share; mean, inverse, root: [period, cols] or null.
template <typename T>
struct Groups {
    const T* x;
    const float *mean, *inverse, *root;
    int64_t period, groups;
    int cols;
    uint32_t start, key;
};

struct Scale {
    float lo, step, unit;
};

template <int TOP>
INLINE Scale scale_of(float lo, float hi) {
    lo = floor16(std::fabs(lo) < FLT_MIN ? 0.0f : lo);
    float step = -floor16(lo * static_cast<float>(1.0 / TOP) - hi * static_cast<float>(1.0 / TOP));
    step = step < FLT_MIN ? FLT_MIN : step;  // NaN stays
    return {lo, step, 1.0f / step};
}

// Values of group `g` in y, and its minimum and step.
template <int TOP, typename T>
INLINE Scale prepare(const Groups<T>& all, int64_t g, float* y) {
    F low = splat(INFINITY), high = splat(-INFINITY);
    I strange{};
    const T* own = all.x + g * all.cols;
    const bool features = all.mean != nullptr;
    const int64_t at = features ? g % all.period * all.cols : 0;
    const float *m = all.mean + at, *s = all.inverse + at;
    for (int c = 0; c < all.cols; c += LANES) {
        F v = loads(own + c);
        if (features) v = (v - loads(m + c)) * loads(s + c);
        stores(y + c, v);
        low = v < low ? v : low;
        high = v > high ? v : high;
        strange |= v != v;
    }
    const float lo = joined(low, [](auto a, auto b) { return b < a ? b : a; });
    const float hi = joined(high, [](auto a, auto b) { return b > a ? b : a; });
    const bool nan = any(strange);
    return scale_of<TOP>(nan ? NAN : lo, nan ? NAN : hi);
}

template <typename T, int BITS, bool NOISE>
void encode(const Groups<T>& all, uint8_t* codes, uint16_t* scales) {
    constexpr int TOP = (1 << BITS) - 1;
    const int cols = all.cols;
    const uint32_t key = all.key;
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < all.groups; ++g) {
        float y[LARGEST];
        const Scale scale = prepare<TOP>(all, g, y);
        const float lo = scale.lo, unit = scale.unit;
        store(scales + 2 * g, lo);  // both are bf16 already
        store(scales + 2 * g + 1, scale.step);
        uint8_t* out = codes + g * (cols * BITS / 8);
        const uint32_t first = all.start + static_cast<uint32_t>(g) * static_cast<uint32_t>(cols);
        const auto code = [&](int c) {
            return rounded<TOP, NOISE>((loads(y + c) - lo) * unit, reinterpret_cast<U>(lanes()) + (first + c), key);
        };
        constexpr int FIELDS = 8 / BITS;
        if (8 % BITS == 0 && cols % (FIELDS * LANES) == 0) {  // one plane: codes stay in registers
            const int run = cols / FIELDS;
            for (int j = 0; j < run; j += LANES) {
                I byte{};
                for (int f = 0; f < FIELDS; ++f) byte |= code(f * run + j) << (f * BITS);
                stores(out + j, byte);
            }
        } else {
            uint8_t own[LARGEST];
            for (int c = 0; c < cols; c += LANES) stores(own + c, code(c));
            pack<BITS>(own, cols, out);
        }
    }
}

// What would be decoded of the codes, without making them.
template <typename T, int BITS, bool NOISE>
void roundtrip(const Groups<T>& all, T* out) {
    constexpr int TOP = (1 << BITS) - 1;
    const bool features = all.mean != nullptr;
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < all.groups; ++g) {
        float y[LARGEST];
        const Scale scale = prepare<TOP>(all, g, y);
        const uint32_t first = all.start + static_cast<uint32_t>(g) * static_cast<uint32_t>(all.cols);
        const int64_t at = features ? g % all.period * all.cols : 0;
        const float *m = all.mean + at, *r = all.root + at;
        T* own = out + g * all.cols;
        for (int c = 0; c < all.cols; c += LANES) {
            const U counter = reinterpret_cast<U>(lanes()) + (first + c);
            const I code = rounded<TOP, NOISE>((loads(y + c) - scale.lo) * scale.unit, counter, all.key);
            const F v = scale.lo + __builtin_convertvector(code, F) * scale.step;
            stores(own + c, features ? v * loads(r + c) + loads(m + c) : v);
        }
    }
}

// Images with channels last, [pixels, channels], whose groups are runs of pixels of one channel: what would be decoded of
// them, in the same order.  As many channels, hence groups, at a time as a register has lanes.
template <typename T, int BITS, bool NOISE>
void planes(const T* __restrict x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key,
            T* __restrict out) {
    constexpr int TOP = (1 << BITS) - 1;
    const int64_t runs = pixels / cols;
#pragma omp parallel for schedule(static) collapse(2)
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
                    lo[j] = scale.lo, step[j] = scale.step, unit[j] = scale.unit;
                    counter[j] = static_cast<uint32_t>(((i * channels + first + j) * runs + r) * cols);
                }
                for (int p = 0; p < cols; ++p) {
                    const int64_t here = at + static_cast<int64_t>(p) * channels;
                    const I code = rounded<TOP, NOISE>((loads(x + here) - lo) * unit, counter + p, key);
                    stores(out + here, lo + __builtin_convertvector(code, F) * step);
                }
            }
}

template <typename T, int BITS>
void planes_of(bool noise, const void* x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key,
               void* out) {
    const auto run = noise ? planes<T, BITS, true> : planes<T, BITS, false>;
    run(static_cast<const T*>(x), images, pixels, channels, cols, key, static_cast<T*>(out));
}

// Codes and scales, or with `out` the roundtrip.
template <typename T, int BITS>
void run(const Groups<T>& all, bool noise, uint8_t* codes, uint16_t* scales, void* out) {
    T* values = static_cast<T*>(out);
    if (values)
        noise ? roundtrip<T, BITS, true>(all, values) : roundtrip<T, BITS, false>(all, values);
    else
        noise ? encode<T, BITS, true>(all, codes, scales) : encode<T, BITS, false>(all, codes, scales);
}

template <typename T>
void choose(int bits, const Groups<T>& all, bool noise, uint8_t* codes, uint16_t* scales, void* out) {
    switch (bits) {
        case 1: return run<T, 1>(all, noise, codes, scales, out);
        case 2: return run<T, 2>(all, noise, codes, scales, out);
        case 3: return run<T, 3>(all, noise, codes, scales, out);
        case 4: return run<T, 4>(all, noise, codes, scales, out);
        case 5: return run<T, 5>(all, noise, codes, scales, out);
        case 6: return run<T, 6>(all, noise, codes, scales, out);
        default: return run<T, 8>(all, noise, codes, scales, out);
    }
}

// Bytes j of 16 join elements j, 16 + j, ...: which of them are not 0.  Returns whether one is neither 0 nor `value`.
template <typename T>
int two_flags_of(const T* x, int64_t rows, float value, uint8_t* bits) {
    int strange = 0;
#pragma omp parallel reduction(| : strange)
    {
        I odd{};
#pragma omp for schedule(static)
        for (int64_t g = 0; g < rows; ++g)
            for (int j = 0; j < 16; j += LANES) {
                I byte{};
                for (int f = 0; f < 8; ++f) {
                    const F v = loads(x + 128 * g + 16 * f + j);
                    const I there = ~(v == 0.0f);
                    byte |= there & 1 << f;
                    odd |= there & ~(v == value);
                }
                stores(bits + 16 * g + j, byte);
            }
        strange |= any(odd);
    }
    return strange;
}

// Likewise: which of them lie above `low` (NaN does) and below `high`.
template <bool BOTH, typename T>
void flags_of(const T* x, int64_t rows, float low, float high, uint8_t* bits) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < rows; ++g)
        for (int j = 0; j < 16; j += LANES) {
            I byte{};
            for (int f = 0; f < 8; ++f) {
                const F v = loads(x + 128 * g + 16 * f + j);
                byte |= (BOTH ? (v > low) & (v < high) : ~(v <= low)) & 1 << f;
            }
            stores(bits + 16 * g + j, byte);
        }
}

}  // namespace

// x [groups, cols] fp32 or bf16; mean, inverse, root [period, cols] or null.  Writes codes [groups, cols * bits / 8] and
// scales [groups, 2] (bf16), or, where it is given, what is decoded of them to out [groups, cols].
extern "C" void group_codes(const void* x, int bf16, int noise, int bits, const float* mean, const float* inverse,
                            const float* root, int64_t period, int64_t groups, int cols, uint32_t start, uint32_t key,
                            uint8_t* codes, uint16_t* scales, void* out) {
    if (bf16)
        choose<uint16_t>(bits, {static_cast<const uint16_t*>(x), mean, inverse, root, period, groups, cols, start, key},
                         noise, codes, scales, out);
    else
        choose<float>(bits, {static_cast<const float*>(x), mean, inverse, root, period, groups, cols, start, key},
                      noise, codes, scales, out);
}

// x [images, pixels, channels] fp32 or bf16, whose groups are `cols` pixels of a channel: what is decoded, likewise.
extern "C" void planes_roundtrip(const void* x, int bf16, int noise, int bits, int64_t images, int64_t pixels,
                                 int channels, int cols, uint32_t key, void* out) {
    using Run = void (*)(bool, const void*, int64_t, int64_t, int, int, uint32_t, void*);
    constexpr Run of32[] = {planes_of<float, 1>, planes_of<float, 2>, planes_of<float, 3>, planes_of<float, 4>,
                            planes_of<float, 5>, planes_of<float, 6>, planes_of<float, 8>};
    constexpr Run of16[] = {planes_of<uint16_t, 1>, planes_of<uint16_t, 2>, planes_of<uint16_t, 3>,
                            planes_of<uint16_t, 4>, planes_of<uint16_t, 5>, planes_of<uint16_t, 6>,
                            planes_of<uint16_t, 8>};
    const int which = bits == 8 ? 6 : bits - 1;
    (bf16 ? of16 : of32)[which](noise != 0, x, images, pixels, channels, cols, key, out);
}

// Where x [rows, 128] is not 0; returns whether a value is neither 0 nor `value`.
extern "C" int two_flags(const void* x, int bf16, int64_t rows, float value, uint8_t* bits) {
    return bf16 ? two_flags_of(static_cast<const uint16_t*>(x), rows, value, bits)
                : two_flags_of(static_cast<const float*>(x), rows, value, bits);
}

// Where x [rows, 128] is above `low`, and with `both` below `high`.
extern "C" void flags(const void* x, int bf16, int64_t rows, float low, float high, int both, uint8_t* bits) {
    const float* wide = static_cast<const float*>(x);
    const uint16_t* narrow = static_cast<const uint16_t*>(x);
    if (bf16)
        both ? flags_of<true>(narrow, rows, low, high, bits) : flags_of<false>(narrow, rows, low, high, bits);
    else
        both ? flags_of<true>(wide, rows, low, high, bits) : flags_of<false>(wide, rows, low, high, bits);
}
