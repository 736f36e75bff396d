// Loops that only multiply and add registers, or only read memory: the peaks that the products are compared with.
// Compiled once per instruction set. Their results are not used.
#include "kernels.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Accumulators in flight: two FMA units with a latency of 4 to 6 cycles need 8 to 12; two operands need registers too.
#ifdef __AVX512F__
constexpr int SUMS = 16;
#else
constexpr int SUMS = 12;
#endif

// Makes the compiler assume that the sums are read.
template <typename T>
static inline void keep(const T& sums) {
    asm volatile("" : : "r"(&sums) : "memory");
}

// Makes the compiler assume that the vector has changed, so that nothing computed from it is hoisted out of the loop.
template <typename V>
static inline void renew(V& operand) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(operand));
#elif defined(FASTBERT_X86)
    asm volatile("" : "+x"(operand));
#else
    asm volatile("" : "+w"(operand));
#endif
}

template <typename T>
double multiply_vectors(int64_t rounds) {
    Vec a = set(0.999f);
    const Vec b = set(0.001f);
    Sum<T> sums[SUMS] = {};
    for (Sum<T>& sum : sums) renew(sum);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) {
            renew(a);  // each time: without FMA, all sums would share one product
            sums[i] = dot(sums[i], a, b, static_cast<const T*>(nullptr));
        }
    keep(sums);
    return 2.0 * PER_WORD<T> * WIDTH * SUMS * static_cast<double>(rounds);
}

// Four sums of 16 x 16 out of two tiles of A and two of B, as the products use the eight tiles.
template <typename T>
double multiply(int64_t rounds) {
#if defined(FASTBERT_AMX)
    if constexpr (USES_AMX<T>) {
        constexpr const T* type = nullptr;
        const TilesInUse tiles;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
        for (int64_t r = 0; r < rounds; ++r) {
            tile_dot<0, 4, 6>(type);
            tile_dot<1, 4, 7>(type);
            tile_dot<2, 5, 6>(type);
            tile_dot<3, 5, 7>(type);
        }
        return 4 * 2.0 * 16 * 16 * 16 * PER_WORD<T> * static_cast<double>(rounds);
    }
#endif
    return multiply_vectors<T>(rounds);
}

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

// Without an instruction for bf16, they are multiplied as fp32.
const PeakKernels peak_kernels = {multiply<float>, MULTIPLIES_BF16 ? multiply<bf16> : multiply<float>, multiply<Bytes>,
                                  read};

}  // namespace fastbert::FASTBERT_ISA
