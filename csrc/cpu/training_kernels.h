// The row kernels of training that each instruction set provides. As in kernels.h: no inline function here; in the
// kernels no allocation, no threads, no exception.
#pragma once

#include "../training.h"

namespace fastbert {

// Rows [begin, end); scratch of 2 * scratch(N) floats. A block of the backward is PARTIAL_ROWS rows.
struct AddLayerNormTrainingKernels {
    int64_t (*scratch)(int64_t N);
    void (*forward_f32)(const AddLayerNormTraining& op, int64_t begin, int64_t end, float* scratch);
    void (*forward_bf16)(const AddLayerNormTraining& op, int64_t begin, int64_t end, float* scratch);
    void (*backward_f32)(const AddLayerNormBackward& op, int64_t block, float* scratch);
    void (*backward_bf16)(const AddLayerNormBackward& op, int64_t block, float* scratch);
};

struct LinearTrainingKernels {
    // Elements [begin, end).
    void (*activate_f32)(const Activate& op, int64_t begin, int64_t end);
    void (*activate_bf16)(const Activate& op, int64_t begin, int64_t end);
    // A block of PARTIAL_ROWS rows; a strip of that block has strip_columns columns.
    int64_t strip_columns;
    void (*backward_f32)(const ActivationBackward& op, int64_t block, int64_t strip);
    void (*backward_bf16)(const ActivationBackward& op, int64_t block, int64_t strip);
    // Rows [begin, end) of the source, begin even.
    void (*pack_f32)(const PackTransposed& op, int64_t begin, int64_t end);
    void (*pack_bf16)(const PackTransposed& op, int64_t begin, int64_t end);
    // Rows of dW, and panels of tile_n of its columns.
    int64_t tile_m, tile_n;
    void (*gradient_f32)(const WeightGradient& op, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                         int64_t panel_end);
    void (*gradient_bf16)(const WeightGradient& op, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                          int64_t panel_end);
    // out[n] = the sum over `blocks` of partials[block * stride + n], in order.
    void (*sum_f32)(const float* partials, int64_t blocks, int64_t stride, int64_t N, void* out);
    void (*sum_bf16)(const float* partials, int64_t blocks, int64_t stride, int64_t N, void* out);
};

// One head of one sequence, with scratch(length, D) bytes of memory, aligned to 64.
struct AttentionTrainingKernels {
    int64_t (*forward_scratch_f32)(int64_t length, int64_t D);
    int64_t (*forward_scratch_bf16)(int64_t length, int64_t D);
    int64_t (*backward_scratch_f32)(int64_t length, int64_t D);
    int64_t (*backward_scratch_bf16)(int64_t length, int64_t D);
    void (*forward_f32)(const AttentionTraining& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*forward_bf16)(const AttentionTraining& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*backward_f32)(const AttentionBackward& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*backward_bf16)(const AttentionBackward& op, int64_t start, int64_t length, int64_t head, void* memory);
};

struct TrainingKernels {
    const AddLayerNormTrainingKernels& add_layer_norm;
    const LinearTrainingKernels& linear;
    const AttentionTrainingKernels& attention;
};

#define FASTBERT_DECLARE_TRAINING_KERNELS(isa)                                \
    namespace isa {                                                           \
    extern const AddLayerNormTrainingKernels add_layer_norm_training_kernels; \
    extern const LinearTrainingKernels linear_training_kernels;               \
    extern const AttentionTrainingKernels attention_training_kernels;         \
    }
FASTBERT_DECLARE_TRAINING_KERNELS(portable)
#ifdef FASTBERT_X86
FASTBERT_DECLARE_TRAINING_KERNELS(avx2)
FASTBERT_DECLARE_TRAINING_KERNELS(avx512)
FASTBERT_DECLARE_TRAINING_KERNELS(avx512_vnni)
FASTBERT_DECLARE_TRAINING_KERNELS(avx512_bf16)
FASTBERT_DECLARE_TRAINING_KERNELS(amx)
#endif

TrainingKernels training_kernels(Isa isa);

}  // namespace fastbert
