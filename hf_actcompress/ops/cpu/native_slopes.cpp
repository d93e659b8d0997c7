// Inputs of GELU and SiLU to codes of the slope there, as in bitmaps.py: the slopes agree to about 1e-7, which
// in rare cases is another code.

#include "native.h"

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

constexpr int ROW = 128;

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

// Returns how many NaN are among x; they take code 0.
template <typename T, int FUNCTION, int BITS>
int64_t slopes(const T* x, int64_t n, float least, float scale, uint32_t key, uint8_t* codes) {
    constexpr int TOP = (1 << BITS) - 1;
    const int64_t count = (n + ROW - 1) / ROW;
    int64_t strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (int64_t g = 0; g < count; ++g) {
        uint8_t own[ROW];
        float filled[ROW];
        const int64_t left = n - g * ROW;
        const int cols = left >= ROW ? ROW : static_cast<int>((left + 7) / 8 * 8);
        if (left < ROW)
            for (int c = 0; c < ROW; ++c) filled[c] = load(x + g * ROW + (c < left ? c : left - 1));
        const U first = reinterpret_cast<U>(lanes()) + static_cast<uint32_t>(g) * static_cast<uint32_t>(ROW);
        I odd{};
        for (int c = 0; c < ROW; c += LANES) {
            F v = left < ROW ? loads(filled + c) : loads(x + g * ROW + c);
            odd -= v != v;
            v = v > 40.0f ? splat(40.0f) : v;  // where the slope has reached its limit
            v = v < -40.0f ? splat(-40.0f) : v;
            stores(own + c, rounded<TOP, true>((slope<FUNCTION>(v) - least) * scale, first + c, key));
        }
        for (int j = 0; j < LANES; ++j) strange += odd[j];
        pack<BITS>(own, cols, codes + g * (ROW * BITS / 8));
    }
    return strange;
}

template <typename T, int FUNCTION>
int64_t slopes_of(int bits, const T* x, int64_t n, float least, float scale, uint32_t key, uint8_t* codes) {
    return by_bits(bits, [&](auto width) {
        return slopes<T, FUNCTION, decltype(width)::value>(x, n, least, scale, key, codes);
    });
}

template <typename T>
int64_t slopes_any(int function, int bits, const void* x, int64_t n, float least, float scale, uint32_t key,
                   uint8_t* codes) {
    const auto run = function == GELU ? slopes_of<T, GELU> : function == GELU_TANH ? slopes_of<T, GELU_TANH>
                                                                                   : slopes_of<T, SILU>;
    return run(bits, static_cast<const T*>(x), n, least, scale, key, codes);
}

}  // namespace

// Slopes of a function at x [n], from `least` in steps of 1 / scale, in rows of 128.  Returns how many are NaN.
extern "C" int64_t slope_encode(const void* x, int kind, int function, int bits, int64_t n, float least, float scale,
                                uint32_t key, uint8_t* codes) {
    const auto run = kind == FP32 ? slopes_any<float> : kind == BF16 ? slopes_any<uint16_t> : slopes_any<Half>;
    return run(function, bits, x, n, least, scale, key, codes);
}
