// The k largest magnitudes (selection.py) in two passes over memory.
//
// A sample tells in which narrow band of magnitudes the k-th largest lies.  The first pass counts what is above the band
// and collects what is inside, which is ranked; where the sample was wrong the band is everything.  The second pass
// writes.  The result is exact, whatever the sample said.

#include "native.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

constexpr int ROW = 128;
constexpr int64_t CHUNK = 1 << 14, SAMPLE = 1 << 16;
constexpr int32_t NAN_KEY = 0x7F800001;  // all NaN are one, above Inf

INLINE I keys(F v) {
    const I key = reinterpret_cast<I>(v) & 0x7FFFFFFF;
    return key > NAN_KEY ? NAN_KEY + I{} : key;
}
INLINE int32_t key(float v) {
    const int32_t own = static_cast<int32_t>(bits_of(v) & 0x7FFFFFFFu);
    return own > NAN_KEY ? NAN_KEY : own;
}

INLINE int64_t sum(I v) {
    int64_t all = 0;
    for (int j = 0; j < LANES; ++j) all += v[j];
    return all;
}

struct Chunk {
    int64_t above = 0, ties = 0;  // above the threshold, and equal to it
    int64_t first = 0, taken = 0;  // values kept before this chunk, and how many of its ties stay
    std::vector<int32_t> band;
};

// What stays: keys above `least`, and of those equal to it as many as the chunks say.
struct Cut {
    int32_t least;
    std::vector<Chunk> chunks;
};

int32_t ranked(std::vector<int32_t>& keys, int64_t rank) {  // rank 0 is the largest
    const auto at = keys.begin() + rank;
    std::nth_element(keys.begin(), at, keys.end(), std::greater<int32_t>());
    return *at;
}

// Whether the k-th largest is from lo to hi; then the cut.
template <typename T>
bool cut_in(const T* x, int64_t n, int64_t k, int32_t lo, int32_t hi, Cut& cut) {
    const int64_t count = (n + CHUNK - 1) / CHUNK;
    cut.chunks.assign(count, {});
    int64_t above = 0, inside = 0;
#pragma omp parallel for schedule(static) reduction(+ : above, inside)
    for (int64_t c = 0; c < count; ++c) {
        Chunk& own = cut.chunks[c];
        const int64_t stop = std::min(n, (c + 1) * CHUNK);
        int64_t i = c * CHUNK, bands = 0;
        I over{}, in{};
        for (; i + LANES <= stop; i += LANES) {
            const I v = keys(loads(x + i)), a = v > hi, b = (v >= lo) & ~a;
            over -= a, in -= b;
            if (lo != hi && any(b))
                for (int j = 0; j < LANES; ++j)
                    if (b[j]) own.band.push_back(v[j]);
        }
        own.above = sum(over), bands = sum(in);
        for (; i < stop; ++i) {
            const int32_t v = key(load(x + i));
            own.above += v > hi;
            if (v >= lo && v <= hi) {
                ++bands;
                if (lo != hi) own.band.push_back(v);
            }
        }
        own.ties = bands;
        above += own.above, inside += bands;
    }
    if (k <= above || k > above + inside) return false;
    cut.least = lo;
    if (lo != hi) {
        std::vector<int32_t> all;
        all.reserve(inside);
        for (const Chunk& own : cut.chunks) all.insert(all.end(), own.band.begin(), own.band.end());
        cut.least = ranked(all, k - above - 1);
        for (Chunk& own : cut.chunks) {
            own.ties = 0;
            for (int32_t v : own.band) own.above += v > cut.least, own.ties += v == cut.least;
        }
    }
    int64_t larger = 0, at = 0;
    for (const Chunk& own : cut.chunks) larger += own.above;
    for (Chunk& own : cut.chunks) {
        own.first = at;
        own.taken = std::min(own.ties, k - larger);
        larger += own.taken;
        at += own.above + own.taken;
    }
    return true;
}

template <typename T>
Cut find(const T* x, int64_t n, int64_t k) {
    Cut cut;
    if (n > 4 * SAMPLE) {
        std::vector<int32_t> sample;
        const int64_t stride = n / SAMPLE | 1;
        sample.reserve(n / stride + 1);
        for (int64_t i = 0; i < n; i += stride) sample.push_back(key(load(x + i)));
        const double m = static_cast<double>(sample.size()), share = static_cast<double>(k) / static_cast<double>(n);
        const double slack = 4 * std::sqrt(m * share * (1 - share)) + 2;  // four standard deviations of a rank
        const int64_t first = static_cast<int64_t>(m * share - slack), last = static_cast<int64_t>(m * share + slack);
        const int32_t hi = m * share > slack ? ranked(sample, first) : NAN_KEY;
        const int32_t lo = last < static_cast<int64_t>(sample.size()) ? ranked(sample, last) : 0;
        if (cut_in(x, n, k, lo, hi, cut)) return cut;
    }
    cut_in(x, n, k, 0, NAN_KEY, cut);
    return cut;
}

// Where what is kept of a row of `width` columns (8 bytes' bits or less) lies: its bitmap.  left: ties that still stay.
template <typename T>
INLINE void bits_of_row(const T* x, int cols, int32_t least, bool all, int64_t& left, uint8_t* bits) {
    const int run = (cols + 7) / 8;
    if (cols == ROW) {
        for (int j = 0; j < run; j += LANES) {
            I byte{};
            for (int f = 0; f < 8; ++f) {
                const I v = keys(loads(x + f * run + j));
                byte |= (all ? v >= least : v > least) & 1 << f;
            }
            stores(bits + j, byte);
        }
    } else {
        std::memset(bits, 0, run);
        for (int i = 0; i < cols; ++i) {
            const int32_t v = key(load(x + i));
            if (all ? v >= least : v > least) bits[i % run] |= static_cast<uint8_t>(1 << i / run);
        }
    }
    if (!all && left)
        for (int i = 0; i < cols && left; ++i)
            if (key(load(x + i)) == least) bits[i % run] |= static_cast<uint8_t>(1 << i / run), --left;
}

// call(element, its place among the set ones) for every set bit of a row of `run` bytes.
template <typename Call>
INLINE int each_bit(const uint8_t* bits, int run, Call call) {
    int at = 0;
    for (int first = 0; first < run; first += 8) {
        uint64_t word = 0;
        std::memcpy(&word, bits + first, std::min(8, run - first));
        for (; word; word &= word - 1) {
            const int place = __builtin_ctzll(word);
            call((place & 7) * run + (place >> 3) + first, at++);
        }
    }
    return at;
}

// form: 0 bitmap, 1 int32, 2 int64.
template <typename T>
void select(const T* x, int64_t n, int64_t k, T* values, void* where, int form) {
    const Cut cut = find(x, n, k);
    const int64_t count = static_cast<int64_t>(cut.chunks.size());
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; ++c) {
        const Chunk& own = cut.chunks[c];
        const int64_t stop = std::min(n, (c + 1) * CHUNK);
        const bool all = own.taken == own.ties;
        int64_t at = own.first, left = own.taken;
        for (int64_t first = c * CHUNK; first < stop; first += ROW) {
            const int cols = static_cast<int>(std::min<int64_t>(ROW, stop - first));
            if (form == 0) {
                uint8_t* bits = static_cast<uint8_t*>(where) + first / 8;
                bits_of_row(x + first, cols, cut.least, all, left, bits);
                at += each_bit(bits, (cols + 7) / 8, [&](int i, int j) { values[at + j] = x[first + i]; });
                continue;
            }
            for (int i = 0; i < cols; ++i) {
                if (i + LANES <= cols && !any(keys(loads(x + first + i)) >= cut.least)) {
                    i += LANES - 1;
                    continue;
                }
                const int32_t v = key(load(x + first + i));
                if (v < cut.least || (v == cut.least && !left--)) {
                    if (v == cut.least) left = 0;
                    continue;
                }
                values[at] = x[first + i];
                if (form == 1) static_cast<int32_t*>(where)[at] = static_cast<int32_t>(first + i);
                else static_cast<int64_t*>(where)[at] = first + i;
                ++at;
            }
        }
    }
}

INLINE void masked(const float* x, I mask, float* out) {
    stores(out, reinterpret_cast<F>(reinterpret_cast<I>(loads(x)) & mask));
}
template <typename T>
INLINE void masked(const T* x, I mask, T* out) {
    H own;
    std::memcpy(&own, x, sizeof(own));
    own &= halves(mask & 0xFFFF);
    std::memcpy(static_cast<void*>(out), &own, sizeof(own));
}

// Returns whether it could: with `any_order`, not where the order decides which of equal magnitudes stay.
template <typename T>
int keep(const T* x, int64_t n, int64_t k, bool any_order, T* out) {
    const Cut cut = find(x, n, k);
    const int64_t count = static_cast<int64_t>(cut.chunks.size());
    if (any_order)
        for (const Chunk& own : cut.chunks)
            if (own.taken != own.ties) return 0;
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; ++c) {
        const Chunk& own = cut.chunks[c];
        const int64_t stop = std::min(n, (c + 1) * CHUNK);
        const bool all = own.taken == own.ties;
        const int32_t least = all ? cut.least : cut.least + 1;
        int64_t i = c * CHUNK, left = own.taken;
        for (; i + LANES <= stop; i += LANES) masked(x + i, keys(loads(x + i)) >= least, out + i);
        for (; i < stop; ++i) out[i] = key(load(x + i)) >= least ? x[i] : T{};
        for (i = c * CHUNK; !all && left; ++i)
            if (key(load(x + i)) == cut.least) out[i] = x[i], --left;
    }
    return 1;
}

// Bits beyond the values have zeros.
template <typename T>
void place(const T* values, int64_t k, const uint8_t* bits, int64_t n, T* out) {
    const int64_t count = (n + CHUNK - 1) / CHUNK;
    std::vector<int64_t> before(count + 1, 0);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; ++c) {
        const int64_t first = c * CHUNK / 8, stop = std::min((n + 7) / 8, (c + 1) * CHUNK / 8);
        int64_t found = 0, i = first;
        for (; i + 8 <= stop; i += 8) {
            uint64_t word;
            std::memcpy(&word, bits + i, 8);
            found += __builtin_popcountll(word);
        }
        for (; i < stop; ++i) found += __builtin_popcount(bits[i]);
        before[c + 1] = found;
    }
    for (int64_t c = 0; c < count; ++c) before[c + 1] += before[c];
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; ++c) {
        const int64_t stop = std::min(n, (c + 1) * CHUNK);
        int64_t at = before[c];
        for (int64_t first = c * CHUNK; first < stop; first += ROW) {
            const int cols = static_cast<int>(std::min<int64_t>(ROW, stop - first));
            T own[ROW]{};
            at += each_bit(bits + first / 8, (cols + 7) / 8,
                           [&](int i, int j) { own[i] = at + j < k ? values[at + j] : T{}; });
            std::memcpy(static_cast<void*>(out + first), own, cols * sizeof(T));
        }
    }
}

template <typename Call>
void by_kind(int kind, const void* x, Call call) {
    if (kind == FP32) call(static_cast<const float*>(x));
    else if (kind == BF16) call(static_cast<const uint16_t*>(x));
    else call(static_cast<const Half*>(x));
}
}  // namespace

// x [n] of a kind -> values [k], and where they are: a bitmap (form 0), int32 (1) or int64 (2) indices.
extern "C" void select_largest(const void* x, int kind, int64_t n, int64_t k, void* values, void* where, int form) {
    by_kind(kind, x, [=](auto* own) {
        select(own, n, k, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(own)>>*>(values), where, form);
    });
}

// x [n] of a kind, the others zeros -> out [n], if that can be told (see `keep`).
extern "C" int keep_largest(const void* x, int kind, int64_t n, int64_t k, int any_order, void* out) {
    int done = 0;
    by_kind(kind, x, [&](auto* own) {
        done = keep(own, n, k, any_order, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(own)>>*>(out));
    });
    return done;
}

// values [k] of `size` bytes each, bitmap of n elements -> out [n].
extern "C" void place_values(const void* values, int64_t k, int size, const uint8_t* bits, int64_t n, void* out) {
    if (size == 2) place(static_cast<const uint16_t*>(values), k, bits, n, static_cast<uint16_t*>(out));
    else if (size == 4) place(static_cast<const uint32_t*>(values), k, bits, n, static_cast<uint32_t*>(out));
    else place(static_cast<const uint64_t*>(values), k, bits, n, static_cast<uint64_t*>(out));
}
