// Distributes attention over threads: a task is some neighbouring heads of one sequence, whose rows lie side by side, or
// of a part of it. Compiled for the base instruction set.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {
namespace {

// With a window, a long sequence goes so many queries at a time: what they see stays in the caches.
constexpr int64_t PART = 1024;

// The most keys that a query of such a sequence sees.
int64_t seen(const Attention& op, int64_t length) {
    return op.window < 0 ? length : std::min(length, 2 * op.window + 1);
}

// The spans of a windowed op, for head 0.
std::vector<HeadSpan> parts_of(const Attention& op) {
    std::vector<HeadSpan> parts;
    for (int64_t b = 0; b < op.B; ++b) {
        const int64_t start = op.cu_seqlens[b], length = op.cu_seqlens[b + 1] - start;
        for (int64_t first = 0; first < length; first += PART) {
            const int64_t last = std::min(length, first + PART);
            const int64_t begin = std::max<int64_t>(0, first - op.window), end = std::min(length, last + op.window);
            parts.push_back({start + begin, end - begin, first - begin, last - begin, 0});
        }
    }
    return parts;
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
    if (!longest) return;
    const std::vector<HeadSpan> parts = op.window < 0 ? std::vector<HeadSpan>() : parts_of(op);
    int64_t most_keys = op.window < 0 ? longest : 0;
    for (const HeadSpan& part : parts) most_keys = std::max(most_keys, part.keys);
    struct HeadMemory;
    void* memory = scratch<HeadMemory>((wide ? kernels.scratch_f32 : kernels.scratch_bf16)(most_keys, op.D));  // this thread's
    // Heads per task: in the longest sequence, at most an eighth of a thread's share of the work.
    const int64_t largest = op.window < 0 ? longest : std::min(longest, PART);
    const int64_t most = op.H * work / (8 * team.size() * largest * seen(op, longest));
    const int64_t group = std::max<int64_t>(1, std::min(op.H, most));
    const int64_t groups = divide_up(op.H, group), spans = op.window < 0 ? op.B : static_cast<int64_t>(parts.size());
    team.each(spans * groups, [&](int64_t task) {
        HeadSpan span;
        if (op.window < 0) {
            const int64_t b = task / groups, start = op.cu_seqlens[b], length = op.cu_seqlens[b + 1] - start;
            span = {start, length, 0, length, 0};
        } else {
            span = parts[task / groups];
        }
        const int64_t first = task % groups * group;
        for (span.head = first; span.keys > 0 && span.head < std::min(first + group, op.H); ++span.head)
            run(op, span, memory);
    });
}

}  // namespace fastbert
