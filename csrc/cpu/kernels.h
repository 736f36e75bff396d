// The table of row kernels that each instruction set provides, and nothing else. This header is included by objects
// compiled for different instruction sets, so it must not define an inline function: the linker keeps one copy of it,
// which might contain instructions the processor lacks.
#pragma once

#include "bwd.h"

namespace fastbert {

// Rows [begin, end) of the op. Here and below: no allocation, no threads, no exception.
struct AddLayerNormKernels {
    void (*f32)(const AddLayerNorm& op, int64_t begin, int64_t end);
    void (*bf16)(const AddLayerNorm& op, int64_t begin, int64_t end);
};

// linear of one dtype and precision. A packed weight is panels of tile_n columns; rows go tile_m at a time.
struct LinearKernel {
    int64_t tile_m;
    int64_t block_rows, block_bytes;  // block of x that reuses a cached weight: its rows, its most bytes
    int64_t (*panel_words)(int64_t K);
    int64_t (*prepared_stride)(int64_t K);  // words from one prepared row to the next
    void (*pack)(const PackWeight& op, int64_t panel_begin, int64_t panel_end);
    void (*prepare)(const Linear& op, int64_t row_begin, int64_t row_end);  // null where x is read as it is
    void (*run)(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
struct LinearKernels {
    int64_t tile_n;
    LinearKernel kernels[2][4];  // [f32 or bf16][Precision]
    bool widens_bf16;            // to fp32: it has no products of pairs
    const LinearKernel* wide;    // the same for an instruction set that has them, from the same panels; or null
};

// The queries [first, last) of one head, counted from row `start`, among the `keys` keys from there on: all that they
// see, and no others of a sequence.
struct HeadSpan {
    int64_t start, keys, first, last, head;
};

// With scratch(keys, D) bytes of memory, aligned to 64.
struct AttentionKernels {
    int64_t (*scratch_f32)(int64_t keys, int64_t D);
    int64_t (*scratch_bf16)(int64_t keys, int64_t D);
    void (*f32)(const Attention& op, const HeadSpan& span, void* memory);
    void (*bf16)(const Attention& op, const HeadSpan& span, void* memory);
};

// Rows [begin, end).
struct RotaryKernels {
    void (*f32)(const Rotary& op, int64_t begin, int64_t end);
    void (*bf16)(const Rotary& op, int64_t begin, int64_t end);
};

// out[n] = the sum of column n over the fp32 rows order[0], order[1], ...; rows 0, 1, ... if order is null.
struct SumRows {
    const float* rows;
    int64_t stride;
    const int64_t* order;  // (count,) or null
    int64_t count;
    void* out;
};

// Scratch: `sums` and `units` are N floats per thread; `dsums` is (M, N) for all rows. `dweight` and `dbias`, N floats
// each, receive the sums over rows [begin, end).
struct EmbedLayerNormKernels {
    void (*f32)(const EmbedLayerNorm& op, int64_t begin, int64_t end, float* sums);
    void (*bf16)(const EmbedLayerNorm& op, int64_t begin, int64_t end, float* sums);
    void (*backward_f32)(const EmbedLayerNormBwd& op, int64_t begin, int64_t end, float* dsums, float* units,
                         float* dweight, float* dbias);
    void (*backward_bf16)(const EmbedLayerNormBwd& op, int64_t begin, int64_t end, float* dsums, float* units,
                          float* dweight, float* dbias);
    void (*sum_rows_f32)(const SumRows& op, int64_t column_begin, int64_t column_end);
    void (*sum_rows_bf16)(const SumRows& op, int64_t column_begin, int64_t column_end);
};

// [begin, end) are rows of the vocabulary; for `combine`, tokens.
struct CrossEntropyKernels {
    void (*statistics_f32)(const CrossEntropy& op, int64_t begin, int64_t end, float* top, float* total);
    void (*statistics_bf16)(const CrossEntropy& op, int64_t begin, int64_t end, float* top, float* total);
    void (*combine)(const float* partial, int64_t count, int64_t K, float* row_max, float* total, int64_t begin,
                    int64_t end);
    void (*gradient_f32)(const CrossEntropy& op, int64_t begin, int64_t end);
    void (*gradient_bf16)(const CrossEntropy& op, int64_t begin, int64_t end);
};

// Each returns the operations done in `rounds` rounds, or the bytes read.
struct PeakKernels {
    double (*f32)(int64_t rounds);
    double (*bf16)(int64_t rounds);
    double (*int8)(int64_t rounds);
    double (*read)(const float* memory, int64_t count);
};

// Rows [begin, end); scratch of 2 * scratch(N) floats. A block of the backward is PARTIAL_ROWS rows.
struct AddLayerNormBwdKernels {
    int64_t (*scratch)(int64_t N);
    void (*forward_f32)(const AddLayerNormFwdTrain& op, int64_t begin, int64_t end, float* scratch);
    void (*forward_bf16)(const AddLayerNormFwdTrain& op, int64_t begin, int64_t end, float* scratch);
    void (*backward_f32)(const AddLayerNormBwd& op, int64_t block, float* scratch);
    void (*backward_bf16)(const AddLayerNormBwd& op, int64_t block, float* scratch);
};

struct LinearBwdKernels {
    // Elements [begin, end).
    void (*activate_f32)(const Activate& op, int64_t begin, int64_t end);
    void (*activate_bf16)(const Activate& op, int64_t begin, int64_t end);
    // Rows [begin, end).
    void (*gate_f32)(const Gate& op, int64_t begin, int64_t end);
    void (*gate_bf16)(const Gate& op, int64_t begin, int64_t end);
    // A block of PARTIAL_ROWS rows; a strip of that block has strip_columns columns.
    int64_t strip_columns;
    void (*backward_f32)(const ActivationBwd& op, int64_t block, int64_t strip);
    void (*backward_bf16)(const ActivationBwd& op, int64_t block, int64_t strip);
    // Rows [begin, end) of the source, begin even.
    void (*pack_f32)(const PackTransposed& op, int64_t begin, int64_t end);
    void (*pack_bf16)(const PackTransposed& op, int64_t begin, int64_t end);
    // Rows of dW, and panels of tile_n of its columns.
    int64_t tile_m, tile_n;
    void (*gradient_f32)(const LinearDweight& op, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                         int64_t panel_end);
    void (*gradient_bf16)(const LinearDweight& op, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                          int64_t panel_end);
    // out[n] = the sum over `blocks` of partials[block * stride + n], in order.
    void (*sum_f32)(const float* partials, int64_t blocks, int64_t stride, int64_t N, void* out);
    void (*sum_bf16)(const float* partials, int64_t blocks, int64_t stride, int64_t N, void* out);
};

// One head of one sequence, with scratch(length, D) bytes of memory, aligned to 64.
struct AttentionBwdKernels {
    int64_t (*forward_scratch_f32)(int64_t length, int64_t D);
    int64_t (*forward_scratch_bf16)(int64_t length, int64_t D);
    int64_t (*backward_scratch_f32)(int64_t length, int64_t D);
    int64_t (*backward_scratch_bf16)(int64_t length, int64_t D);
    void (*forward_f32)(const AttentionFwdTrain& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*forward_bf16)(const AttentionFwdTrain& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*backward_f32)(const AttentionBwd& op, int64_t start, int64_t length, int64_t head, void* memory);
    void (*backward_bf16)(const AttentionBwd& op, int64_t start, int64_t length, int64_t head, void* memory);
};

struct CpuKernels {
    const AddLayerNormKernels& add_layer_norm;
    const LinearKernels& linear;
    const AttentionKernels& attention;
    const EmbedLayerNormKernels& embed_layer_norm;
    const CrossEntropyKernels& cross_entropy;
    const PeakKernels& peak;
    const AddLayerNormBwdKernels& add_layer_norm_fwd_train;
    const LinearBwdKernels& linear_fwd_train;
    const AttentionBwdKernels& attention_fwd_train;
    const RotaryKernels& rotary;
};

#define FASTBERT_DECLARE_KERNELS(isa)                                         \
    namespace isa {                                                           \
    extern const AddLayerNormKernels add_layer_norm_kernels;                  \
    extern const LinearKernels linear_kernels;                                \
    extern const AttentionKernels attention_kernels;                          \
    extern const EmbedLayerNormKernels embed_layer_norm_kernels;              \
    extern const CrossEntropyKernels cross_entropy_kernels;                   \
    extern const PeakKernels peak_kernels;                                    \
    extern const AddLayerNormBwdKernels add_layer_norm_fwd_train_kernels; \
    extern const LinearBwdKernels linear_fwd_train_kernels;               \
    extern const AttentionBwdKernels attention_fwd_train_kernels;         \
    extern const RotaryKernels rotary_kernels;                            \
    }
FASTBERT_DECLARE_KERNELS(portable)
#ifdef FASTBERT_X86
FASTBERT_DECLARE_KERNELS(avx2)
FASTBERT_DECLARE_KERNELS(avx512)
FASTBERT_DECLARE_KERNELS(avx512_vnni)
FASTBERT_DECLARE_KERNELS(avx512_bf16)
FASTBERT_DECLARE_KERNELS(amx)
#endif
#ifdef FASTBERT_ARM
FASTBERT_DECLARE_KERNELS(neon)
FASTBERT_DECLARE_KERNELS(neon_dot)
FASTBERT_DECLARE_KERNELS(neon_bf16)
#endif

#ifdef FASTBERT_AMX_EMULATION
// Defined in tests/amx_emulation.cpp. From this call on, the AMX instructions that the kernels use are emulated,
// slowly, on a processor without them, until another handler takes SIGILL (faulthandler installs one: enable it
// before).
void emulate_amx();
#endif

// The kernel table of an instruction set. The first call for amx_emulated starts the emulation.
const CpuKernels& cpu_kernels(Isa isa);

}  // namespace fastbert
