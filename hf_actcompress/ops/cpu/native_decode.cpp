// What is read of payloads.  Codes to values, written where the caller wants them: what a compiler makes of the Python
// functions allocates its result itself, and a large one on small pages takes longer to touch than to compute
// (memory.py).  Same bits as kernels._group_decode, kernels._table_decode and bitmaps._unflag.

#include "native.h"

namespace {

// body(0), body(1), ...: by sixteen, as a compiler that counts bytes takes 64 at a time and leaves short rows to a
// loop without vectors.
template <typename Body>
INLINE void each(int n, Body body) {
    int j = 0;
    for (; j + UNIT <= n; j += UNIT)
#pragma omp simd simdlen(16)
        for (int i = 0; i < UNIT; ++i) body(j + i);
    for (; j < n; ++j) body(j);
}

// Inverse of `pack` in native.h: planes of codes, the widest first.  `first` says that nothing was written yet.
template <int LEFT, int WIDTH = 8>
INLINE void unpack(const uint8_t* in, int cols, uint8_t* codes, bool first = true) {
    if constexpr (LEFT >= WIDTH) {
        constexpr int FIELDS = 8 / WIDTH, SHIFT = LEFT - WIDTH, MASK = (1 << WIDTH) - 1;
        const int run = cols / FIELDS;
        for (int f = 0; f < FIELDS; ++f)
            each(run, [=](int j) {
                const uint8_t field = static_cast<uint8_t>((in[j] >> (f * WIDTH) & MASK) << SHIFT);
                codes[f * run + j] = first ? field : codes[f * run + j] | field;
            });
        unpack<SHIFT, WIDTH>(in + run, cols, codes, false);
    } else if constexpr (WIDTH > 1) {
        unpack<LEFT, WIDTH / 2>(in, cols, codes, first);
    }
}

// value(codes, first of their columns) for a row of codes, a register at a time.
template <int BITS, typename T, typename Value>
INLINE void rows(const uint8_t* __restrict in, int cols, T* __restrict out, Value value) {
    constexpr int FIELDS = 8 / BITS, MASK = (1 << BITS) - 1;
    if (8 % BITS == 0 && cols % (FIELDS * LANES) == 0) {  // one plane: codes stay in registers
        const int run = cols / FIELDS;
        for (int f = 0; f < FIELDS; ++f)
            for (int j = 0; j < run; j += LANES)
                stores(out + f * run + j, value(loads(in + j) >> (f * BITS) & MASK, f * run + j));
    } else {
        uint8_t codes[LARGEST];
        unpack<BITS>(in, cols, codes);
        for (int c = 0; c < cols; c += LANES) stores(out + c, value(loads(codes + c), c));
    }
}

// value(code) for every element of a row of codes.
template <int BITS, typename T, typename Value>
INLINE void row(const uint8_t* __restrict in, int cols, T* __restrict out, Value value) {
    if constexpr (8 % BITS == 0) {  // one plane: codes stay in registers
        constexpr int FIELDS = 8 / BITS, MASK = (1 << BITS) - 1;
        const int run = cols / FIELDS;
        for (int f = 0; f < FIELDS; ++f)
            each(run, [=](int j) { store(out + f * run + j, value(in[j] >> (f * BITS) & MASK)); });
    } else {
        uint8_t codes[LARGEST];
        unpack<BITS>(in, cols, codes);
        each(cols, [&](int c) { store(out + c, value(codes[c])); });
    }
}

struct Group {
    const uint8_t* codes;
    const void* scales;
    const float *mean, *root;
    int64_t period, groups;
    int cols;
};

template <typename T, typename S, int BITS>
void decode(const Group& all, T* out) {
    const S* scales = static_cast<const S*>(all.scales);
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < all.groups; ++g) {
        const float lo = load(scales + 2 * g), step = load(scales + 2 * g + 1);
        const uint8_t* in = all.codes + g * (all.cols * BITS / 8);
        T* own = out + g * all.cols;
        if (all.mean) {
            const int64_t at = g % all.period * all.cols;
            const float *m = all.mean + at, *r = all.root + at;
            rows<BITS>(in, all.cols, own, [=](I code, int c) {
                return (lo + __builtin_convertvector(code, F) * step) * loads(r + c) + loads(m + c);
            });
        } else {
            rows<BITS>(in, all.cols, own, [=](I code, int) { return lo + __builtin_convertvector(code, F) * step; });
        }
    }
}

// With few entries a gather takes longer than to drop half of them with every bit.
template <int BITS>
INLINE I looked_up(const int32_t* table, I code) {
    if constexpr (BITS == 0)
        return table[0] + I{};
    else {
        const I low = looked_up<BITS - 1>(table, code), high = looked_up<BITS - 1>(table + (1 << (BITS - 1)), code);
        return low ^ ((low ^ high) & -(code >> (BITS - 1) & 1));
    }
}

template <typename T, int BITS>
void table_of(const uint8_t* codes, int64_t groups, int cols, const float* table, T* out) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* in = codes + g * (cols * BITS / 8);
        if constexpr (BITS <= 3) {
            int32_t own[1 << BITS];
            std::memcpy(own, table, sizeof(own));
            rows<BITS>(in, cols, out + g * cols, [&own](I code, int) {
                return reinterpret_cast<F>(looked_up<BITS>(own, code));
            });
        } else {
            row<BITS>(in, cols, out + g * cols, [table](int code) { return table[code]; });
        }
    }
}

template <typename T, typename S>
void decode_any(int bits, const Group& all, void* out) {
    using Run = void (*)(const Group&, T*);
    constexpr Run runs[] = {decode<T, S, 1>, decode<T, S, 2>, decode<T, S, 3>, decode<T, S, 4>,
                            decode<T, S, 5>, decode<T, S, 6>, decode<T, S, 8>};
    runs[bits == 8 ? 6 : bits - 1](all, static_cast<T*>(out));
}

template <typename T>
void table_any(int bits, const uint8_t* codes, int64_t rows, int cols, const float* table, void* out) {
    using Run = void (*)(const uint8_t*, int64_t, int, const float*, T*);
    constexpr Run runs[] = {table_of<T, 1>, table_of<T, 2>, table_of<T, 3>, table_of<T, 4>,
                            table_of<T, 5>, table_of<T, 6>, table_of<T, 8>};
    runs[bits == 8 ? 6 : bits - 1](codes, rows, cols, table, static_cast<T*>(out));
}

template <typename S>
float reach_of(const S* scales, int64_t groups, float factor) {
    float most = 0.0f;
    int strange = 0;
#pragma omp simd reduction(max : most) reduction(| : strange)
    for (int64_t g = 0; g < groups; ++g) {
        const float v = std::fabs(load(scales + 2 * g)) + load(scales + 2 * g + 1) * factor;
        strange |= v != v;
        most = v > most ? v : most;
    }
    return strange ? NAN : most;
}

}  // namespace

// Most of |minimum| + step * factor over scales [groups, 2] in fp32 or bf16; NaN if one is.
extern "C" float reach(const void* scales, int scales16, int64_t groups, float factor) {
    return scales16 ? reach_of(static_cast<const uint16_t*>(scales), groups, factor)
                    : reach_of(static_cast<const float*>(scales), groups, factor);
}

// codes [groups, cols * bits / 8], scales [groups, 2] in fp32 or bf16, mean and root [period, cols] or null ->
// out [groups, cols] in fp32 or bf16.
extern "C" void group_values(const uint8_t* codes, int bits, const void* scales, int scales16, const float* mean,
                             const float* root, int64_t period, int64_t groups, int cols, int bf16, void* out) {
    const Group all{codes, scales, mean, root, period, groups, cols};
    if (bf16)
        (scales16 ? decode_any<uint16_t, uint16_t> : decode_any<uint16_t, float>)(bits, all, out);
    else
        (scales16 ? decode_any<float, uint16_t> : decode_any<float, float>)(bits, all, out);
}

// table [2**bits] fp32: out [rows, cols] = table[code], in bytes (kind 1), bf16 (2) or fp32 (4).
extern "C" void table_values(const uint8_t* codes, int bits, int64_t rows, int cols, const float* table, int kind,
                             void* out) {
    if (kind == 1)
        table_any<uint8_t>(bits, codes, rows, cols, table, out);
    else if (kind == 2)
        table_any<uint16_t>(bits, codes, rows, cols, table, out);
    else
        table_any<float>(bits, codes, rows, cols, table, out);
}
