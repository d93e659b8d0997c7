// Groups to codes in one pass over memory: what a compiler makes of kernels._group_encode reads the tensor twice.
// The arithmetic is that of the Python function, operation by operation, and gives the same bits.  Slopes of activation
// functions agree to about 1e-7, which in rare cases is another code.
// Compiled by native.py with -ffp-contract=off, because a fused multiply-add rounds once where two operations round twice.

#include "native.h"

#include <cfloat>
#include <cmath>

namespace {

INLINE float floor16(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x < 0) bits += 0xFFFF;
    return as_float(static_cast<uint32_t>(bits >> 16) << 16);
}

INLINE uint32_t mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ (h >> 16);
}

// The layout of packing.py: planes whose widths are powers of two, the widest first; byte j of a plane joins element j
// of every run.
template <int LEFT, int WIDTH = 8>
INLINE void pack(const uint8_t* codes, int cols, uint8_t* out) {
    if constexpr (LEFT >= WIDTH) {
        constexpr int FIELDS = 8 / WIDTH, SHIFT = LEFT - WIDTH, MASK = (1 << WIDTH) - 1;
        const int run = cols / FIELDS;
        for (int j = 0; j < run; ++j) {
            int byte = 0;
            for (int f = 0; f < FIELDS; ++f) byte |= (codes[f * run + j] >> SHIFT & MASK) << (f * WIDTH);
            out[j] = static_cast<uint8_t>(byte);
        }
        pack<SHIFT, WIDTH>(codes, cols, out + run);
    } else if constexpr (WIDTH > 1) {
        pack<LEFT, WIDTH / 2>(codes, cols, out);
    }
}

// Units of steps to a code; `y` is not negative.
template <int TOP, bool NOISE>
INLINE int rounded(float y, uint32_t counter, uint32_t key) {
    if (NOISE)
        y = y + static_cast<float>(static_cast<int32_t>(mix(counter ^ key) >> 8)) * 0x1p-24f;
    else
        y = std::nearbyintf(y);
    const int code = static_cast<int>(y);
    return code > TOP ? TOP : code;
}

// Groups [groups, cols] and what they share; mean, inverse, root: [period, cols] or null.
template <typename T>
struct Groups {
    const T* x;
    const float *mean, *inverse, *root;
    int64_t period, groups;
    int cols;
    uint32_t start, key;
    bool stored16;
};

struct Scale {
    float lo, step, unit;
};

template <int TOP>
INLINE Scale scale_of(float lo, float hi, bool stored16) {
    if (stored16) lo = floor16(lo);
    float step = hi * static_cast<float>(1.0 / TOP) - lo * static_cast<float>(1.0 / TOP);
    if (stored16) step = -floor16(-step);
    return {lo, step, step >= FLT_MIN ? 1.0f / step : 0.0f};
}

// Values of group `g` in y, and its minimum and step.
template <int TOP, typename T>
INLINE Scale prepare(const Groups<T>& all, int64_t g, float* y) {
    float low[LANES], high[LANES];
    int strange[LANES];
    for (int j = 0; j < LANES; ++j) low[j] = INFINITY, high[j] = -INFINITY, strange[j] = 0;
    const T* own = all.x + g * all.cols;
    const bool features = all.mean != nullptr;
    const int64_t at = features ? g % all.period * all.cols : 0;
    const float *m = all.mean + at, *s = all.inverse + at;
    for (int c = 0; c < all.cols; c += LANES)
        for (int j = 0; j < LANES; ++j) {
            float v = load(own + c + j);
            if (features) v = (v - m[c + j]) * s[c + j];
            y[c + j] = v;
            low[j] = v < low[j] ? v : low[j];
            high[j] = v > high[j] ? v : high[j];
            strange[j] |= v != v;
        }
    float lo = low[0], hi = high[0];
    int nan = strange[0];
    for (int j = 1; j < LANES; ++j) {
        lo = low[j] < lo ? low[j] : lo;
        hi = high[j] > hi ? high[j] : hi;
        nan |= strange[j];
    }
    return scale_of<TOP>(nan ? NAN : lo, nan ? NAN : hi, all.stored16);
}

template <typename T, int BITS, bool NOISE>
void encode(const Groups<T>& all, uint8_t* codes, float* scales) {
    constexpr int TOP = (1 << BITS) - 1;
    const int cols = all.cols;
    const uint32_t key = all.key;
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < all.groups; ++g) {
        float y[LARGEST];
        const Scale scale = prepare<TOP>(all, g, y);
        const float lo = scale.lo, unit = scale.unit;
        scales[2 * g] = lo;
        scales[2 * g + 1] = scale.step;
        uint8_t* out = codes + g * (cols * BITS / 8);
        const uint32_t first = all.start + static_cast<uint32_t>(g) * static_cast<uint32_t>(cols);
        if constexpr (8 % BITS == 0) {  // one plane: codes stay in registers
            constexpr int FIELDS = 8 / BITS;
            const int run = cols / FIELDS;
            const auto join = [=, &y](int j) {
                int byte = 0;
                for (int f = 0; f < FIELDS; ++f) {
                    const int c = f * run + j;
                    byte |= rounded<TOP, NOISE>((y[c] - lo) * unit, first + c, key) << (f * BITS);
                }
                out[j] = static_cast<uint8_t>(byte);
            };
            if constexpr (BITS == 1)
                each(run, join);
            else
                for (int j = 0; j < run; ++j) join(j);
        } else {
            uint8_t own[LARGEST];
            for (int c = 0; c < cols; ++c)
                own[c] = static_cast<uint8_t>(rounded<TOP, NOISE>((y[c] - lo) * unit, first + c, key));
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
        for (int c = 0; c < all.cols; ++c) {
            const int code = rounded<TOP, NOISE>((y[c] - scale.lo) * scale.unit, first + c, all.key);
            const float v = scale.lo + static_cast<float>(code) * scale.step;
            store(own + c, features ? v * r[c] + m[c] : v);
        }
    }
}

// Images with channels last, [pixels, channels], whose groups are runs of pixels of one channel: what would be decoded of
// them, in the same order.  Sixteen channels, hence groups, at a time: a cache line of floats.
template <typename T, int BITS, bool NOISE>
void planes(const T* __restrict x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key, bool stored16,
            T* __restrict out) {
    constexpr int TOP = (1 << BITS) - 1;
    const int64_t runs = pixels / cols;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t i = 0; i < images; ++i)
        for (int64_t r = 0; r < runs; ++r)
            for (int first = 0; first < channels; first += LANES) {
                const int64_t at = (i * pixels + r * cols) * channels + first;
                float lo[LANES], hi[LANES], step[LANES], unit[LANES];
                int strange[LANES];
                uint32_t counter[LANES];
#pragma omp simd
                for (int j = 0; j < LANES; ++j) lo[j] = INFINITY, hi[j] = -INFINITY, strange[j] = 0;
                for (int p = 0; p < cols; ++p)
#pragma omp simd
                    for (int j = 0; j < LANES; ++j) {
                        const float v = load(x + at + static_cast<int64_t>(p) * channels + j);
                        lo[j] = v < lo[j] ? v : lo[j];
                        hi[j] = v > hi[j] ? v : hi[j];
                        strange[j] |= v != v;
                    }
#pragma omp simd
                for (int j = 0; j < LANES; ++j) {
                    const Scale scale = scale_of<TOP>(strange[j] ? NAN : lo[j], strange[j] ? NAN : hi[j], stored16);
                    lo[j] = scale.lo, step[j] = scale.step, unit[j] = scale.unit;
                    counter[j] = static_cast<uint32_t>(((i * channels + first + j) * runs + r) * cols);
                }
                for (int p = 0; p < cols; ++p)
#pragma omp simd
                    for (int j = 0; j < LANES; ++j) {
                        const int64_t here = at + static_cast<int64_t>(p) * channels + j;
                        const int code = rounded<TOP, NOISE>((load(x + here) - lo[j]) * unit[j], counter[j] + p, key);
                        store(out + here, lo[j] + static_cast<float>(code) * step[j]);
                    }
            }
}

template <typename T, int BITS>
void planes_of(bool noise, const void* x, int64_t images, int64_t pixels, int channels, int cols, uint32_t key,
               bool stored16, void* out) {
    const auto run = noise ? planes<T, BITS, true> : planes<T, BITS, false>;
    run(static_cast<const T*>(x), images, pixels, channels, cols, key, stored16, static_cast<T*>(out));
}

// e**x, to 1e-7: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float n = std::nearbyintf(x * 1.44269504f);
    const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = std::fma(p, r, 1.3981999507e-3f);
    p = std::fma(p, r, 8.3334519073e-3f);
    p = std::fma(p, r, 4.1665795894e-2f);
    p = std::fma(p, r, 1.6666665459e-1f);
    p = std::fma(p, r, 5.0000001201e-1f);
    return (std::fma(p * r, r, r) + 1.0f) * as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

enum Function { GELU, GELU_TANH, SILU };

template <int FUNCTION>
INLINE float slope(float x) {
    if (FUNCTION == GELU) {  // erf by Abramowitz and Stegun 7.1.26, which needs the same exponential
        const float e = exponential(-0.5f * x * x), t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
        float p = 1.061405429f;
        p = std::fma(p, t, -1.453152027f);
        p = std::fma(p, t, 1.421413741f);
        p = std::fma(p, t, -0.284496736f);
        p = std::fma(p, t, 0.254829592f);
        const float erf = 1.0f - p * t * e;
        return 0.5f + 0.5f * std::copysign(erf, x) + x * e * 0.39894228f;
    }
    if (FUNCTION == GELU_TANH) {
        const float k = 0.79788456f, u = k * (x + 0.044715f * x * x * x), t = 1.0f - 2.0f / (1.0f + exponential(2 * u));
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * k * (1.0f + 3 * 0.044715f * x * x);
    }
    const float s = 1.0f / (1.0f + exponential(-x));
    return s * (1.0f + x * (1.0f - s));
}

template <typename T, int FUNCTION, int BITS>
int slopes(const T* x, int64_t rows, int cols, float least, float scale, uint32_t start, uint32_t key, uint8_t* codes) {
    constexpr int TOP = (1 << BITS) - 1;
    int strange = 0;
#pragma omp parallel for schedule(static) reduction(| : strange)
    for (int64_t g = 0; g < rows; ++g) {
        uint8_t own[LARGEST];
        const T* values = x + g * cols;
        const uint32_t first = start + static_cast<uint32_t>(g) * static_cast<uint32_t>(cols);
        int odd = 0;
        for (int c = 0; c < cols; ++c) {
            const float v = load(values + c);
            odd |= !(std::fabs(v) <= FLT_MAX);
            float y = (slope<FUNCTION>(v) - least) * scale;
            y = y > 0.0f ? y : 0.0f;
            own[c] = static_cast<uint8_t>(rounded<TOP, true>(y, first + c, key));
        }
        strange |= odd;
        pack<BITS>(own, cols, codes + g * (cols * BITS / 8));
    }
    return strange;
}

template <typename T, int FUNCTION>
int slopes_of(int bits, const void* x, int64_t rows, int cols, float least, float scale, uint32_t start, uint32_t key,
              uint8_t* codes) {
    const T* values = static_cast<const T*>(x);
    switch (bits) {
        case 1: return slopes<T, FUNCTION, 1>(values, rows, cols, least, scale, start, key, codes);
        case 2: return slopes<T, FUNCTION, 2>(values, rows, cols, least, scale, start, key, codes);
        case 3: return slopes<T, FUNCTION, 3>(values, rows, cols, least, scale, start, key, codes);
        case 4: return slopes<T, FUNCTION, 4>(values, rows, cols, least, scale, start, key, codes);
        case 5: return slopes<T, FUNCTION, 5>(values, rows, cols, least, scale, start, key, codes);
        case 6: return slopes<T, FUNCTION, 6>(values, rows, cols, least, scale, start, key, codes);
        default: return slopes<T, FUNCTION, 8>(values, rows, cols, least, scale, start, key, codes);
    }
}

// Codes and scales, or with `out` the roundtrip.
template <typename T, int BITS>
void run(const Groups<T>& all, bool noise, uint8_t* codes, float* scales, void* out) {
    T* values = static_cast<T*>(out);
    if (values)
        noise ? roundtrip<T, BITS, true>(all, values) : roundtrip<T, BITS, false>(all, values);
    else
        noise ? encode<T, BITS, true>(all, codes, scales) : encode<T, BITS, false>(all, codes, scales);
}

template <typename T>
void choose(int bits, const Groups<T>& all, bool noise, uint8_t* codes, float* scales, void* out) {
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
#pragma omp parallel for schedule(static) reduction(| : strange)
    for (int64_t g = 0; g < rows; ++g) {
        int byte[LANES], odd[LANES];
        for (int j = 0; j < LANES; ++j) byte[j] = odd[j] = 0;
        for (int f = 0; f < 8; ++f)
            for (int j = 0; j < LANES; ++j) {
                const float v = load(x + 128 * g + LANES * f + j);
                const int there = !(v == 0.0f);
                byte[j] |= there << f;
                odd[j] |= there & !(v == value);
            }
        for (int j = 0; j < LANES; ++j) {
            bits[LANES * g + j] = static_cast<uint8_t>(byte[j]);
            strange |= odd[j];
        }
    }
    return strange;
}

// Likewise: which of them lie above `low` (NaN does) and below `high`.
template <typename T>
void flags_of(const T* x, int64_t rows, float low, float high, bool both, uint8_t* bits) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < rows; ++g) {
        int byte[LANES];
        for (int j = 0; j < LANES; ++j) byte[j] = 0;
        for (int f = 0; f < 8; ++f)
            for (int j = 0; j < LANES; ++j) {
                const float v = load(x + 128 * g + LANES * f + j);
                const int there = both ? (v > low) & (v < high) : !(v <= low);
                byte[j] |= there << f;
            }
        for (int j = 0; j < LANES; ++j) bits[LANES * g + j] = static_cast<uint8_t>(byte[j]);
    }
}

}  // namespace

// x [groups, cols] fp32 or bf16; mean, inverse, root [period, cols] or null.  Writes codes [groups, cols * bits / 8] and
// scales [groups, 2], or, where it is given, what is decoded of them to out [groups, cols].
extern "C" void group_codes(const void* x, int bf16, int noise, int bits, const float* mean, const float* inverse,
                            const float* root, int64_t period, int64_t groups, int cols, uint32_t start, uint32_t key,
                            int stored16, uint8_t* codes, float* scales, void* out) {
    const bool keep16 = stored16 != 0;
    if (bf16)
        choose<uint16_t>(bits, {static_cast<const uint16_t*>(x), mean, inverse, root, period, groups, cols, start, key,
                                keep16}, noise, codes, scales, out);
    else
        choose<float>(bits, {static_cast<const float*>(x), mean, inverse, root, period, groups, cols, start, key,
                             keep16}, noise, codes, scales, out);
}

// x [images, pixels, channels] fp32 or bf16, whose groups are `cols` pixels of a channel: what is decoded, likewise.
extern "C" void planes_roundtrip(const void* x, int bf16, int noise, int bits, int64_t images, int64_t pixels,
                                 int channels, int cols, uint32_t key, int stored16, void* out) {
    using Run = void (*)(bool, const void*, int64_t, int64_t, int, int, uint32_t, bool, void*);
    constexpr Run of32[] = {planes_of<float, 1>, planes_of<float, 2>, planes_of<float, 3>, planes_of<float, 4>,
                            planes_of<float, 5>, planes_of<float, 6>, planes_of<float, 8>};
    constexpr Run of16[] = {planes_of<uint16_t, 1>, planes_of<uint16_t, 2>, planes_of<uint16_t, 3>,
                            planes_of<uint16_t, 4>, planes_of<uint16_t, 5>, planes_of<uint16_t, 6>,
                            planes_of<uint16_t, 8>};
    const int which = bits == 8 ? 6 : bits - 1;
    (bf16 ? of16 : of32)[which](noise != 0, x, images, pixels, channels, cols, key, stored16 != 0, out);
}

// Slopes of a function at x [rows, cols], from `least` in steps of 1 / scale.  Returns whether NaN or Inf was among x.
extern "C" int slope_encode(const void* x, int bf16, int function, int bits, int64_t rows, int cols, float least,
                            float scale, uint32_t start, uint32_t key, uint8_t* codes) {
    using Run = int (*)(int, const void*, int64_t, int, float, float, uint32_t, uint32_t, uint8_t*);
    const Run runs[2][3] = {
        {slopes_of<float, GELU>, slopes_of<float, GELU_TANH>, slopes_of<float, SILU>},
        {slopes_of<uint16_t, GELU>, slopes_of<uint16_t, GELU_TANH>, slopes_of<uint16_t, SILU>},
    };
    return runs[bf16][function](bits, x, rows, cols, least, scale, start, key, codes);
}

// Where x [rows, 128] is not 0; returns whether a value is neither 0 nor `value`.
extern "C" int two_flags(const void* x, int bf16, int64_t rows, float value, uint8_t* bits) {
    return bf16 ? two_flags_of(static_cast<const uint16_t*>(x), rows, value, bits)
                : two_flags_of(static_cast<const float*>(x), rows, value, bits);
}

// Where x [rows, 128] is above `low`, and with `both` below `high`.
extern "C" void flags(const void* x, int bf16, int64_t rows, float low, float high, int both, uint8_t* bits) {
    bf16 ? flags_of(static_cast<const uint16_t*>(x), rows, low, high, both != 0, bits)
         : flags_of(static_cast<const float*>(x), rows, low, high, both != 0, bits);
}
