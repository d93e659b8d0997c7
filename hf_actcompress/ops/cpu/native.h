// What the hand-written kernels share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// Not a hint: past a growth of the file the compiler stops to inline, and what it calls it does not vectorise.
#define INLINE inline __attribute__((always_inline))

namespace {

// As many floats as the processor has in a register: compilers keep lanes of longer vectors in memory, as they do in
// loops that they are to vectorise by themselves.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using F = float __attribute__((vector_size(4 * LANES)));
using I = int32_t __attribute__((vector_size(4 * LANES)));
using U = uint32_t __attribute__((vector_size(4 * LANES)));
using H = uint16_t __attribute__((vector_size(2 * LANES)));
using B = uint8_t __attribute__((vector_size(LANES)));

constexpr int UNIT = 16;       // full groups have a multiple of this many columns
constexpr int LARGEST = 1024;  // columns of a group

// Numbers of the dtypes that Python hands over, and what holds a value of each.
enum Kind { FP32, BF16, FP16 };
struct Half {
    uint16_t bits;
};
struct Byte {
    uint8_t value;
};

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

INLINE float load(const float* x) { return *x; }
INLINE float load(const uint16_t* x) { return as_float(static_cast<uint32_t>(*x) << 16); }  // bf16
INLINE float load(const Half* x) {
    const uint32_t sign = (x->bits & 0x8000u) << 16, rest = x->bits & 0x7FFFu;
    if (rest >= 0x7C00u) return as_float(sign | 0x7F800000u | rest << 13);  // Inf, NaN
    return as_float(sign | bits_of(as_float(rest << 13) * 0x1p112f));
}

// What some compilers need a dozen instructions for, or a hundred where a lane grows or shrinks to a quarter.
#ifdef __AVX512F__
INLINE I widened(B v) { return reinterpret_cast<I>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(v))); }
INLINE I widened(H v) { return reinterpret_cast<I>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v))); }
INLINE B bytes(I v) { return reinterpret_cast<B>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v))); }
INLINE H halves(I v) { return reinterpret_cast<H>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v))); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
#else
INLINE I widened(H v) { return __builtin_convertvector(v, I); }
INLINE I widened(B v) { return widened(__builtin_convertvector(v, H)); }
INLINE H halves(I v) { return __builtin_convertvector(v, H); }
INLINE B bytes(I v) { return __builtin_convertvector(halves(v), B); }
INLINE F fma(F a, F b, F c) {
    F d{};
    for (int j = 0; j < LANES; ++j) d[j] = std::fma(a[j], b[j], c[j]);
    return d;
}
#endif

INLINE F loads(const float* x) {
    F v;
    std::memcpy(&v, x, sizeof(v));
    return v;
}
INLINE F loads(const uint16_t* x) {  // bf16
    H v;
    std::memcpy(&v, x, sizeof(v));
    return reinterpret_cast<F>(widened(v) << 16);
}
INLINE F loads(const Half* x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
    F v;
    for (int j = 0; j < LANES; ++j) v[j] = load(x + j);
    return v;
#endif
}
INLINE I loads(const uint8_t* x) {
    B v;
    std::memcpy(&v, x, sizeof(v));
    return widened(v);
}

INLINE float load(const Byte* x) { return x->value; }
INLINE F loads(const Byte* x) { return __builtin_convertvector(loads(&x->value), F); }

INLINE void store(float* out, float value) { *out = value; }
INLINE void store(uint16_t* out, float value) {  // bf16, to the nearest, ties to even
    const uint32_t bits = bits_of(value);
    *out = static_cast<uint16_t>(value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
INLINE void store(uint8_t* out, float value) { *out = static_cast<uint8_t>(value); }
INLINE void store(Half* out, float value) {  // to the nearest, ties to even; not beyond the largest
    const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
    float size = std::fabs(value);
    if (size != size) {
        out->bits = static_cast<uint16_t>(sign | 0x7E00u);
        return;
    }
    size = size > 65504.0f ? 65504.0f : size;
    if (size < 0x1p-14f) {  // steps of 2**-24 below the smallest normal number
        out->bits = static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
    } else {
        const uint32_t bits = bits_of(size) - (112u << 23);
        out->bits = static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13);
    }
}

INLINE void stores(float* out, F v) { std::memcpy(out, &v, sizeof(v)); }
INLINE void stores(uint16_t* out, F v) {  // bf16, to the nearest, ties to even
    const U bits = reinterpret_cast<U>(v);
    const H own = halves(reinterpret_cast<I>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
    std::memcpy(out, &own, sizeof(own));
}
INLINE void stores(Half* out, F v) {  // to the nearest, ties to even; not beyond the largest
    v = v > 65504.0f ? 65504.0f + F{} : v;
    v = v < -65504.0f ? -65504.0f + F{} : v;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < LANES; ++j) store(out + j, v[j]);
#endif
}
INLINE void stores(uint8_t* out, I v) {
    const B own = bytes(v);
    std::memcpy(out, &own, sizeof(own));
}
INLINE void stores(uint8_t* out, F v) { stores(out, __builtin_convertvector(v, I)); }

// The largest bf16 value that is not above.
INLINE float floor16(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x < 0) bits += 0xFFFF;
    return as_float(static_cast<uint32_t>(bits >> 16) << 16);
}

INLINE F splat(float x) { return x - F{}; }  // not +: 0 + -0 is 0
INLINE F absolute(F x) { return reinterpret_cast<F>(reinterpret_cast<I>(x) & 0x7FFFFFFF); }
INLINE I lanes() {
    I v{};
    for (int j = 0; j < LANES; ++j) v[j] = j;
    return v;
}

INLINE U mix(U h) {
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
        int j = 0;
        for (; j + LANES <= run; j += LANES) {
            I byte{};
            for (int f = 0; f < FIELDS; ++f) byte |= (loads(codes + f * run + j) >> SHIFT & MASK) << (f * WIDTH);
            stores(out + j, byte);
        }
        for (; j < run; ++j) {
            int byte = 0;
            for (int f = 0; f < FIELDS; ++f) byte |= (codes[f * run + j] >> SHIFT & MASK) << (f * WIDTH);
            out[j] = static_cast<uint8_t>(byte);
        }
        pack<SHIFT, WIDTH>(codes, cols, out + run);
    } else if constexpr (WIDTH > 1) {
        pack<LEFT, WIDTH / 2>(codes, cols, out);
    }
}

// Units of steps to codes.
template <int TOP, bool NOISE>
INLINE I rounded(F y, U counter, uint32_t key) {
    y = y > 0.0f ? y : F{};  // below the range, and NaN
    if (NOISE)
        y = y + __builtin_convertvector(reinterpret_cast<I>(mix(counter ^ key) >> 8), F) * 0x1p-24f;
    else
        y = (y + 0x1p23f) - 0x1p23f;  // to the nearest: what has no room for a fraction
    const I code = __builtin_convertvector(y, I);
    return code > TOP ? TOP + I{} : code;
}

INLINE bool any(I v) {
    int64_t own[LANES / 2], joined = 0;
    std::memcpy(own, &v, sizeof(v));
    for (int j = 0; j < LANES / 2; ++j) joined |= own[j];
    return joined != 0;
}

// call(number of bits), 1 to 8
template <typename Call>
INLINE auto by_bits(int bits, Call call) {
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

}  // namespace
