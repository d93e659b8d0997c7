// Codes to values, written where the caller wants them: a large tensor on small pages takes longer to touch than to
// compute (memory.py).  Same bits as the definitions in Python (groups.py, tables.py, bitmaps.py).

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

// Codes of n elements in groups of cols, of which the last may be shorter; its codes fill up to a multiple of 8.
struct Group {
    const uint8_t* codes;
    const float *mean, *root;
    int64_t period, n;
    int cols;

    int64_t count() const { return (n + cols - 1) / cols; }
    int64_t left(int64_t g) const { return n - g * cols; }
};

// write(g, columns, where to) for every group, a short one by way of a buffer.
template <typename T, typename Write>
INLINE void each_group(const Group& all, T* out, Write write) {
    const int64_t count = all.count();
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < count; ++g) {
        const int64_t left = all.left(g);
        if (left >= all.cols) {
            write(g, all.cols, out + g * all.cols);
        } else {
            T own[LARGEST];
            write(g, static_cast<int>((left + 7) / 8 * 8), own);
            std::memcpy(out + g * all.cols, own, left * sizeof(T));
        }
    }
}

// scales: [groups, 2], or one pair for all.
template <typename T, typename S, int BITS>
void decode(const Group& all, const S* scales, bool shared, T* out) {
    each_group(all, out, [&](int64_t g, int cols, T* own) {
        const S* scale = scales + (shared ? 0 : 2 * g);
        const float lo = load(scale), step = load(scale + 1);
        const uint8_t* in = all.codes + g * (all.cols * BITS / 8);
        if (all.mean) {
            const int64_t at = g % all.period * all.cols, left = all.left(g);
            const float *m = all.mean + at, *r = all.root + at;
            float means[LARGEST], roots[LARGEST];
            if (left < all.cols) {  // the table may end here
                std::memcpy(means, m, left * sizeof(float)), std::memcpy(roots, r, left * sizeof(float));
                m = means, r = roots;
            }
            rows<BITS>(in, cols, own, [=](I code, int c) {
                return (lo + __builtin_convertvector(code, F) * step) * loads(r + c) + loads(m + c);
            });
        } else {
            rows<BITS>(in, cols, own, [=](I code, int) { return lo + __builtin_convertvector(code, F) * step; });
        }
    });
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
void table_of(const Group& all, const float* table, T* out) {
    each_group(all, out, [&](int64_t g, int cols, T* own) {
        const uint8_t* in = all.codes + g * (all.cols * BITS / 8);
        if constexpr (BITS <= 3) {
            int32_t entries[1 << BITS];
            std::memcpy(entries, table, sizeof(entries));
            rows<BITS>(in, cols, own, [&entries](I code, int) {
                return reinterpret_cast<F>(looked_up<BITS>(entries, code));
            });
        } else {
            row<BITS>(in, cols, own, [table](int code) { return table[code]; });
        }
    });
}

// The same for 9 to 16 bits: a plane of the upper 8, then the others.
template <typename T, int LOW>
void wide_table_of(const Group& all, const float* table, T* out) {
    each_group(all, out, [&](int64_t g, int cols, T* own) {
        const uint8_t* in = all.codes + g * (all.cols * (8 + LOW) / 8);
        uint8_t low[LARGEST];
        unpack<LOW>(in + cols, cols, low);
        each(cols, [&](int c) { store(own + c, table[in[c] << LOW | low[c]]); });
    });
}

}  // namespace

// codes, scales [groups, 2] or [2] (shared) in fp32 or bf16, mean and root [period, cols] or null -> out [n] of a kind.
extern "C" void group_values(const uint8_t* codes, int bits, const void* scales, int scales16, int shared,
                             const float* mean, const float* root, int64_t period, int64_t n, int cols, int kind,
                             void* out) {
    const Group all{codes, mean, root, period, n, cols};
    by_bits(bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto run = [&](auto* own) {
            using T = std::remove_pointer_t<decltype(own)>;
            if (scales16) decode<T, uint16_t, BITS>(all, static_cast<const uint16_t*>(scales), shared, own);
            else decode<T, float, BITS>(all, static_cast<const float*>(scales), shared, own);
        };
        if (kind == FP32) run(static_cast<float*>(out));
        else if (kind == BF16) run(static_cast<uint16_t*>(out));
        else run(static_cast<Half*>(out));
    });
}

// table [2**bits] fp32: out [n] = table[code], of a kind or (kind 3, up to 8 bits) in bytes.
extern "C" void table_values(const uint8_t* codes, int bits, int64_t n, int cols, const float* table, int kind,
                             void* out) {
    const Group all{codes, nullptr, nullptr, 1, n, cols};
    by_bits(bits > 8 ? bits - 8 : bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto run = [&](auto* own) {
            using T = std::remove_pointer_t<decltype(own)>;
            if (bits > 8) wide_table_of<T, BITS>(all, table, own);
            else table_of<T, BITS>(all, table, own);
        };
        if (kind == FP32) run(static_cast<float*>(out));
        else if (kind == BF16) run(static_cast<uint16_t*>(out));
        else if (kind == FP16) run(static_cast<Half*>(out));
        else table_of<uint8_t, BITS>(all, table, static_cast<uint8_t*>(out));
    });
}
