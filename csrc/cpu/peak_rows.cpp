// Loops that do nothing but multiply and add registers: what this instruction set can reach at most, against
// which the products are held. Compiled once per instruction set. Nothing here computes anything of use.
#include "kernels.h"
#include "vec.h"

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbert::FASTBERT_ISA {
namespace {

// Sums in flight: two multipliers of 4 to 6 cycles want 8 to 12 of them, all in registers beside two operands.
#ifdef __AVX512F__
constexpr int SUMS = 16;
#else
constexpr int SUMS = 12;
#endif

// The compiler must believe that somebody reads the sums.
template <typename T>
static inline void keep(const T& sums) {
    asm volatile("" : : "r"(&sums) : "memory");
}

// sums[i] = sums[i] * a + b: the product depends on the last sum, so no part of it can leave the loop.
double f32(int64_t rounds) {
    const Vec a = set(0.999f), b = set(0.001f);
    Vec sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = set(static_cast<float>(i));
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sums[i] = fma(sums[i], a, b);
    keep(sums);
    return 2.0 * WIDTH * SUMS * static_cast<double>(rounds);
}

#if defined(__AMX_TILE__) && defined(__linux__)

// Four sums of 16 x 16 out of two tiles of A and two of B, as the products use the eight tiles.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Linux hands the tiles out on request; false where it refuses.
static inline bool begin_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return false;
    static const TileConfig config;
    asm volatile("" : : "r"(&config) : "memory");  // GCC 12's intrinsics clobber no memory
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    return true;
}

#define FASTBERT_TILE_LOOP(name, multiply, depth)                       \
    double name(int64_t rounds) {                                       \
        if (!begin_tiles()) return 0;                                   \
        for (int64_t r = 0; r < rounds; ++r) {                          \
            multiply(0, 4, 6);                                          \
            multiply(1, 4, 7);                                          \
            multiply(2, 5, 6);                                          \
            multiply(3, 5, 7);                                          \
        }                                                               \
        _tile_release();                                                \
        return 4 * 2.0 * 16 * 16 * depth * static_cast<double>(rounds); \
    }
FASTBERT_TILE_LOOP(bf16_dot, _tile_dpbf16ps, 32)
FASTBERT_TILE_LOOP(int8_dot, _tile_dpbssd, 64)
constexpr auto int8_vnni = int8_dot;
#undef FASTBERT_TILE_LOOP

#elif defined(__AVX512F__)

#ifdef __AVX512BF16__
double bf16_dot(int64_t rounds) {
    const __m512bh a = _mm512_cvtne2ps_pbh(set(0.5f), set(0.5f)), b = a;
    Vec sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = set(static_cast<float>(i));
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    keep(sums);
    return 2.0 * 2 * WIDTH * SUMS * static_cast<double>(rounds);
}
#else
constexpr double (*bf16_dot)(int64_t) = nullptr;
#endif

// Without VNNI a product of bytes takes three instructions.
double int8_dot(int64_t rounds) {
    const __m512i ones = _mm512_set1_epi16(1), b = _mm512_set1_epi8(2);
    __m512i sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i)
            sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(_mm512_maddubs_epi16(sums[i], b), ones));
    keep(sums);
    return 2.0 * 4 * WIDTH * SUMS * static_cast<double>(rounds);
}

__attribute__((target("avx512vnni"))) double int8_vnni(int64_t rounds) {
    const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
    __m512i sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    keep(sums);
    return 2.0 * 4 * WIDTH * SUMS * static_cast<double>(rounds);
}

#else

constexpr double (*bf16_dot)(int64_t) = nullptr;
constexpr double (*int8_vnni)(int64_t) = nullptr;

#ifdef __AVX2__
double int8_dot(int64_t rounds) {
    const __m256i ones = _mm256_set1_epi16(1), b = _mm256_set1_epi8(2);
    __m256i sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm256_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i)
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(sums[i], b), ones));
    keep(sums);
    return 2.0 * 4 * WIDTH * SUMS * static_cast<double>(rounds);
}
#else
constexpr double (*int8_dot)(int64_t) = nullptr;
#endif

#endif

// Reads `count` floats, a multiple of 8 vectors, as weights are streamed: each once, in order.
double read(const float* memory, int64_t count) {
    Vec sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = set(0.0f);
    for (int64_t k = 0; k < count; k += 8 * WIDTH)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] = add(sums[i], load(memory + k + i * WIDTH));
    keep(sums);
    return 4.0 * static_cast<double>(count);
}

}  // namespace

const PeakKernels peak_kernels = {f32, bf16_dot, int8_dot, int8_vnni, read};

}  // namespace fastbert::FASTBERT_ISA
