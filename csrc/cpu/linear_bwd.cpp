// The backward of linear, distributed over threads. Compiled for the base instruction set.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "team.h"

namespace fastbert {

void activate_cpu(const Activate& op, Isa isa, int threads) {
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
    const auto run = op.dtype == DType::f32 ? kernels.activate_f32 : kernels.activate_bf16;
    constexpr int64_t PART = 8192;
    const int64_t parts = divide_up(op.n, PART);
    Team::share(worth(threads, parts, op.n), parts, [&](int64_t part) {
        run(op, part * PART, std::min(op.n, (part + 1) * PART));
    });
}

void gate_cpu(const Gate& op, Isa isa, int threads) {
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
    const auto rows = op.dtype == DType::f32 ? kernels.gate_f32 : kernels.gate_bf16;
    constexpr int64_t ROWS = 16;
    const int64_t tasks = divide_up(op.M, ROWS);
    Team::share(worth(threads, tasks, 2 * op.M * op.F), tasks, [&](int64_t task) {
        rows(op, task * ROWS, std::min(op.M, (task + 1) * ROWS));
    });
}

void activation_bwd_cpu(const ActivationBwd& op, Isa isa, int threads) {
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
    const auto run = op.dtype == DType::f32 ? kernels.backward_f32 : kernels.backward_bf16;
    const int64_t strips = divide_up(op.N, kernels.strip_columns), tasks = divide_up(op.M, PARTIAL_ROWS) * strips;
    Team::share(worth(threads, tasks, op.M * op.N), tasks, [&](int64_t task) { run(op, task / strips, task % strips); });
}

void sum_partials_cpu(const SumPartials& op, Isa isa) {
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
    (op.dtype == DType::f32 ? kernels.sum_f32 : kernels.sum_bf16)(op.partials, op.blocks, op.N, op.N, op.out);
}

// Distributed as in linear_cpu: a block of rows stays in L2 while a task goes through its panels.
void linear_dweight_cpu(const LinearDweight& op, Isa isa, int threads) {
    if (op.N == 0 || op.K == 0) return;
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
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
    const LinearBwdKernels& kernels = cpu_kernels(isa).linear_fwd_train;
    const auto run = op.dtype == DType::f32 ? kernels.pack_f32 : kernels.pack_bf16;
    constexpr int64_t PART = 64;
    PackTransposed block = op;
    const int64_t last = op.last ? op.last : op.rows, size = op.dtype == DType::f32 ? 4 : 2;
    block.source = static_cast<const char*>(op.source) - op.first * op.stride * size;
    const int64_t parts = std::max<int64_t>(1, divide_up(last - op.first, PART));
    Team::share(worth(threads, parts, (last - op.first) * op.N), parts, [&](int64_t part) {
        run(block, op.first + part * PART, std::min(last, op.first + (part + 1) * PART));
    });
}

namespace {

// Offsets of the parts of linear_bwd_cpu's workspace.
struct BwdParts {
    int64_t per_word, chunk, inner, stride_dzt, dz, dzt, packed_x, sums, partials, bytes;

    BwdParts(const LinearBwd& op, Isa isa) {
        const bool wide = op.dtype == DType::f32;
        const int64_t size = wide ? 4 : 2;
        per_word = 4 / size;
        chunk = std::min(op.M, op.chunk_words * per_word);
        inner = even(op.N);
        stride_dzt = even(chunk) + 64 / size;
        bytes = 0;
        dz = take(op.dx && !reads_dy(op) ? chunk * inner * size : 0);
        dzt = take(op.dweight ? op.N * stride_dzt * size : 0);
        packed_x = take(op.dweight ? packed_weight_bytes(op.dtype, Precision::full, op.K, even(chunk), isa) : 0);
        sums = take(op.dweight && chunk < op.M && !wide ? op.N * op.K * 4 : 0);
        partials = take(op.dbias ? divide_up(op.M, PARTIAL_ROWS) * op.N * 4 : 0);
    }

    int64_t even(int64_t n) const { return divide_up(n, per_word) * per_word; }

    // True if dz is dy, and dy's strides and alignment allow a product to read it in place.
    bool reads_dy(const LinearBwd& op) const {
        return op.activation == Activation::none && op.N % per_word == 0 && op.stride_dym % per_word == 0 &&
               reinterpret_cast<uintptr_t>(op.dy) % 4 == 0;
    }

   private:
    int64_t take(int64_t size) {
        const int64_t start = bytes;
        bytes += divide_up(size, 64) * 64;
        return start;
    }
};

}  // namespace

int64_t linear_bwd_workspace_bytes(const LinearBwd& op, Isa isa) { return BwdParts(op, isa).bytes; }

void linear_bwd_cpu(const LinearBwd& op, Isa isa, int threads) {
    const BwdParts parts(op, isa);
    const bool wide = op.dtype == DType::f32, direct = parts.reads_dy(op);
    const int64_t size = wide ? 4 : 2, chunk = std::max<int64_t>(parts.chunk, 1);
    char* const workspace = static_cast<char*>(op.workspace);
    float* const partials = op.dbias ? reinterpret_cast<float*>(workspace + parts.partials) : nullptr;
    char* const dz = op.dx && !direct ? workspace + parts.dz : nullptr;
    char* const dzt = op.dweight ? workspace + parts.dzt : nullptr;
    if (op.dweight && op.M == 0) std::memset(op.dweight, 0, op.N * op.K * size);
    for (int64_t start = 0; start < op.M; start += chunk) {
        const int64_t rows = std::min(chunk, op.M - start), tokens = parts.even(rows);
        const char* dy = static_cast<const char*>(op.dy) + start * op.stride_dym * size;
        const char* x = static_cast<const char*>(op.x) + start * op.stride_xm * size;
        if (!direct || op.dweight || op.dbias) {
            const char* saved = op.saved ? static_cast<const char*>(op.saved) + start * op.stride_sm * size : nullptr;
            float* sums = partials ? partials + start / PARTIAL_ROWS * op.N : nullptr;
            activation_bwd_cpu({op.dtype, rows, op.N, dy, saved, dz, dzt, sums, op.stride_dym, op.stride_sm,
                                     parts.inner, parts.stride_dzt, op.activation}, isa, threads);
        }
        if (op.dx) {
            char* dx = static_cast<char*>(op.dx) + start * op.K * size;
            linear_cpu({op.dtype, rows, op.K, parts.inner, dz ? dz : dy, op.packed, dx, dz ? parts.inner : op.stride_dym,
                        op.K, Activation::none, Precision::full, nullptr, nullptr}, isa, threads);
        }
        if (op.dweight) {
            void* packed_x = workspace + parts.packed_x;
            pack_transposed_cpu({op.dtype, op.K, tokens, x, packed_x, rows, op.stride_xm}, isa, threads);
            auto* sums = static_cast<float*>(wide ? op.dweight : workspace + parts.sums);
            linear_dweight_cpu({op.dtype, op.N, op.K, tokens, dzt, packed_x, sums, op.dweight, parts.stride_dzt,
                                 start == 0, start + rows == op.M}, isa, threads);
        }
    }
    if (op.dbias) sum_partials_cpu({op.dtype, divide_up(op.M, PARTIAL_ROWS), op.N, partials, op.dbias}, isa);
}

}  // namespace fastbert
