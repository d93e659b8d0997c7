// What the hand-written kernels share.

#pragma once

#include <cstdint>
#include <cstring>

// Not a hint: past a growth of the file the compiler stops to inline, and what it calls it does not vectorise.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
constexpr int LARGEST = 1024;  // columns of a group

// body(0), body(1), ...: by sixteen, as a compiler that counts bytes takes 64 at a time and leaves short rows to a
// loop without vectors.
template <typename Body>
INLINE void each(int n, Body body) {
    int j = 0;
    for (; j + LANES <= n; j += LANES)
#pragma omp simd simdlen(16)
        for (int i = 0; i < LANES; ++i) body(j + i);
    for (; j < n; ++j) body(j);
}

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE float load(const float* x) { return *x; }
INLINE float load(const uint16_t* x) { return as_float(static_cast<uint32_t>(*x) << 16); }  // bf16

INLINE void store(float* out, float value) { *out = value; }
INLINE void store(uint16_t* out, float value) {  // bf16, to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *out = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
INLINE void store(uint8_t* out, float value) { *out = static_cast<uint8_t>(value); }

}  // namespace
