// The building block of every matrix product here: a tile of rows times a panel of TILE_N columns.
//
// Both operands are read in words of 32 bits, which hold neighbours along K: one fp32, two bf16, or several bytes. A is
// read in place, row by row. B is packed in panels: word k of TILE_N neighbouring columns is contiguous. A vector unit
// broadcasts a word of A against NV vectors of B; AMX takes 16 x 16 words of either as a tile, from the same panels.
// Sums are fp32, for bytes int32.
#pragma once

#include "vec_math.h"

#if defined(FASTBERT_AMX)
#include "amx.h"
#endif

namespace fastbert::FASTBERT_ISA {

// The tile has as many accumulators as the registers hold in addition to NV vectors of B and a broadcast of A.
#if defined(__AVX512F__)
constexpr int VECTOR_ROWS = 12, NV = 2;
#elif defined(__AVX2__)
constexpr int VECTOR_ROWS = 6, NV = 2;
#else
constexpr int VECTOR_ROWS = 4, NV = 2;
#endif
constexpr int TILE_N = NV * WIDTH;

static inline int64_t panels(int64_t columns) { return (columns + TILE_N - 1) / TILE_N; }

// Bytes for numbers in [-127, 127]. With VNNI a word is four of them; BYTE_OFFSET is added to those of A, since the
// first operand of vpdpbusd is unsigned. Elsewhere a word is two, widened to 16 bits for a multiply-add of pairs.
struct Bytes {};
#if defined(__AVX512VNNI__)
constexpr int BYTES_PER_WORD = 4, BYTE_OFFSET = 128;
#else
constexpr int BYTES_PER_WORD = 2, BYTE_OFFSET = 0;
#endif

template <typename T>
constexpr int PER_WORD = sizeof(uint32_t) / sizeof(T);
template <>
constexpr int PER_WORD<Bytes> = BYTES_PER_WORD;

template <typename T>
struct Sums {
    using type = Vec;
};
template <>
struct Sums<Bytes> {
    using type = Ints;
};
template <typename T>
using Sum = typename Sums<T>::type;

#if defined(FASTBERT_AMX)
template <typename T>
constexpr bool USES_AMX = PER_WORD<T> > 1;  // all but fp32
#else
template <typename T>
constexpr bool USES_AMX = false;
#endif

// Rows of a tile, and words along K per step: panels are zero-padded to a multiple of the latter.
template <typename T>
constexpr int TILE_M = USES_AMX<T> ? 32 : VECTOR_ROWS;
template <typename T>
constexpr int K_STEP = USES_AMX<T> ? 16 : 1;
template <typename T>
int64_t words_of(int64_t n) { return (n + PER_WORD<T> - 1) / PER_WORD<T>; }
template <typename T>
int64_t padded_words(int64_t words) { return (words + K_STEP<T> - 1) / K_STEP<T> * K_STEP<T>; }

static inline Vec load_word(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
static inline Ints load_ints(const void* p) { return (Ints)load(static_cast<const float*>(p)); }

// sum + the product of words: fp32.
static inline Vec dot(Vec sum, Vec a, Vec b, const float*) { return fma(a, b, sum); }

// sum + the two products of words: bf16. The product of two bf16 is exact in fp32.
static inline Vec dot(Vec sum, Vec a, Vec b, const bf16*) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const Ints high = {};
    const Ints mask = high + static_cast<int32_t>(0xffff0000);
    sum = fma((Vec)((Ints)a << 16), (Vec)((Ints)b << 16), sum);
    return fma((Vec)((Ints)a & mask), (Vec)((Ints)b & mask), sum);
#endif
}

// sum + the four or two products of words: bytes.
static inline Ints dot(Ints sum, Vec a, Vec b, const Bytes*) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const Ints x = (Ints)a, y = (Ints)b;
    return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

static inline Vec broadcast(const uint32_t* p) {
    float word;
    std::memcpy(&word, p, sizeof word);
    return set(word);
}

// Words per partial sum. Products of fp32 are summed by chunks: one running sum over all of K would have an error of
// sqrt(K) roundings instead of sqrt(CHUNK) + sqrt(K / CHUNK). For bf16 a running fp32 sum is accurate enough; integer
// sums are exact.
template <typename T>
constexpr int64_t CHUNK = INT64_MAX / 2;
template <>
constexpr int64_t CHUNK<float> = 128;

// Addresses to prefetch during a product: `words` words per step along K, from `next`.
struct Ahead {
    const uint32_t* next;
    int64_t words;
};

// Prefetches B itself, 64 steps before its use: 8 KB of a panel that may come from memory.
static inline Ahead ahead_in(const uint32_t* b) { return {b + 64 * TILE_N, TILE_N}; }

// sums[m][v] = sum over k < words of A[m][k] * B[k][v], m < M, added to the old sums if `more`. `lda` is in words.
template <typename T, int M>
static inline void multiply(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t words, Sum<T> (*sums)[NV], bool more,
                            Ahead ahead) {
    constexpr bool RUNNING = CHUNK<T> > CHUNK<float>;
    constexpr int LINES = TILE_N > 16 ? TILE_N / 16 : 1;  // per step; if half as many, each is prefetched twice
    const int64_t apart = ahead.words / LINES;
    for (int64_t start = 0; start == 0 || start < words; start += CHUNK<T>) {
        const int64_t end = start + CHUNK<T> < words ? start + CHUNK<T> : words;
        Sum<T> part[M][NV];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) part[m][v] = RUNNING && more ? sums[m][v] : Sum<T>{};
        // One pointer per three rows: one per row would not fit in the registers.
        const uint32_t* rows[(M + 2) / 3];
        for (int m = 0; m < M; m += 3) rows[m / 3] = a + m * lda + start;
        for (int64_t k = start; k < end; ++k) {
            Vec columns[NV];
            for (int v = 0; v < NV; ++v) columns[v] = load_word(b + (k * NV + v) * WIDTH);
            for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead.next + (k * LINES + i) * apart);
            for (int m = 0; m < M; ++m) {
                const Vec row = broadcast(rows[m / 3] + m % 3 * lda);
                for (int v = 0; v < NV; ++v)
                    part[m][v] = dot(part[m][v], row, columns[v], static_cast<const T*>(nullptr));
            }
            for (int m = 0; m < M; m += 3) ++rows[m / 3];
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) sums[m][v] = !RUNNING && more ? sums[m][v] + part[m][v] : part[m][v];
        more = true;
    }
}

// Calls f with M as a compile-time number: f(std::integral_constant<int, m>), without <type_traits>.
template <int M>
struct Rows {
    static constexpr int value = M;
};
template <int M = VECTOR_ROWS, typename F>
static inline void with_rows(int64_t m, const F& f) {
    if constexpr (M == 1) {
        f(Rows<1>{});
    } else {
        if (m >= M) f(Rows<M>{});
        else with_rows<M - 1>(m, f);
    }
}

// Calls store(i, sums), of NV vectors, for each row i < m <= TILE_M<T> of A times one panel of `words` words.
template <typename T, typename Store>
static inline void product(const uint32_t* a, int64_t lda, int64_t m, const uint32_t* b, int64_t words, const Store& store) {
#if defined(FASTBERT_AMX)
    if constexpr (USES_AMX<T>) {
        alignas(64) uint32_t out[TILE_M<T> * TILE_N];
        amx_product<T>(a, lda, static_cast<int>(m), b, words, false, out, TILE_N, [] {});
        for (int i = 0; i < m; ++i) {
            Sum<T> sums[NV];
            for (int v = 0; v < NV; ++v) sums[v] = (Sum<T>)load_word(out + i * TILE_N + v * WIDTH);
            store(i, sums);
        }
        return;
    }
#endif
    with_rows(m, [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        Sum<T> sums[M][NV];
        multiply<T, M>(a, lda, b, words, sums, false, ahead_in(b));
        for (int i = 0; i < M; ++i) store(i, sums[i]);
    });
}

// The same, stored to the rows of `out`, `apart` words from each other; there must be TILE_M<T> of them.
template <typename T>
static inline void product_to(const uint32_t* a, int64_t lda, int64_t m, const uint32_t* b, int64_t words, float* out,
                              int64_t apart) {
#if defined(FASTBERT_AMX)
    if constexpr (USES_AMX<T>)
        return amx_product<T>(a, lda, static_cast<int>(m), b, words, false, reinterpret_cast<uint32_t*>(out), apart, [] {});
#endif
    product<T>(a, lda, m, b, words, [&](int i, const Sum<T>* sums) {
        for (int v = 0; v < NV; ++v) store(out + i * apart + v * WIDTH, sums[v]);
    });
}

#if defined(__AVX512F__)
// to[k][j] = from[j][k], 16 x 16 words; strides in words.
static inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now r[4 i + c] holds, in quarter q, word 4 q + c of rows 4 i to 4 i + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i ab_even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), ab_odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i cd_even = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i cd_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(ab_even, cd_even, 0x88));
        _mm512_storeu_si512(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88));
        _mm512_storeu_si512(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd));
        _mm512_storeu_si512(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd));
    }
}
#endif

// Packs rows [0, n) of `src` (stride in words) as columns of a panel, zeros beyond n and up to `padded` words:
// panel[k][j] = src[j][k]. Packs weights (F, K) and keys (L, D).
static inline void pack_panel(const uint32_t* src, int64_t stride, int64_t n, int64_t words, int64_t padded,
                              uint32_t* panel) {
    int64_t k = 0;
#if defined(__AVX512F__)
    static_assert(TILE_N == 32);
    alignas(64) uint32_t some[TILE_N * 16];  // the columns that exist, then zeros
    if (n < TILE_N) std::memset(some, 0, sizeof some);
    for (; k + 16 <= words; k += 16) {
        for (int64_t j = 0; n < TILE_N && j < n; ++j) std::memcpy(some + j * 16, src + j * stride + k, 64);
        const uint32_t* from = n < TILE_N ? some : src + k;
        const int64_t apart = n < TILE_N ? 16 : stride;
        transpose(from, apart, panel + k * TILE_N, TILE_N);
        transpose(from + 16 * apart, apart, panel + k * TILE_N + 16, TILE_N);
    }
#endif
    for (; k < padded; ++k)
        for (int64_t j = 0; j < TILE_N; ++j) panel[k * TILE_N + j] = j < n && k < words ? src[j * stride + k] : 0;
}

}  // namespace fastbert::FASTBERT_ISA
