// Distributes attention's training passes over threads: a task is one head of one sequence. Compiled for the base
// instruction set.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {
namespace {

template <typename Op>
void each_head(const Op& op, int64_t (*bytes_for)(int64_t, int64_t),
               void (*run)(const Op&, int64_t, int64_t, int64_t, void*), int threads) {
    const int32_t* offsets = op.op.cu_seqlens;
    int64_t longest = 0;
    for (int64_t b = 0; b < op.op.B; ++b) longest = std::max<int64_t>(longest, offsets[b + 1] - offsets[b]);
    if (longest == 0) return;
    const int64_t bytes = bytes_for(longest, op.op.D);
    Team::run(threads, [&](Team& team) {
        void* memory = scratch<struct TaskMemory>(bytes);
        team.each(op.op.B * op.op.H, [&](int64_t task) {
            const int64_t b = task / op.op.H, length = offsets[b + 1] - offsets[b];
            if (length > 0) run(op, offsets[b], length, task % op.op.H, memory);
        });
    });
}

void sum_dbias(const AttentionBwd& op, int threads) {
    const int64_t width = 2 * op.op.reach - 1;
    const int32_t* offsets = op.op.cu_seqlens;
    Team::run(threads, [&](Team& team) {
        team.each(op.op.H, [&](int64_t head) {
            std::vector<double> sums(width);
            for (int64_t b = 0; b < op.op.B; ++b) {
                const int64_t length = offsets[b + 1] - offsets[b];
                const float* part = op.dbias_parts + 2 * (head * op.T + offsets[b]);
                for (int64_t i = 0; i + 1 < 2 * length; ++i) sums[op.op.reach - length + i] += part[i];
            }
            std::copy(sums.begin(), sums.end(), op.dbias + head * width);
        });
    });
}

}  // namespace

void attention_fwd_train_cpu(const AttentionFwdTrain& op, Isa isa, int threads) {
    const AttentionBwdKernels& kernels = cpu_kernels(isa).attention_fwd_train;
    if (op.op.dtype == DType::f32) each_head(op, kernels.forward_scratch_f32, kernels.forward_f32, threads);
    else each_head(op, kernels.forward_scratch_bf16, kernels.forward_bf16, threads);
}

void attention_bwd_cpu(const AttentionBwd& op, Isa isa, int threads) {
    const AttentionBwdKernels& kernels = cpu_kernels(isa).attention_fwd_train;
    if (op.op.dtype == DType::f32) each_head(op, kernels.backward_scratch_f32, kernels.backward_f32, threads);
    else each_head(op, kernels.backward_scratch_bf16, kernels.backward_bf16, threads);
    if (op.dbias) sum_dbias(op, threads);
}

}  // namespace fastbert
