// The table of row kernels that each instruction set provides, and nothing else: this header is included
// by objects compiled for different instruction sets, so it must not define any inline function (the
// linker keeps one copy of those, and it might be the one with instructions the processor lacks).
#pragma once

#include "../fastbert.h"

namespace fastbert {

// Rows [begin, end) of the op. Here and below: no allocation, no threads, no exception.
struct AddLayerNormKernels {
    void (*f32)(const AddLayerNorm& op, int64_t begin, int64_t end);
    void (*bf16)(const AddLayerNorm& op, int64_t begin, int64_t end);
};

// linear of one dtype and precision. A packed weight is panels of tile_n columns; rows go tile_m at a time.
struct LinearKernel {
    int64_t tile_m;
    int64_t (*panel_words)(int64_t K);
    int64_t (*prepared_stride)(int64_t K);  // words from one prepared row to the next
    void (*pack)(const PackWeight& op, int64_t panel_begin, int64_t panel_end);
    void (*prepare)(const Linear& op, int64_t row_begin, int64_t row_end);  // null where x is read as it is
    void (*run)(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
struct LinearKernels {
    int64_t tile_n;
    LinearKernel kernels[2][4];  // by f32 or bf16, and Precision
};

// One head of the sequence of `length` tokens from `start`, with scratch(length, D) bytes of memory, aligned to 64.
struct AttentionKernels {
    int64_t (*scratch_f32)(int64_t length, int64_t D);
    int64_t (*scratch_bf16)(int64_t length, int64_t D);
    void (*f32)(const Attention& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*bf16)(const Attention& op, int64_t start, int64_t length, int64_t head, void* memory);
};

struct CpuKernels {
    const AddLayerNormKernels& add_layer_norm;
    const LinearKernels& linear;
    const AttentionKernels& attention;
};

#define FASTBERT_DECLARE_KERNELS(isa)                       \
    namespace isa {                                         \
    extern const AddLayerNormKernels add_layer_norm_kernels; \
    extern const LinearKernels linear_kernels;              \
    extern const AttentionKernels attention_kernels;        \
    }
FASTBERT_DECLARE_KERNELS(portable)
#ifdef FASTBERT_X86
FASTBERT_DECLARE_KERNELS(avx2)
FASTBERT_DECLARE_KERNELS(avx512)
FASTBERT_DECLARE_KERNELS(avx512_vnni)
FASTBERT_DECLARE_KERNELS(avx512_bf16)
FASTBERT_DECLARE_KERNELS(amx)
FASTBERT_DECLARE_KERNELS(amx_emulated)
#endif

// The table of one instruction set.
const CpuKernels& cpu_kernels(Isa isa);

}  // namespace fastbert
