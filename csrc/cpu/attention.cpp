// Shares attention out over threads: a task is some heads of a sequence, neighbours, whose rows lie side by side. Compiled
// for the base instruction set.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {

namespace {

void zero_rows(const Attention& op, int64_t first, int64_t end) {
    const int64_t bytes = op.H * op.D * (op.dtype == DType::f32 ? 4 : 2);
    if (end > first) std::memset(static_cast<char*>(op.y) + first * bytes, 0, (end - first) * bytes);
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
        work += length * length;
    }
    const int64_t bytes = (wide ? kernels.scratch_f32 : kernels.scratch_bf16)(longest, op.D);
    struct HeadMemory;
    void* memory = scratch<HeadMemory>(bytes);  // this thread's
    // Of the longest sequence so many that they are an eighth of a thread's share, or less.
    const int64_t most = longest ? op.H * work / (8 * team.size() * longest * longest) : 0;
    const int64_t group = std::max<int64_t>(1, std::min(op.H, most));
    const int64_t groups = (op.H + group - 1) / group;
    const int64_t tasks = longest ? op.B * groups : 0;
    team.each(tasks + 1, [&](int64_t task) {
        if (task == tasks) {
            zero_rows(op, 0, op.cu_seqlens[0]);
            zero_rows(op, op.cu_seqlens[op.B], op.T);
            return;
        }
        const int64_t b = task / groups, first = task % groups * group, start = op.cu_seqlens[b];
        const int64_t length = op.cu_seqlens[b + 1] - start;
        for (int64_t head = first; length > 0 && head < std::min(first + group, op.H); ++head)
            run(op, start, length, head, memory);
    });
}

}  // namespace fastbert
