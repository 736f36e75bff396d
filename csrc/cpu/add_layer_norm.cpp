// Distributes the rows of add_layer_norm over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace fastbert {

void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads) {
    Team::run(worth(threads, op.M, op.M * op.N), [&](Team& team) { add_layer_norm_cpu(op, isa, team); });
}

void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, Team& team) {
    const AddLayerNormKernels& kernels = cpu_kernels(isa).add_layer_norm;
    const auto rows = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;
    // One thread computes a whole row, so the result does not depend on the number of threads.
    const int64_t parts = std::min<int64_t>({team.size(), op.M, op.M * op.N / 2048 + 1});
    team.each(parts, [&](int64_t part) { rows(op, op.M * part / parts, op.M * (part + 1) / parts); });
}

}  // namespace fastbert
