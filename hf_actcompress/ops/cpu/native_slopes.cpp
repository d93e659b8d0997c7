// Inputs of GELU and SiLU to codes of the slope there, as bitmaps._slope_encode: the slopes agree to about 1e-7, which
// in rare cases is another code.

#include "native.h"

#include <cfloat>

namespace {

// a[0] * x**n + ... + a[n]
template <typename... More>
INLINE F polynomial(F x, F first, More... more) {
    ((first = fma(first, x, splat(more))), ...);
    return first;
}

// e**x, to 1e-7: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
INLINE F exponential(F x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 87.0f ? splat(87.0f) : x;
    const F n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;  // rounded
    const F r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    const F p = polynomial(r, splat(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                           1.6666665459e-1f, 5.0000001201e-1f);
    const F power = reinterpret_cast<F>((__builtin_convertvector(n, I) + 127) << 23);
    return (fma(p * r, r, r) + 1.0f) * power;
}

INLINE F absolute(F x) { return reinterpret_cast<F>(reinterpret_cast<I>(x) & 0x7FFFFFFF); }

enum Function { GELU, GELU_TANH, SILU };

template <int FUNCTION>
INLINE F slope(F x) {
    if (FUNCTION == GELU) {  // erf by Abramowitz and Stegun 7.1.26, which needs the same exponential
        const F e = exponential(-0.5f * x * x), t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * absolute(x));
        const F p = polynomial(t, splat(1.061405429f), -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f);
        const F half = 0.5f - 0.5f * (p * t * e);  // of erf(|x|)
        return (x < 0.0f ? 0.5f - half : 0.5f + half) + x * e * 0.39894228f;
    }
    if (FUNCTION == GELU_TANH) {
        const float k = 0.79788456f;
        const F u = k * (x + 0.044715f * x * x * x), t = 1.0f - 2.0f / (1.0f + exponential(2.0f * u));
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * k * (1.0f + 3 * 0.044715f * x * x);
    }
    const F s = 1.0f / (1.0f + exponential(-x));
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
        const U first = reinterpret_cast<U>(lanes()) + (start + static_cast<uint32_t>(g) * static_cast<uint32_t>(cols));
        I odd{};
        for (int c = 0; c < cols; c += LANES) {
            const F v = loads(values + c);
            odd |= ~(absolute(v) <= FLT_MAX);
            F y = (slope<FUNCTION>(v) - least) * scale;
            y = y > 0.0f ? y : F{};
            stores(own + c, rounded<TOP, true>(y, first + c, key));
        }
        strange |= any(odd);
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

}  // namespace

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
