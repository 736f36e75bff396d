// Distributes the tokens of rotary over threads. Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace fastbert {

void rotary_cpu(const Rotary& op, Isa isa, int threads) {
    Team::run(worth(threads, op.T, op.T * op.H * op.D), [&](Team& team) { rotary_cpu(op, isa, team); });
}

void rotary_cpu(const Rotary& op, Isa isa, Team& team) {
    const RotaryKernels& kernels = cpu_kernels(isa).rotary;
    const auto run = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;
    const int64_t parts = std::min<int64_t>(team.size(), op.T);
    team.each(parts, [&](int64_t part) { run(op, op.T * part / parts, op.T * (part + 1) / parts); });
}

}  // namespace fastbert
