// Levels of a Gaussian, single and of a trellis (gaussian.py, trellis.py): values to planes of codes and back.

#pragma once

#include "native.h"

namespace {

constexpr int MOST_BITS = 8, STATES = 8;

// -- tables in registers -----------------------------------------------------------------------------------------
// table[index], of N entries, a power of two; table has room for a register.
template <int N>
INLINE F looked_up(const float* table, I index) {
    if constexpr (N == 1) return splat(table[0]);
#if defined(__AVX512F__)
    else if constexpr (N <= LANES) return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), loads(table));
    else if constexpr (N > 128) return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__)
    else if constexpr (N <= LANES) return _mm256_permutevar8x32_ps(loads(table), reinterpret_cast<__m256i>(index));
    else if constexpr (N > 64) return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
    else if constexpr (N > 1) {
        F out;
        for (int j = 0; j < LANES; ++j) out[j] = table[index[j]];
        return out;
    }
#endif
    else {
        const F low = looked_up<N / 2>(table, index), high = looked_up<N / 2>(table + N / 2, index);
        return (index & (N / 2)) != 0 ? high : low;
    }
}

// Edges [2**DEPTH - 1] in the order in which a search meets them: those of step d lie from 2**d on.
struct Tree {
    float nodes[128 + 16];
    void plant(const float* edges, int depth) {
        for (int d = 0; d < depth; ++d)
            for (int i = 0; i < 1 << d; ++i) nodes[(1 << d) + i] = edges[(2 * i + 1) * (1 << (depth - 1 - d)) - 1];
    }
};

// How many edges are below x.
template <int DEPTH, int STEP = 0>
INLINE I searched(const Tree& tree, F x, I found = I{}) {
    if constexpr (STEP == DEPTH) return found;
    else {
        const F edge = looked_up<1 << STEP>(tree.nodes + (1 << STEP), found);
        return searched<DEPTH, STEP + 1>(tree, x, found + found - (x > edge));
    }
}

// -- planes ------------------------------------------------------------------------------------------------------
// The sign bits of the lanes.
INLINE int top_bits(I v) {
#if defined(__AVX512F__)
    return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(v), _mm512_setzero_si512());
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(v));
#else
    int all = 0;
    for (int j = 0; j < LANES; ++j) all |= (v[j] < 0) << j;
    return all;
#endif
}

// Bits of the lanes from column c on into a plane.
INLINE void put(uint8_t* plane, int c, int all) {
    if constexpr (LANES == 16) {
        const uint16_t two = static_cast<uint16_t>(all);
        std::memcpy(plane + c / 8, &two, 2);
    } else if constexpr (LANES == 8) {
        plane[c / 8] = static_cast<uint8_t>(all);
    } else {
        plane[c / 8] = static_cast<uint8_t>(c & 4 ? plane[c / 8] | all << 4 : all);
    }
}

// Lanes from column c on: bit `to` of each is its bit of the plane.
INLINE I got(const uint8_t* plane, int c, int to) {
    uint32_t word;
    if constexpr (LANES == 16) {
        uint16_t two;
        std::memcpy(&two, plane + c / 8, 2);
        word = two;
    } else {
        word = LANES == 8 ? plane[c / 8] : plane[c / 8] >> (c & 4);
    }
    const U bit = (U{} + word) >> reinterpret_cast<U>(lanes()) & 1u;
    return reinterpret_cast<I>(bit << to);
}

template <int BITS>
INLINE void put_code(uint8_t* out, int plane, int c, int lowest, I rest) {
    put(out, c, lowest);
    for (int p = 1; p < BITS; ++p) put(out + p * plane, c, top_bits(rest << (32 - p)));
}

// The upper planes: the code without its lowest bit.
template <int BITS>
INLINE I got_rest(const uint8_t* in, int plane, int c) {
    I rest{};
    for (int p = 1; p < BITS; ++p) rest |= got(in + p * plane, c, p - 1);
    return rest;
}

// -- single levels -----------------------------------------------------------------------------------------------
struct Levels {
    Tree trees[MOST_BITS + 1];
    float decoded[1024 + 16];  // likewise padded
    Tree subsets[MOST_BITS + 1][4];
    float own[1024 + 16];

    Levels(bool paths, const float* edges, const float* levels, const float* values) {
        const int size = paths ? 1024 : 256;
        std::memcpy(decoded, values, size * sizeof(float));
        std::memcpy(own, levels, size * sizeof(float));
        for (int b = 1; b <= MOST_BITS; ++b) {
            if (!paths) trees[b].plant(edges + (1 << (b - 1)), b - 1);
            else
                for (int s = 0; s < 4; ++s) subsets[b][s].plant(edges + (4 + s) * (1 << (b - 1)), b - 1);
        }
    }
};

template <int BITS>
void single_codes(const Levels& all, const float* w, int cols, uint8_t* out) {
    for (int c = 0; c < cols; c += LANES) {
        const F v = loads(w + c);
        put_code<BITS>(out, cols / 8, c, top_bits(v < 0.0f), searched<BITS - 1>(all.trees[BITS], absolute(v)));
    }
}

template <int BITS>
void single_values(const Levels& all, const uint8_t* in, int cols, float* out) {
    const float* levels = all.decoded + (1 << (BITS - 1));
    for (int c = 0; c < cols; c += LANES) {
        const F level = looked_up<1 << (BITS - 1)>(levels, got_rest<BITS>(in, cols / 8, c));
        stores(out + c, reinterpret_cast<F>(reinterpret_cast<I>(level) ^ got(in, c, 31)));
    }
}

// -- trellis -----------------------------------------------------------------------------------------------------
constexpr int subset(int state, int path) { return 2 * (path ^ (state & 1) ^ (state >> 2)) + (state >> 1 & 1); }

template <int STATE>
INLINE void advance(const F* cost, const F* error, F* found, I& choice) {
    constexpr int path = STATE & 1, before = STATE >> 1;
    const F one = cost[before] + error[subset(before, path)], other = cost[before | 4] + error[subset(before | 4, path)];
    const I better = other < one;
    found[STATE] = better ? other : one;
    choice |= better & 1 << STATE;
}

// Rows side by side: w [cols, LANES] -> codes [cols, LANES].
template <int BITS>
void path_codes(const Levels& all, const float* w, int cols, int32_t* codes) {
    constexpr int SIZE = 1 << (BITS - 1);
    int32_t back[LARGEST * LANES];
    F cost[STATES];
    for (int s = 0; s < STATES; ++s) cost[s] = splat(s ? 1e9f : 0.0f);
    for (int c = 0; c < cols; ++c) {
        const F x = loads(w + c * LANES);
        F error[4], found[STATES];
        I nearest{}, choice{};
        for (int s = 0; s < 4; ++s) {
            const I index = searched<BITS - 1>(all.subsets[BITS][s], x);
            const F off = x - looked_up<SIZE>(all.own + (4 + s) * SIZE, index);
            error[s] = off * off;
            nearest |= index << (8 * s);  // below 128
        }
        std::memcpy(codes + c * LANES, &nearest, sizeof(nearest));
        advance<0>(cost, error, found, choice), advance<1>(cost, error, found, choice);
        advance<2>(cost, error, found, choice), advance<3>(cost, error, found, choice);
        advance<4>(cost, error, found, choice), advance<5>(cost, error, found, choice);
        advance<6>(cost, error, found, choice), advance<7>(cost, error, found, choice);
        std::memcpy(back + c * LANES, &choice, sizeof(choice));
        for (int s = 0; s < STATES; ++s) cost[s] = found[s];
    }
    I state{};
    F least = cost[0];
    for (int s = 1; s < STATES; ++s) {
        const I better = cost[s] < least;
        state = better ? I{} + s : state;
        least = better ? cost[s] : least;
    }
    for (int c = cols - 1; c >= 0; --c) {
        I choice, nearest;
        std::memcpy(&choice, back + c * LANES, sizeof(choice));
        std::memcpy(&nearest, codes + c * LANES, sizeof(nearest));
        const I path = state & 1, before = state >> 1 | (choice >> state & 1) << 2;
        const I s = 2 * (path ^ (before & 1) ^ before >> 2) + (before >> 1 & 1);
        const I code = path | (nearest >> (8 * s) & 127) << 1;
        std::memcpy(codes + c * LANES, &code, sizeof(code));
        state = before;
    }
}

template <int BITS>
void path_planes(const int32_t* codes, int lane, int cols, uint8_t* out) {
    int32_t own[LARGEST];
    for (int c = 0; c < cols; ++c) own[c] = codes[c * LANES + lane];
    for (int c = 0; c < cols; c += LANES) {
        I code;
        std::memcpy(&code, own + c, sizeof(code));
        put_code<BITS>(out, cols / 8, c, top_bits(code << 31), code >> 1);
    }
}

template <int BITS>
void path_values(const Levels& all, const uint8_t* in, int cols, float* out) {
    constexpr int SIZE = 1 << (BITS - 1);
    int32_t paths[LARGEST + 3] = {};
    const auto at = [&](int c) {
        I path;
        std::memcpy(&path, paths + c, sizeof(path));
        return path;
    };
    for (int c = 0; c < cols; c += LANES) {
        const I path = got(in, c, 0);
        std::memcpy(paths + 3 + c, &path, sizeof(path));
    }
    for (int c = 0; c < cols; c += LANES) {
        const I s = 2 * (at(c + 3) ^ at(c + 2) ^ at(c)) + at(c + 1);
        stores(out + c, looked_up<4 * SIZE>(all.decoded + 4 * SIZE, s * SIZE + got_rest<BITS>(in, cols / 8, c)));
    }
}

}  // namespace
