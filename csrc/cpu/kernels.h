// The table of row kernels that each instruction set provides, and nothing else: this header is included
// by objects compiled for different instruction sets, so it must not define any inline function (the
// linker keeps one copy of those, and it might be the one with instructions the processor lacks).
#pragma once

#include "../fastbert.h"

namespace fastbert {

struct CpuKernels {
    // Rows [begin, end) of the op. No allocation, no threads, no exception.
    void (*add_layer_norm_f32)(const AddLayerNorm& op, int64_t begin, int64_t end);
    void (*add_layer_norm_bf16)(const AddLayerNorm& op, int64_t begin, int64_t end);
};

namespace portable { extern const CpuKernels kernels; }
#ifdef FASTBERT_X86
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }
#endif

// The table of one instruction set.
const CpuKernels& cpu_kernels(Isa isa);

}  // namespace fastbert
