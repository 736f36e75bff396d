// Shares the rows of add_layer_norm out over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"

namespace fastbert {

void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads) {
    const AddLayerNormKernels& kernels = cpu_kernels(isa).add_layer_norm;
    const auto rows = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;

    // Waking a thread costs some microseconds, the time of about 16 thousand elements.
    constexpr int64_t GRAIN = 16384;
    const int64_t parts = std::min<int64_t>({threads, op.M, op.M * op.N / GRAIN + 1});
    if (parts <= 1) {
        rows(op, 0, op.M);
        return;
    }
    // A row belongs to one thread whatever their number, so the result does not depend on it.
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part)
        rows(op, op.M * part / parts, op.M * (part + 1) / parts);
}

}  // namespace fastbert
