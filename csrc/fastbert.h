// Everything the library offers to C++: plain pointers, sizes, strides (in elements) and a stream.
// Nothing here knows torch or Python. The caller owns every buffer.
#pragma once

#include <cstdint>
#include <vector>

namespace fastbert {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Instruction sets with an object of their own, best first. A list of these is a list of choices. The last is `amx` with
// its tiles in plain C++, for tests on processors that have none.
enum class Isa : int {
    amx = 0, avx512_bf16 = 1, avx512_vnni = 2, avx512 = 3, avx2 = 4, portable = 5, amx_emulated = 6
};
constexpr int ISAS = 7;

// How the operands of a product are multiplied: as they are; as bytes, x rounded by a scale a row and the weight by a
// scale a column; or, where AMX makes it faster, fp32 as two or three pieces of bf16.
enum class Precision : int { full = 0, int8 = 1, high = 2, highest = 3 };

// y = LayerNorm(x + residual) * weight + bias, over rows of N; residual may be null.
// x, residual, weight, bias and y share one dtype; columns are contiguous; statistics are fp32.
struct AddLayerNorm {
    DType dtype;
    int64_t M, N;
    const void* x;         // (M, N)
    const void* residual;  // (M, N) or null
    const void* weight;    // (N,)
    const void* bias;      // (N,)
    void* y;               // (M, N)
    int64_t stride_xm, stride_rm, stride_ym;
    float eps;
};

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4, tanh = 5 };

// A weight and its bias, rearranged for `linear` of one instruction set and precision: see packed_weight_bytes.
struct PackWeight {
    DType dtype;
    int64_t N, K;
    const void* weight;  // (N, K)
    const void* bias;    // (N,) or null
    void* packed;        // packed_weight_bytes bytes, aligned to 64
    int64_t stride_wn;
    Precision precision;
};

// y = activation(x weight^T + bias); sums in fp32, those of bytes in int32. At full precision, bf16 wants K and the
// row strides even.
struct Linear {
    DType dtype;
    int64_t M, N, K;
    const void* x;       // (M, K)
    const void* packed;  // made by pack_weight_cpu for the same instruction set and precision
    void* y;             // (M, N)
    int64_t stride_xm, stride_ym;
    Activation activation;
    Precision precision;
    void* prepared;      // what linear_cpu makes of x: leave these two null
    float* scales;
};

// y = softmax(scale q k^T) v within each sequence; scores, softmax and sums in fp32. bf16 wants D and the
// token stride even.
struct Attention {
    DType dtype;
    int64_t B, H, D;
    const void* qkv;            // (T, 3, H, D), the last two dimensions contiguous
    const int32_t* cu_seqlens;  // (B + 1,)
    void* y;                    // (T, H, D), contiguous
    int64_t stride_t, stride_3;
    float scale_log2;           // scale * log2(e), positive
};

// One layer of an encoder: packed weights with their biases, and the vectors of its two norms, (E,).
struct EncoderLayer {
    const void *qkv, *out, *up, *down;  // (3E, E), (E, E), (F, E), (E, F), made by pack_weight_cpu
    const void *attention_norm_weight, *attention_norm_bias, *norm_weight, *norm_bias;
    int64_t F;
};

// All layers over packed tokens; x and y (T, E) are contiguous and apart.
struct Encoder {
    DType dtype;
    Precision precision;
    Activation activation;
    int64_t T, E, H, B, L;
    const int32_t* cu_seqlens;   // (B + 1,)
    const EncoderLayer* layers;  // (L,)
    const void* x;
    void* y;
    void* workspace;             // encoder_workspace_bytes bytes, aligned to 64
    float eps, scale_log2;
};

// ---- CPU ----

const char* isa_name(Isa isa);

// The instruction sets this processor and this build have, best first; `portable` is always the last.
std::vector<Isa> supported_isas();

// Names of the processor features the choice rests on, those present only.
std::vector<const char*> cpu_features();

// dtype f32 or bf16; `isa` must be one of supported_isas(). At most `threads` threads.
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads);

int64_t packed_weight_bytes(DType dtype, Precision precision, int64_t N, int64_t K, Isa isa);
void pack_weight_cpu(const PackWeight& op, Isa isa, int threads);
void linear_cpu(const Linear& op, Isa isa, int threads);
void attention_cpu(const Attention& op, Isa isa, int threads);
int64_t encoder_workspace_bytes(const Encoder& op, Isa isa, int threads);
void encoder_cpu(const Encoder& op, Isa isa, int threads);

// ---- CUDA: declared always, defined where the build found nvcc (FASTBERT_HAS_CUDA) ----

// dtype f32, f16 or bf16; pointers on `device`; `stream` is a cudaStream_t. Launches and returns at once:
// 0, or the code of a cudaError_t.
int add_layer_norm_cuda(const AddLayerNorm& op, int device, void* stream);

const char* cuda_error_string(int code);

}  // namespace fastbert
