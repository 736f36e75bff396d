// The inner product that every matrix product here is made of: a tile of M rows times NV vectors of columns,
// accumulated in fp32 registers over the whole of K.
//
// Both operands are walked in words of 32 bits: one fp32, or two bf16 neighbours along K. A is rows of words
// as they lie in memory; a word of it is broadcast. B is packed: word k of WIDTH * NV neighbouring columns
// lies together, so a step loads NV vectors. So fp32 and bf16 share every line but `dot`.
#pragma once

#include "vec_math.h"

namespace fastbert::FASTBERT_ISA {

// The tile: as many accumulators as the registers hold beside NV vectors of B and a broadcast of A.
#if defined(__AVX512F__)
constexpr int TILE_M = 12, NV = 2;
#elif defined(__AVX2__)
constexpr int TILE_M = 6, NV = 2;
#else
constexpr int TILE_M = 4, NV = 2;
#endif
constexpr int TILE_N = NV * WIDTH;

// Elements in a word.
template <typename T>
constexpr int PER_WORD = sizeof(uint32_t) / sizeof(T);

static inline Vec load_word(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }

// acc + the product of words: fp32.
static inline Vec dot(Vec acc, Vec a, Vec b, const float*) { return fma(a, b, acc); }

// acc + the two products of words: bf16. The product of two bf16 is exact in fp32.
static inline Vec dot(Vec acc, Vec a, Vec b, const bf16*) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const Ints high = {};
    const Ints mask = high + static_cast<int32_t>(0xffff0000);
    acc = fma((Vec)((Ints)a << 16), (Vec)((Ints)b << 16), acc);
    return fma((Vec)((Ints)a & mask), (Vec)((Ints)b & mask), acc);
#endif
}

static inline Vec broadcast(const uint32_t* p) {
    float word;
    std::memcpy(&word, p, sizeof word);
    return set(word);
}

// Sums are taken over so many words, and then added up: one running sum over all of K would lose digits as K
// grows (an error of sqrt(K) roundings, against sqrt(CHUNK) + sqrt(K / CHUNK)).
constexpr int64_t CHUNK = 128;

// acc[m][v] += sum over k < words of A[m][k] * B[k][v]. `lda` in words.
template <typename T, int M>
static inline void multiply(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t words, Vec (&acc)[M][NV]) {
    for (int64_t start = 0; start < words; start += CHUNK) {
        const int64_t end = start + CHUNK < words ? start + CHUNK : words;
        Vec part[M][NV];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) part[m][v] = set(0.0f);
        for (int64_t k = start; k < end; ++k) {
            Vec columns[NV];
            for (int v = 0; v < NV; ++v) columns[v] = load_word(b + (k * NV + v) * WIDTH);
            for (int m = 0; m < M; ++m) {
                const Vec row = broadcast(a + m * lda + k);
                for (int v = 0; v < NV; ++v)
                    part[m][v] = dot(part[m][v], row, columns[v], static_cast<const T*>(nullptr));
            }
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) acc[m][v] = add(acc[m][v], part[m][v]);
    }
}

// Calls f with M as a compile-time number: f(std::integral_constant<int, m>), without <type_traits>.
template <int M>
struct Rows {
    static constexpr int value = M;
};
template <int M = TILE_M, typename F>
static inline void with_rows(int64_t m, const F& f) {
    if constexpr (M == 1) {
        f(Rows<1>{});
    } else {
        if (m >= M) f(Rows<M>{});
        else with_rows<M - 1>(m, f);
    }
}

// Columns [0, n) of words from rows of `src` (stride in words) into a panel of TILE_N columns, zeros beyond:
// panel[k][j] = src[j][k]. Weights (F, K) and keys (L, D) are packed by it.
static inline void pack_panel(const uint32_t* src, int64_t stride, int64_t n, int64_t words, uint32_t* panel) {
    for (int64_t k = 0; k < words; ++k)
        for (int64_t j = 0; j < TILE_N; ++j) panel[k * TILE_N + j] = j < n ? src[j * stride + k] : 0;
}

}  // namespace fastbert::FASTBERT_ISA
