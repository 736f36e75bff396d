// Distributes the steps of linear_cross_entropy between its products over threads. Compiled for the base instruction
// set.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "team.h"

namespace fastbert {
namespace {

// Rows of the vocabulary per partial sum, independent of the number of threads.
constexpr int64_t BLOCK = 128;

float element(DType dtype, const void* p, int64_t i) {
    float value;
    if (dtype == DType::f32) {
        std::memcpy(&value, static_cast<const float*>(p) + i, sizeof value);
    } else {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
        std::memcpy(&value, &bits, sizeof value);
    }
    return value;
}

}  // namespace

int64_t cross_entropy_blocks(int64_t V) { return divide_up(V, BLOCK); }

void cross_entropy_statistics_cpu(const CrossEntropy& op, Isa isa, int threads) {
    const CrossEntropyKernels& kernels = cpu_kernels(isa).cross_entropy;
    const auto statistics = op.dtype == DType::f32 ? kernels.statistics_f32 : kernels.statistics_bf16;
    const int64_t blocks = cross_entropy_blocks(op.V);
    Team::share(threads, blocks, [&](int64_t b) {
        float* top = op.partial + 2 * b * op.K;
        statistics(op, b * BLOCK, std::min(op.V, (b + 1) * BLOCK), top, top + op.K);
    });
    for (int64_t k = 0; k < op.K; ++k) {
        const int64_t v = op.labels[k] - op.first;
        if (op.labels[k] < 0 || v < 0 || v >= op.V) continue;
        op.picked[k] = element(op.dtype, op.logits, v * op.K + k) + (op.bias ? element(op.dtype, op.bias, v) : 0.0f);
    }
}

void cross_entropy_combine_cpu(const float* partial, int64_t blocks, int64_t K, float* row_max, float* total, Isa isa,
                               int threads) {
    constexpr int64_t TOKENS = 32;  // a multiple of every vector width
    const auto combine = cpu_kernels(isa).cross_entropy.combine;
    Team::share(threads, divide_up(K, TOKENS), [&](int64_t task) {
        const int64_t k = task * TOKENS;
        combine(partial, blocks, K, row_max, total, k, std::min(K, k + TOKENS));
    });
}

void cross_entropy_bwd_cpu(const CrossEntropy& op, Isa isa, int threads) {
    const CrossEntropyKernels& kernels = cpu_kernels(isa).cross_entropy;
    const auto gradient = op.dtype == DType::f32 ? kernels.gradient_f32 : kernels.gradient_bf16;
    const int64_t blocks = cross_entropy_blocks(op.V);
    Team::share(threads, blocks, [&](int64_t b) { gradient(op, b * BLOCK, std::min(op.V, (b + 1) * BLOCK)); });
}

}  // namespace fastbert
