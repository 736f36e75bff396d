// Everything the library offers to C++: plain pointers, sizes, strides (in elements) and a stream.
// Nothing here knows torch or Python. The caller owns every buffer.
#pragma once

#include <cstdint>
#include <vector>

namespace fastbert {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Instruction sets with an object of their own, best first. A list of these is a list of choices.
enum class Isa : int { avx512_bf16 = 0, avx512 = 1, avx2 = 2, portable = 3 };

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

// A weight and its bias, rearranged for `linear` of one instruction set: see packed_weight_bytes.
struct PackWeight {
    DType dtype;
    int64_t N, K;
    const void* weight;  // (N, K)
    const void* bias;    // (N,) or null
    void* packed;        // packed_weight_bytes(dtype, N, K, isa) bytes, aligned to 64
    int64_t stride_wn;
};

// y = activation(x weight^T + bias); sums in fp32. bf16 wants K and the row strides even.
struct Linear {
    DType dtype;
    int64_t M, N, K;
    const void* x;       // (M, K)
    const void* packed;  // made by pack_weight_cpu for the same instruction set
    void* y;             // (M, N)
    int64_t stride_xm, stride_ym;
    Activation activation;
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

// ---- CPU ----

const char* isa_name(Isa isa);

// The instruction sets this processor and this build have, best first; `portable` is always the last.
std::vector<Isa> supported_isas();

// Names of the processor features the choice rests on, those present only.
std::vector<const char*> cpu_features();

// dtype f32 or bf16; `isa` must be one of supported_isas(). At most `threads` threads.
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads);

int64_t packed_weight_bytes(DType dtype, int64_t N, int64_t K, Isa isa);
void pack_weight_cpu(const PackWeight& op, Isa isa, int threads);
void linear_cpu(const Linear& op, Isa isa, int threads);
void attention_cpu(const Attention& op, Isa isa, int threads);

// What the machine can reach at most, measured on all `threads`: FLOP/s of a loop that multiplies registers only,
// or bytes/s read from main memory. 0 where the instruction set has no instruction for it.
enum class PeakKind : int { f32 = 0, bf16 = 1, int8 = 2, read = 3 };
double peak_cpu(PeakKind kind, Isa isa, int threads);

// ---- CUDA: declared always, defined where the build found nvcc (FASTBERT_HAS_CUDA) ----

// dtype f32, f16 or bf16; pointers on `device`; `stream` is a cudaStream_t. Launches and returns at once:
// 0, or the code of a cudaError_t.
int add_layer_norm_cuda(const AddLayerNorm& op, int device, void* stream);

const char* cuda_error_string(int code);

}  // namespace fastbert
