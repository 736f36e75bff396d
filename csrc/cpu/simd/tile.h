// The building block of every matrix product here: a tile of rows times a panel of TILE_N columns.
//
// Both operands are read in words of 32 bits, which hold neighbours along K: one fp32, two bf16, or several bytes. A is
// read in place, row by row. B is packed in panels: word k of TILE_N neighbouring columns is contiguous. A vector unit
// broadcasts a word of A against NV vectors of B; AMX takes 16 x 16 words of either as a tile, from the same panels.
// Sums are fp32, for bytes int32. Where the processor multiplies only wider numbers, B is still packed in its own
// width, and widened in registers: memory and caches hold half as much.
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
#elif defined(FASTBERT_NEON)
constexpr int VECTOR_ROWS = 12, NV = 2;
#else
constexpr int VECTOR_ROWS = 4, NV = 2;
#endif
constexpr int TILE_N = NV * WIDTH;

static inline int64_t panels(int64_t columns) { return (columns + TILE_N - 1) / TILE_N; }

// Bytes for numbers in [-127, 127]. With VNNI, or ARM's dot product, a word is four of them; BYTE_OFFSET is added to
// those of A where the first operand is unsigned, as vpdpbusd's. Elsewhere a word is two, widened to 16 bits for a
// multiply-add of pairs.
struct Bytes {};
#if defined(__AVX512VNNI__)
constexpr int BYTES_PER_WORD = 4, BYTE_OFFSET = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int BYTES_PER_WORD = 4, BYTE_OFFSET = 0;
#else
constexpr int BYTES_PER_WORD = 2, BYTE_OFFSET = 0;  // of A; a panel holds bytes
#endif

// bf16 where no instruction multiplies pairs of them: as fp32. The rows of A are widened beforehand, to two words for
// one of B.
struct Widened {};

template <typename T>
constexpr int PER_WORD = sizeof(uint32_t) / sizeof(T);
template <>
inline constexpr int PER_WORD<Bytes> = BYTES_PER_WORD;
template <>
inline constexpr int PER_WORD<Widened> = 2;

// Words of a row of A, and of a panel, per step along K.
template <typename T>
constexpr int A_WORDS = 1;
template <>
inline constexpr int A_WORDS<Widened> = 2;
template <typename T>
constexpr int64_t B_WORDS = TILE_N;
template <>
inline constexpr int64_t B_WORDS<Bytes> = TILE_N * BYTES_PER_WORD / 4;

// As std::conditional_t.
template <bool B, typename Then, typename Else>
struct Chosen {
    using type = Then;
};
template <typename Then, typename Else>
struct Chosen<false, Then, Else> {
    using type = Else;
};
template <bool B, typename Then, typename Else>
using Choice = typename Chosen<B, Then, Else>::type;

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
constexpr bool USES_AMX = PER_WORD<T> > 1 && A_WORDS<T> == 1;  // all but fp32
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

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// The halves of a step whose products are added one after the other: two where pairs of bf16 are multiplied as fp32,
// in which their product is exact.
template <typename T>
constexpr int HALVES = 1;
template <>
inline constexpr int HALVES<bf16> = MULTIPLIES_BF16 ? 1 : 2;
template <>
inline constexpr int HALVES<Widened> = 2;

// The first or second bf16 of each word, as fp32.
static inline Vec half_of(Vec words, int half) {
    if (!half) return (Vec)((Ints)words << 16);
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Two shifts, as a mask would take the register that one of the sums needs.
    Ints high = (Ints)words;
    asm("vpsrld $16, %0, %0\n\tvpslld $16, %0, %0" : "+x"(high));
    return (Vec)high;
#else
    return (Vec)((Ints)words & (Ints{} + static_cast<int32_t>(0xffff0000)));
#endif
}

static inline Vec broadcast(const uint32_t* p) {
    float word;
    std::memcpy(&word, p, sizeof word);
    return set(word);
}

// Bytes as words of two 16-bit numbers.
static inline Vec widened_bytes(const void* bytes) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(bytes)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
#else
    using Eight = int8_t __attribute__((vector_size(8)));
    using Shorts = int16_t __attribute__((vector_size(16)));
    Eight eight;
    std::memcpy(&eight, bytes, sizeof eight);
    return (Vec)__builtin_convertvector(eight, Shorts);
#endif
}

// Operands of `dot`: a word of a row, and vector v of a step's columns.
template <typename T>
static inline Vec row_word(const uint32_t* a, int half) {
    if constexpr (A_WORDS<T> > 1) return broadcast(a + half);
    else if constexpr (HALVES<T> > 1) return half_of(broadcast(a), half);
    else return broadcast(a);
}
template <typename T>
static inline Vec column_words(const uint32_t* b, int v, int half) {
    if constexpr (B_WORDS<T> < TILE_N) return widened_bytes(b + v * WIDTH / 2);
    else if constexpr (HALVES<T> > 1) return half_of(load_word(b + v * WIDTH), half);
    else return load_word(b + v * WIDTH);
}

// sum + the product of words: fp32.
static inline Vec dot(Vec sum, Vec a, Vec b, const float*) { return fma(a, b, sum); }

// sum + the two products of words: bf16.
static inline Vec dot(Vec sum, Vec a, Vec b, const bf16*) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    return fma(half_of(a, 1), half_of(b, 1), fma(half_of(a, 0), half_of(b, 0), sum));
#endif
}

// sum + the four or two products of words: bytes.
static inline Ints dot(Ints sum, Vec a, Vec b, const Bytes*) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#elif defined(__AVX512F__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const Ints x = (Ints)a, y = (Ints)b;
    return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Adds one step along K to the sums of M rows: the word at row(m) of each times the columns at b. It broadcasts one word
// at a time, so that the sums and the columns fit in the registers.
template <typename T, int M, typename Row>
static inline void add_step(Sum<T> (*sums)[NV], const Row& row, const uint32_t* b) {
    for (int half = 0; half < HALVES<T>; ++half) {
        Vec columns[NV];
        for (int v = 0; v < NV; ++v) columns[v] = column_words<T>(b, v, half);
        for (int m = 0; m < M; ++m) {
            const Vec word = row_word<T>(row(m), half);
            for (int v = 0; v < NV; ++v) {
                if constexpr (HALVES<T> > 1) sums[m][v] = fma(word, columns[v], sums[m][v]);
                else sums[m][v] = dot(sums[m][v], word, columns[v], static_cast<const T*>(nullptr));
            }
        }
    }
}

// Words per partial sum. Products of fp32 are summed by chunks: one running sum over all of K would have an error of
// sqrt(K) roundings instead of sqrt(CHUNK) + sqrt(K / CHUNK). For bf16 a running fp32 sum is accurate enough; integer
// sums are exact.
template <typename T>
constexpr int64_t CHUNK = INT64_MAX / 2;
template <>
inline constexpr int64_t CHUNK<float> = 128;

// Addresses to prefetch during a product: `words` words per step along K, from `next`.
struct Ahead {
    const uint32_t* next;
    int64_t words;
};

// Prefetches B itself, 64 steps before its use: 8 KB of a panel that may come from memory.
template <typename T>
static inline Ahead ahead_in(const uint32_t* b) { return {b + 64 * B_WORDS<T>, B_WORDS<T>}; }

// sums[m][v] = sum over k < words of A[m][k] * B[k][v], m < M, added to the old sums if `more`. `lda` is in words.
template <typename T, int M>
static inline void multiply(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t words, Sum<T> (*sums)[NV], bool more,
                            Ahead ahead) {
    constexpr bool RUNNING = CHUNK<T> > CHUNK<float>;
    constexpr int LINES = B_WORDS<T> > 16 ? B_WORDS<T> / 16 : 1;  // per step; if half as many, each is prefetched twice
    const int64_t apart = ahead.words / LINES;
    for (int64_t start = 0; start == 0 || start < words; start += CHUNK<T>) {
        const int64_t end = start + CHUNK<T> < words ? start + CHUNK<T> : words;
        Sum<T> part[M][NV];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) part[m][v] = RUNNING && more ? sums[m][v] : Sum<T>{};
        // One pointer per three rows: one per row would not fit in the registers.
        const uint32_t* rows[(M + 2) / 3];
        for (int m = 0; m < M; m += 3) rows[m / 3] = a + m * lda + start * A_WORDS<T>;
        for (int64_t k = start; k < end; ++k) {
            for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead.next + (k * LINES + i) * apart);
            add_step<T, M>(part, [&](int m) { return rows[m / 3] + m % 3 * lda; }, b + k * B_WORDS<T>);
            for (int m = 0; m < M; m += 3) rows[m / 3] += A_WORDS<T>;
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
        multiply<T, M>(a, lda, b, words, sums, false, ahead_in<T>(b));
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
