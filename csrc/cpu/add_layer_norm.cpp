// Shares the rows of add_layer_norm out over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace fastbert {

// As many parts as have `grain` elements, or one for each thread.
static int parts_of(const AddLayerNorm& op, int threads, int64_t grain) {
    return static_cast<int>(std::min<int64_t>({threads, op.M, op.M * op.N / grain + 1}));
}

void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads) {
    // Waking a thread costs some microseconds, the time of about 16 thousand elements.
    Team::run(parts_of(op, threads, 16384), [&](Team& team) { add_layer_norm_cpu(op, isa, team); });
}

void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, Team& team) {
    const AddLayerNormKernels& kernels = cpu_kernels(isa).add_layer_norm;
    const auto rows = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;
    // A row belongs to one thread whatever their number, so the result does not depend on it.
    const int64_t parts = parts_of(op, team.size(), 2048);
    team.each(parts, [&](int64_t part) { rows(op, op.M * part / parts, op.M * (part + 1) / parts); });
}

}  // namespace fastbert
