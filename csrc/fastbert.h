// Everything the library offers to C++: plain pointers, sizes, strides (in elements) and a stream.
// Nothing here knows torch or Python. The caller owns every buffer.
#pragma once

#include <cstdint>
#include <vector>

namespace fastbert {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Instruction sets with an object of their own, best first. A list of these is a list of choices.
enum class Isa : int { avx512 = 0, avx2 = 1, portable = 2 };

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

// ---- CPU ----

const char* isa_name(Isa isa);

// The instruction sets this processor and this build have, best first; `portable` is always the last.
std::vector<Isa> supported_isas();

// Names of the processor features the choice rests on, those present only.
std::vector<const char*> cpu_features();

// dtype f32 or bf16; `isa` must be one of supported_isas(). At most `threads` threads.
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads);

// ---- CUDA: declared always, defined where the build found nvcc (FASTBERT_HAS_CUDA) ----

// dtype f32, f16 or bf16; pointers on `device`; `stream` is a cudaStream_t. Launches and returns at once:
// 0, or the code of a cudaError_t.
int add_layer_norm_cuda(const AddLayerNorm& op, int device, void* stream);

const char* cuda_error_string(int code);

}  // namespace fastbert
