// Shares what surrounds the products of linear's backward out over threads. Compiled for the base instruction set.
#include <algorithm>

#include "training_kernels.h"

namespace fastbert {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Waking a thread costs some microseconds, the time of about 16 thousand elements.
int team(int threads, int64_t elements) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, elements / 16384 + 1)));
}

}  // namespace

void activate_cpu(const Activate& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = training_kernels(isa).linear;
    const auto run = op.dtype == DType::f32 ? kernels.activate_f32 : kernels.activate_bf16;
    constexpr int64_t PART = 8192;
#pragma omp parallel for num_threads(team(threads, op.n)) schedule(dynamic)
    for (int64_t part = 0; part < divide_up(op.n, PART); ++part)
        run(op, part * PART, std::min(op.n, (part + 1) * PART));
}

void activation_backward_cpu(const ActivationBackward& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = training_kernels(isa).linear;
    const bool wide = op.dtype == DType::f32;
    const auto run = wide ? kernels.backward_f32 : kernels.backward_bf16;
    const int64_t blocks = divide_up(op.M, PARTIAL_ROWS), strips = divide_up(op.N, kernels.strip_columns);
#pragma omp parallel for num_threads(team(threads, op.M * op.N)) schedule(dynamic)
    for (int64_t task = 0; task < blocks * strips; ++task) run(op, task / strips, task % strips);
    const auto sum = wide ? kernels.sum_f32 : kernels.sum_bf16;
    if (op.dbias) sum(op.partials, blocks, op.N, op.N, op.dbias);
}

void pack_transposed_cpu(const PackTransposed& op, Isa isa, int threads) {
    const LinearTrainingKernels& kernels = training_kernels(isa).linear;
    const auto run = op.dtype == DType::f32 ? kernels.pack_f32 : kernels.pack_bf16;
    constexpr int64_t PART = 64;
    const int64_t parts = std::max<int64_t>(1, divide_up(op.rows, PART));
#pragma omp parallel for num_threads(team(threads, op.rows * op.N)) schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) run(op, part * PART, std::min(op.rows, (part + 1) * PART));
}

}  // namespace fastbert
