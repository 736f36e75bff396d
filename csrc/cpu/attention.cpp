// Distributes attention over threads: a task is some neighbouring heads of one sequence, whose rows lie side by side.
// Compiled for the base instruction set.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {

namespace {

// The most keys that a query of such a sequence sees.
int64_t seen(const Attention& op, int64_t length) {
    return op.window < 0 ? length : std::min(length, 2 * op.window + 1);
}

}  // namespace

void attention_cpu(const Attention& op, Isa isa, int threads) {
    Team::run(threads, [&](Team& team) { attention_cpu(op, isa, team); });
}

void attention_cpu(const Attention& op, Isa isa, Team& team) {
    const AttentionKernels& kernels = cpu_kernels(isa).attention;
    const bool wide = op.dtype == DType::f32;
    const auto run = wide ? kernels.f32 : kernels.bf16;
    int64_t longest = 0, work = 0;
    for (int64_t b = 0; b < op.B; ++b) {
        const int64_t length = op.cu_seqlens[b + 1] - op.cu_seqlens[b];
        longest = std::max(longest, length);
        work += length * seen(op, length);
    }
    const int64_t bytes = (wide ? kernels.scratch_f32 : kernels.scratch_bf16)(longest, op.D);
    struct HeadMemory;
    void* memory = scratch<HeadMemory>(bytes);  // this thread's
    // Heads per task: in the longest sequence, at most an eighth of a thread's share of the work.
    const int64_t most = longest ? op.H * work / (8 * team.size() * longest * seen(op, longest)) : 0;
    const int64_t group = std::max<int64_t>(1, std::min(op.H, most));
    const int64_t groups = divide_up(op.H, group);
    team.each(longest ? op.B * groups : 0, [&](int64_t task) {
        const int64_t b = task / groups, first = task % groups * group, start = op.cu_seqlens[b];
        const int64_t length = op.cu_seqlens[b + 1] - start;
        for (int64_t head = first; length > 0 && head < std::min(first + group, op.H); ++head)
            run(op, start, length, head, memory);
    });
}

}  // namespace fastbert
