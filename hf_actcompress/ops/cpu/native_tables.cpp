// Values by groups with sorted limits (tables.py): to packed codes, or to what is decoded of them.

#include "native.h"

#include <algorithm>
#include <type_traits>

namespace {

constexpr int ROW = 128;
constexpr int CHAIN = 16;  // groups up to which comparisons in registers take less time than a search

// Limits, minimum, step and its inverse of each group.
struct Groups {
    const float *edges, *low, *step, *inverse;
    int bits, splits;

    int count() const { return 1 << splits; }
    float top() const { return static_cast<float>((1 << (bits - splits)) - 1); }
};

INLINE F gathered(const float* table, I index) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
    F v{};
    for (int j = 0; j < LANES; ++j) v[j] = table[index[j]];
    return v;
#endif
}

// What was found of a register of values.
struct Found {
    I group;
    F low, step, inverse;
};

// STEPS: whether groups have steps, MANY: more groups than CHAIN.
template <bool STEPS, bool MANY>
INLINE Found find(const Groups& all, F v) {
    if constexpr (MANY) {
        I at{};
        for (int half = all.count() / 2; half; half /= 2)
            at += (v >= gathered(all.edges - 1, at + half)) & half;
        return {at, gathered(all.low, at), STEPS ? gathered(all.step, at) : F{}, STEPS ? gathered(all.inverse, at) : F{}};
    } else {
        Found found{{}, splat(all.low[0]), splat(all.step[0]), splat(all.inverse[0])};
        for (int i = 0; i + 1 < all.count(); ++i) {
            const I above = v >= all.edges[i];
            found.group -= above;
            found.low = above ? splat(all.low[i + 1]) : found.low;
            if constexpr (STEPS) {
                found.step = above ? splat(all.step[i + 1]) : found.step;
                found.inverse = above ? splat(all.inverse[i + 1]) : found.inverse;
            }
        }
        return found;
    }
}

INLINE F inner(F v, const Found& found, float top) {
    F y = (v - found.low) * found.inverse;
    y = y > 0.0f ? y : F{};  // below the range, and NaN
    y = y > top ? splat(top) : y;
    return (y + 0x1p23f) - 0x1p23f;  // to the nearest
}

using Pack = void (*)(const uint8_t*, int, uint8_t*);
template <int BITS>
void packed(const uint8_t* codes, int cols, uint8_t* out) {
    pack<BITS>(codes, cols, out);
}
constexpr Pack PACK[] = {packed<0>, packed<1>, packed<2>, packed<3>, packed<4>,
                         packed<5>, packed<6>, packed<7>, packed<8>};

template <typename T, bool STEPS, bool MANY>
void encode(const Groups& all, const T* x, int64_t n, uint8_t* codes) {
    const int64_t count = (n + ROW - 1) / ROW;
    const int low_bits = all.bits > 8 ? all.bits - 8 : 0, shift = all.bits - all.splits;
    const float top = all.top();
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < count; ++g) {
        const int64_t left = n - g * ROW;
        const int cols = left >= ROW ? ROW : static_cast<int>((left + 7) / 8 * 8);
        uint8_t high[ROW], low[ROW];
        T filled[ROW];
        const T* own = x + g * ROW;
        if (left < ROW) {  // filled with its last value
            for (int c = 0; c < ROW; ++c) filled[c] = own[std::min<int64_t>(c, left - 1)];
            own = filled;
        }
        for (int c = 0; c < cols; c += LANES) {
            const F v = loads(own + c);
            const Found found = find<STEPS, MANY>(all, v);
            I code = found.group;
            if constexpr (STEPS) code = (code << shift) + __builtin_convertvector(inner(v, found, top), I);
            stores(high + c, code >> low_bits);
            if (low_bits) stores(low + c, code & ((1 << low_bits) - 1));
        }
        uint8_t* out = codes + g * (ROW * all.bits / 8);
        PACK[all.bits - low_bits](high, cols, out);
        if (low_bits) PACK[low_bits](low, cols, out + cols);
    }
}

template <typename T, bool STEPS, bool MANY>
void roundtrip(const Groups& all, const T* x, int64_t n, T* out) {
    const int64_t count = (n + ROW - 1) / ROW;
    const float top = all.top();
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < count; ++g) {
        const int64_t left = n - g * ROW;
        T filled[ROW], made[ROW];
        const T* own = x + g * ROW;
        T* to = out + g * ROW;
        if (left < ROW) {
            for (int c = 0; c < ROW; ++c) filled[c] = own[std::min<int64_t>(c, left - 1)];
            own = filled, to = made;
        }
        for (int c = 0; c < ROW; c += LANES) {
            const F v = loads(own + c);
            const Found found = find<STEPS, MANY>(all, v);
            stores(to + c, STEPS ? found.low + inner(v, found, top) * found.step : found.low);
        }
        if (left < ROW) std::memcpy(static_cast<void*>(out + g * ROW), made, left * sizeof(T));
    }
}

template <typename T>
void run(const Groups& all, const T* x, int64_t n, uint8_t* codes, T* out) {
    const auto go = [&](auto steps, auto many) {
        constexpr bool STEPS = decltype(steps)::value, MANY = decltype(many)::value;
        if (out) roundtrip<T, STEPS, MANY>(all, x, n, out);
        else encode<T, STEPS, MANY>(all, x, n, codes);
    };
    const bool steps = all.bits > all.splits, many = all.count() > CHAIN;
    if (steps && many) go(std::true_type{}, std::true_type{});
    else if (steps) go(std::true_type{}, std::false_type{});
    else if (many) go(std::false_type{}, std::true_type{});
    else go(std::false_type{}, std::false_type{});
}
}  // namespace

// x [n] of a kind; edges [2**splits - 1], low, step and inverse [2**splits] -> packed codes, or out [n], of which one is
// null.
extern "C" void sorted_codes(const void* x, int kind, int64_t n, const float* edges, const float* low, const float* step,
                             const float* inverse, int bits, int splits, uint8_t* codes, void* out) {
    const bool nan = low[0] != low[0];  // then all are decoded to that
    const Groups all{edges, low, step, inverse, bits, nan ? 0 : splits};
    if (codes && nan) {
        std::memset(codes, 0, (n / ROW * ROW + (n % ROW + 7) / 8 * 8) * bits / 8);
        return;
    }
    if (kind == FP32) run(all, static_cast<const float*>(x), n, codes, static_cast<float*>(out));
    else if (kind == BF16) run(all, static_cast<const uint16_t*>(x), n, codes, static_cast<uint16_t*>(out));
    else run(all, static_cast<const Half*>(x), n, codes, static_cast<Half*>(out));
}
