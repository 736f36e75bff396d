// Training on CPU: forward passes that save what the backward needs, and the backward passes. dtype is f32 or bf16;
// `isa` is one of supported_isas(). At most `threads` threads run; their number changes no bit of a result.
#pragma once

#include "fastbert.h"

namespace fastbert {

// y = LayerNorm(dropout(x) + residual) * weight + bias; residual, mean and rstd may be null.
struct AddLayerNormFwdTrain {
    AddLayerNorm op;
    Dropout dropout;
    float* mean;  // (M,)
    float* rstd;  // (M,)
};

// dresidual is the gradient of dropout(x) + residual, dx that of x; any output may be null.
struct AddLayerNormBwd {
    AddLayerNorm op;  // its x, residual and weight; y and bias are not read
    Dropout dropout;
    const float* mean;
    const float* rstd;
    const void* dy;   // (M, N)
    void* dx;         // (M, N), contiguous, as is dresidual
    void* dresidual;  // (M, N)
    void* dweight;    // (N,)
    void* dbias;      // (N,)
    float* partials;  // (blocks of PARTIAL_ROWS rows, 2, N): workspace for dweight and dbias
    int64_t stride_dym;
    const void* dsum = nullptr;  // (M, N): the gradient of op.sum, or null
    int64_t stride_dsm = 0;
};

// Rows per block: sums over rows are taken within blocks, then over the blocks in order.
constexpr int64_t PARTIAL_ROWS = 64;

// y = activation(x), elementwise over n contiguous elements.
struct Activate {
    DType dtype;
    int64_t n;
    const void* x;
    void* y;
    Activation activation;
};

// y = activation(a) b, z = (a, b); or, given dy, dz. All contiguous.
struct Gate {
    DType dtype;
    int64_t M, F;
    const void* z;   // (M, 2 F)
    const void* dy;  // (M, F) or null
    void* out;       // y (M, F), or dz (M, 2 F) if dy is given
    Activation activation;
};

// dz = dy * activation'(z), its transpose, and its sums over blocks of PARTIAL_ROWS rows; any output may be null.
struct ActivationBwd {
    DType dtype;
    int64_t M, N;
    const void* dy;     // (M, N)
    const void* saved;  // (M, N): z, or for relu and tanh activation(z); not read for none
    void* dz;           // (M, stride_dz): columns from N on are set to zero
    void* dzt;          // (N, stride_dzt): columns from M on are set to zero
    float* partials;    // (blocks, N)
    int64_t stride_dym, stride_sm, stride_dz, stride_dzt;
    Activation activation;
};

// out = the sum over blocks of partials, in order.
struct SumPartials {
    DType dtype;
    int64_t blocks, N;
    const float* partials;  // (blocks, N)
    void* out;              // (N,)
};

// Packs the transpose of a matrix as pack_weight_cpu packs a weight (N, K), without a bias.
struct PackTransposed {
    DType dtype;
    int64_t N, K;
    const void* source;  // (rows, N), rows <= K; rows from there to K count as zero
    void* packed;        // packed_weight_bytes(dtype, N, K, isa) bytes, aligned to 64
    int64_t rows, stride;
    int64_t first = 0, last = 0;  // source holds rows [first, last), even in bf16; last 0: all rows
};

// dW += dz^T x over a chunk of tokens. The running sum is fp32, in `sums`, which in fp32 may be dweight itself. The
// first chunk does not read it; the last writes dweight.
struct LinearDweight {
    DType dtype;
    int64_t N, K, tokens;  // tokens even in bf16
    const void* dzt;       // (N, tokens)
    const void* packed;    // x (tokens, K), by pack_transposed_cpu
    float* sums;           // (N, K); may be null where first and last
    void* dweight;         // (N, K)
    int64_t stride_dzt;
    bool first, last;
};

// The gradients of linear: with dz = dy * activation'(z), dx = dz W, dweight = dz^T x, dbias = the sum of dz over rows.
// Any of the three may be null.
struct LinearBwd {
    DType dtype;
    int64_t M, N, K;
    const void* dy;      // (M, N)
    const void* x;       // (M, K)
    const void* saved;   // (M, N), as in ActivationBwd
    const void* packed;  // weight^T (K, inner), by pack_transposed_cpu, inner = N rounded up to even in bf16; for dx
    void* dx;            // (M, K), contiguous, as is dweight
    void* dweight;       // (N, K)
    void* dbias;         // (N,)
    void* workspace;     // linear_bwd_workspace_bytes bytes, aligned to 64
    int64_t chunk_words;  // tokens per chunk, in words of one fp32 or two bf16
    int64_t stride_dym, stride_xm, stride_sm;
    Activation activation;
};

// Attention with dropout of the probabilities. Mask row (h << 40) + t belongs to token t in head h; columns are the keys
// of its sequence.
struct AttentionFwdTrain {
    Attention op;
    Dropout dropout;
    int64_t T;
    // (2, H, T) or null: each query's largest score, 1 / sum of 2^(scale_log2 (score - largest)). With a bias, scores are
    // scaled and have it.
    float* row_max;
};

struct AttentionBwd {
    Attention op;  // its y is the forward's result
    Dropout dropout;
    int64_t T;
    const float* row_max;  // (2, H, T), from the forward
    const void* dy;        // (T, H, D), contiguous
    void* dqkv;            // (T, 3, H, D), contiguous
    // With a bias: its gradient (H, 2 reach - 1), and (H, 2 T) for those of each sequence, which are summed in order.
    float* dbias = nullptr;
    float* dbias_parts = nullptr;
};

void add_layer_norm_fwd_train_cpu(const AddLayerNormFwdTrain& op, Isa isa, int threads);
void add_layer_norm_bwd_cpu(const AddLayerNormBwd& op, Isa isa, int threads);
void activate_cpu(const Activate& op, Isa isa, int threads);
void gate_cpu(const Gate& op, Isa isa, int threads);
void activation_bwd_cpu(const ActivationBwd& op, Isa isa, int threads);
void sum_partials_cpu(const SumPartials& op, Isa isa);
void linear_dweight_cpu(const LinearDweight& op, Isa isa, int threads);
void pack_transposed_cpu(const PackTransposed& op, Isa isa, int threads);
int64_t linear_bwd_workspace_bytes(const LinearBwd& op, Isa isa);
void linear_bwd_cpu(const LinearBwd& op, Isa isa, int threads);
void attention_fwd_train_cpu(const AttentionFwdTrain& op, Isa isa, int threads);
void attention_bwd_cpu(const AttentionBwd& op, Isa isa, int threads);

}  // namespace fastbert
