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

// A packed weight is panels of tile_n columns; rows go tile_m at a time.
struct LinearKernels {
    int64_t tile_m, tile_n;
    void (*pack_f32)(const PackWeight& op, int64_t panel_begin, int64_t panel_end);
    void (*pack_bf16)(const PackWeight& op, int64_t panel_begin, int64_t panel_end);
    void (*f32)(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
    void (*bf16)(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};

// One head of the sequence of `length` tokens from `start`, with scratch(length, D) bytes of memory, aligned to 64.
struct AttentionKernels {
    int64_t (*scratch_f32)(int64_t length, int64_t D);
    int64_t (*scratch_bf16)(int64_t length, int64_t D);
    void (*f32)(const Attention& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*bf16)(const Attention& op, int64_t start, int64_t length, int64_t head, void* memory);
};

// The operations done in so many rounds, or the bytes read; null where the instruction set has none for it.
struct PeakKernels {
    double (*f32)(int64_t rounds);
    double (*bf16)(int64_t rounds);
    double (*int8)(int64_t rounds);
    double (*int8_vnni)(int64_t rounds);  // on processors with VNNI only
    double (*read)(const float* memory, int64_t count);
};

struct CpuKernels {
    const AddLayerNormKernels& add_layer_norm;
    const LinearKernels& linear;
    const AttentionKernels& attention;
    const PeakKernels& peak;
};

#define FASTBERT_DECLARE_KERNELS(isa)                       \
    namespace isa {                                         \
    extern const AddLayerNormKernels add_layer_norm_kernels; \
    extern const LinearKernels linear_kernels;              \
    extern const AttentionKernels attention_kernels;        \
    extern const PeakKernels peak_kernels;                  \
    }
FASTBERT_DECLARE_KERNELS(portable)
#ifdef FASTBERT_X86
FASTBERT_DECLARE_KERNELS(avx2)
FASTBERT_DECLARE_KERNELS(avx512)
FASTBERT_DECLARE_KERNELS(avx512_bf16)
#endif

// The table of one instruction set.
const CpuKernels& cpu_kernels(Isa isa);

}  // namespace fastbert
