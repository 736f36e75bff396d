// Distributes the rows of add_layer_norm's training passes over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {

void add_layer_norm_fwd_train_cpu(const AddLayerNormFwdTrain& op, Isa isa, int threads) {
    const auto& kernels = cpu_kernels(isa).add_layer_norm_fwd_train;
    const auto rows = op.op.dtype == DType::f32 ? kernels.forward_f32 : kernels.forward_bf16;
    const int64_t bytes = 2 * kernels.scratch(op.op.N) * sizeof(float), M = op.op.M;
    const int64_t blocks = divide_up(M, PARTIAL_ROWS);
    Team::run(worth(threads, blocks, M * op.op.N), [&](Team& team) {
        float* memory = static_cast<float*>(scratch<struct TaskMemory>(bytes));
        team.each(blocks, [&](int64_t block) {
            rows(op, block * PARTIAL_ROWS, std::min(M, (block + 1) * PARTIAL_ROWS), memory);
        });
    });
}

void add_layer_norm_bwd_cpu(const AddLayerNormBwd& op, Isa isa, int threads) {
    const CpuKernels& table = cpu_kernels(isa);
    const bool wide = op.op.dtype == DType::f32;
    const auto rows = wide ? table.add_layer_norm_fwd_train.backward_f32 : table.add_layer_norm_fwd_train.backward_bf16;
    const int64_t N = op.op.N, bytes = 2 * table.add_layer_norm_fwd_train.scratch(N) * sizeof(float);
    const int64_t blocks = divide_up(op.op.M, PARTIAL_ROWS);
    Team::run(worth(threads, blocks, op.op.M * N), [&](Team& team) {
        float* memory = static_cast<float*>(scratch<struct TaskMemory>(bytes));
        team.each(blocks, [&](int64_t block) { rows(op, block, memory); });
    });
    const auto sum = wide ? table.linear_fwd_train.sum_f32 : table.linear_fwd_train.sum_bf16;
    if (op.dweight) sum(op.partials, blocks, 2 * N, N, op.dweight);
    if (op.dbias) sum(op.partials + N, blocks, 2 * N, N, op.dbias);
}

}  // namespace fastbert
