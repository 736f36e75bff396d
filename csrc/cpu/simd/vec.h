// One vector of fp32 for the instruction set that this object is compiled for: WIDTH lanes, loads and stores of fp32
// and bf16 (a raw uint16_t). load_n and store_n take the first n lanes (0 < n < WIDTH); load_n sets the others to zero.
// All names are in the namespace of the instruction set, so the linker cannot merge functions of two objects.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(FASTBERT_NEON)
#include <arm_neon.h>
#endif

namespace fastbert::FASTBERT_ISA {

using bf16 = uint16_t;

#if defined(__AVX512F__)

constexpr int WIDTH = 16;
using Vec = __m512;

static inline Vec set(float v) { return _mm512_set1_ps(v); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// max and min return their first operand if it is NaN.
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(b, a); }
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(b, a); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
static inline float highest(Vec v) { return _mm512_reduce_max_ps(v); }

static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
static inline Vec widen(__m256i raw) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
// Round to nearest even; a NaN stays a NaN instead of carrying into infinity.
static inline __m256i narrow(Vec v) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);  // flushes subnormal numbers to 0
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i out = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    out = _mm512_mask_mov_epi32(out, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
#endif
}

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
static inline Vec load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Vec load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
static inline void store_n(bf16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

#elif defined(__AVX2__)

constexpr int WIDTH = 8;
using Vec = __m256;

static inline Vec set(float v) { return _mm256_set1_ps(v); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(b, a); }
static inline Vec min(Vec a, Vec b) { return _mm256_min_ps(b, a); }
static inline float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float highest(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec widen(__m128i raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
// Round to nearest even; a NaN stays a NaN instead of carrying into infinity.
static inline __m128i narrow(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i out = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    out = _mm256_srli_epi32(_mm256_blendv_epi8(out, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
}

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline void store_n(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
static inline Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline Vec load_n(const bf16* p, int n) {
    bf16 lanes[WIDTH] = {};
    std::memcpy(lanes, p, n * sizeof(bf16));
    return load(lanes);
}
static inline void store(bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
static inline void store_n(bf16* p, Vec v, int n) {
    bf16 lanes[WIDTH];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(bf16));
}

#else

// Four lanes by the vector extensions of GCC and Clang, compiled to SSE2 or scalar code; on ARM, with the instructions
// that they have no operator for.
constexpr int WIDTH = 4;
using Vec = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(8)));

static inline Vec set(float v) { return Vec{v, v, v, v}; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec sub(Vec a, Vec b) { return a - b; }
static inline Vec mul(Vec a, Vec b) { return a * b; }
#if defined(FASTBERT_NEON)
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
static inline Vec max(Vec a, Vec b) { return b > a ? b : a; }
static inline Vec min(Vec a, Vec b) { return b < a ? b : a; }
static inline float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline float highest(Vec v) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

static inline Vec widen(Halves raw) { return (Vec)(__builtin_convertvector(raw, Bits) << 16); }
// Round to nearest even; a NaN stays a NaN instead of carrying into infinity.
static inline Halves narrow(Vec v) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (Halves)vcvt_bf16_f32((float32x4_t)v);
#else
    const Bits bits = (Bits)v, nan = (Bits)(v != v);
    const Bits out = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector(((out & ~nan) | (0x7fc00000 & nan)) >> 16, Halves);
#endif
}

static inline Vec load_n(const float* p, int n) {
    Vec v = {};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
}
static inline void store_n(float* p, Vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }
static inline Vec load_n(const bf16* p, int n) {
    Halves raw = {};
    std::memcpy(&raw, p, n * sizeof(bf16));
    return widen(raw);
}
static inline void store_n(bf16* p, Vec v, int n) {
    const Halves raw = narrow(v);
    std::memcpy(p, &raw, n * sizeof(bf16));
}
template <typename T>
static inline Vec load(const T* p) { return load_n(p, WIDTH); }
template <typename T>
static inline void store(T* p, Vec v) { store_n(p, v, WIDTH); }

#endif

// Stores two vectors one after the other.
template <typename T>
static inline void store_two(T* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(bf16)) return _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#endif
    store(p, a);
    store(p + WIDTH, b);
}

// The first n lanes of v, the others zero: for sums over a row whose length is no multiple of WIDTH.
static inline Vec keep_n(Vec v, int n) {
    float lanes[WIDTH];
    store(lanes, v);
    return load_n(lanes, n);
}

}  // namespace fastbert::FASTBERT_ISA
