// Shares what surrounds the products of linear's backward out over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace fastbert {

void activate_cpu(const Activate& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = cpu_kernels(isa).linear_training;
    const auto run = op.dtype == DType::f32 ? kernels.activate_f32 : kernels.activate_bf16;
    constexpr int64_t PART = 8192;
    const int64_t parts = divide_up(op.n, PART);
    Team::share(worth(threads, parts, op.n), parts, [&](int64_t part) {
        run(op, part * PART, std::min(op.n, (part + 1) * PART));
    });
}

void activation_backward_cpu(const ActivationBackward& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = cpu_kernels(isa).linear_training;
    const auto run = op.dtype == DType::f32 ? kernels.backward_f32 : kernels.backward_bf16;
    const int64_t strips = divide_up(op.N, kernels.strip_columns), tasks = divide_up(op.M, PARTIAL_ROWS) * strips;
    Team::share(worth(threads, tasks, op.M * op.N), tasks, [&](int64_t task) { run(op, task / strips, task % strips); });
}

void sum_partials_cpu(const SumPartials& op, Isa isa) {
    const LinearTrainingKernels& kernels = cpu_kernels(isa).linear_training;
    (op.dtype == DType::f32 ? kernels.sum_f32 : kernels.sum_bf16)(op.partials, op.blocks, op.N, op.N, op.out);
}

// Shared out as linear_cpu is: a block of rows stays in L2 while the panels of a task pass by.
void weight_gradient_cpu(const WeightGradient& op, Isa isa, int threads) {
    if (op.N == 0 || op.K == 0) return;
    const LinearTrainingKernels& kernels = cpu_kernels(isa).linear_training;
    const bool wide = op.dtype == DType::f32;
    const auto run = wide ? kernels.gradient_f32 : kernels.gradient_bf16;
    constexpr int64_t BLOCK_BYTES = 384 * 1024;
    const int64_t row_bytes = std::max<int64_t>(op.tokens, 1) * (wide ? 4 : 2);
    const int64_t panels = divide_up(op.K, kernels.tile_n);
    const int64_t most = std::max<int64_t>(BLOCK_BYTES / row_bytes / kernels.tile_m, 2) * kernels.tile_m;
    const int64_t blocks = divide_up(op.N, most);
    const int64_t rows = divide_up(divide_up(op.N, blocks), kernels.tile_m) * kernels.tile_m;
    const int64_t ranges = std::min(panels, divide_up(8 * threads, blocks));
    const int64_t tasks = divide_up(op.N, rows) * ranges;
    Team::share(threads, tasks, [&](int64_t task) {
        const int64_t first = task / ranges * rows, range = task % ranges;
        run(op, first, std::min(op.N, first + rows), panels * range / ranges, panels * (range + 1) / ranges);
    });
}

void pack_transposed_cpu(const PackTransposed& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = cpu_kernels(isa).linear_training;
    const auto run = op.dtype == DType::f32 ? kernels.pack_f32 : kernels.pack_bf16;
    constexpr int64_t PART = 64;
    const int64_t parts = std::max<int64_t>(1, divide_up(op.rows, PART));
    Team::share(worth(threads, parts, op.rows * op.N), parts, [&](int64_t part) {
        run(op, part * PART, std::min(op.rows, (part + 1) * PART));
    });
}

}  // namespace fastbert
