// Distributes linear over threads: blocks of rows times ranges of weight panels. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "linear.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {

int64_t panel_columns(Isa isa) { return cpu_kernels(isa).linear.tile_n; }

int64_t packed_weight_bytes(DType dtype, Precision precision, int64_t N, int64_t K, Isa isa) {
    return divide_up(N, cpu_kernels(isa).linear.tile_n) * linear_kernel(dtype, precision, isa).panel_words(K) * 4;
}

void pack_weight_cpu(const PackWeight& op, Isa isa, int threads) {
    const auto pack = linear_kernel(op.dtype, op.precision, isa).pack;
    const int64_t panels = divide_up(op.N, cpu_kernels(isa).linear.tile_n);
    Team::share(threads, panels, [&](int64_t p) { pack(op, p, p + 1); });
}

int64_t prepared_bytes(DType dtype, Precision precision, int64_t M, int64_t K, Isa isa) {
    const LinearKernel& kernel = linear_kernel(dtype, precision, isa);
    return kernel.prepare ? divide_up(M * 4, 64) * 64 + M * kernel.prepared_stride(K) * 4 : 0;
}

void place_prepared(Linear& op, void* memory) {
    op.scales = static_cast<float*>(memory);
    op.prepared = static_cast<char*>(memory) + divide_up(op.M * 4, 64) * 64;
}

void linear_cpu(const Linear& given, Isa isa, int threads) {
    Linear op = given;
    const int64_t bytes = prepared_bytes(op.dtype, op.precision, op.M, op.K, isa);
    struct Prepared;
    if (bytes && !op.prepared) place_prepared(op, scratch<Prepared>(bytes));
    Team::run(threads, [&](Team& team) { linear_cpu(op, isa, team); });
}

void linear_cpu(const Linear& op, Isa isa, Team& team) {
    if (op.M == 0 || op.N == 0) return;
    const LinearKernel& kernel = linear_kernel(op.dtype, op.precision, isa);
    const int64_t panels = divide_up(op.N, cpu_kernels(isa).linear.tile_n);

    // A block of rows stays in the L2 cache while a task goes through its panels, and a panel while all tiles of the
    // block use it.
    const int64_t row_bytes = kernel.prepare ? kernel.prepared_stride(op.K) * 4 : op.K * (op.dtype == DType::f32 ? 4 : 2);
    const int64_t fitting = kernel.block_bytes / std::max<int64_t>(row_bytes, 4) / kernel.tile_m * kernel.tile_m;
    const int64_t block = std::max<int64_t>(fitting, 2 * kernel.tile_m);
    const int64_t blocks = divide_up(op.M, block);
    const int64_t rows = divide_up(divide_up(op.M, blocks), kernel.tile_m) * kernel.tile_m;

    // Several tasks per thread, scheduled dynamically, so that a slow core does not hold up the others. Fewer where
    // rows are few: each task waits for its first weights, which no one prefetched.
    const int64_t a_thread = op.M <= 2 * kernel.tile_m ? 4 : 8;
    const int64_t ranges = std::min(panels, divide_up(a_thread * team.size(), blocks));
    const int64_t tasks = divide_up(op.M, rows) * ranges;
    if (kernel.prepare) {
        constexpr int64_t ROWS = 8;
        team.each(divide_up(op.M, ROWS), [&](int64_t task) {
            kernel.prepare(op, task * ROWS, std::min(op.M, (task + 1) * ROWS));
        });
    }
    team.each(tasks, [&](int64_t task) {
        const int64_t first = task / ranges * rows, range = task % ranges;
        kernel.run(op, first, std::min(op.M, first + rows), panels * range / ranges, panels * (range + 1) / ranges);
    });
}

}  // namespace fastbert
