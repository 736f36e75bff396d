// Shares linear out over threads: blocks of rows times ranges of weight panels. Compiled for the base
// instruction set.
#include <algorithm>

#include "kernels.h"

namespace fastbert {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

int64_t packed_weight_bytes(DType dtype, int64_t N, int64_t K, Isa isa) {
    const int64_t columns = cpu_kernels(isa).linear.tile_n;
    return divide_up(N, columns) * columns * (K * bytes_of(dtype) + 4);
}

void pack_weight_cpu(const PackWeight& op, Isa isa, int threads) {
    const LinearKernels& kernels = cpu_kernels(isa).linear;
    const auto pack = op.dtype == DType::f32 ? kernels.pack_f32 : kernels.pack_bf16;
    const int64_t panels = divide_up(op.N, kernels.tile_n);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t p = 0; p < panels; ++p) pack(op, p, p + 1);
}

void linear_cpu(const Linear& op, Isa isa, int threads) {
    if (op.M == 0 || op.N == 0) return;
    const LinearKernels& kernels = cpu_kernels(isa).linear;
    const auto run = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;
    const int64_t panels = divide_up(op.N, kernels.tile_n);

    // A block of rows stays in the L2 cache while all panels of a task pass by, and a panel while all the
    // block's tiles use it.
    constexpr int64_t BLOCK_BYTES = 384 * 1024;
    const int64_t fitting = BLOCK_BYTES / (std::max<int64_t>(op.K, 1) * bytes_of(op.dtype)) / kernels.tile_m * kernels.tile_m;
    const int64_t block = std::max<int64_t>(fitting, 2 * kernels.tile_m);
    const int64_t blocks = divide_up(op.M, block);
    const int64_t rows = divide_up(divide_up(op.M, blocks), kernels.tile_m) * kernels.tile_m;

    // Some tasks a thread, handed out as they come, so that a slow core does not hold up the others.
    const int64_t ranges = std::min(panels, divide_up(8 * threads, blocks));
    const int64_t tasks = divide_up(op.M, rows) * ranges;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task / ranges * rows, range = task % ranges;
        run(op, first, std::min(op.M, first + rows), panels * range / ranges, panels * (range + 1) / ranges);
    }
}

}  // namespace fastbert
