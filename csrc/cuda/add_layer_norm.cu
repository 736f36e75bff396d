// y = LayerNorm(x + residual) * weight + bias on the GPU: one block a row.
//
// x, residual and y cross the memory bus once: a thread keeps its part of the row as fp32 in shared memory
// (or, for rows too long for that, reads it again from the L2 cache). Loads are 16 bytes wide where all
// addresses allow it. Mean, then squares about the mean, in fp32; what the mean was rounded by is summed up with
// the squares and taken out of the deviations, as it would be a large part of those of a row far from zero.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../fastbert.h"
#include "launch.h"

namespace fastbert {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int64_t MAX_SHARED = 48 * 1024;  // bytes of shared memory that a block has without asking

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void from_float(float* p, float v) { *p = v; }
__device__ void from_float(__half* p, float v) { *p = __float2half_rn(v); }
__device__ void from_float(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T lane[VEC];
};

// The sum over the block, the same in every thread. `scratch` holds one float a warp.
__device__ float block_sum(float v, float* scratch) {
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();  // the scratch of the sum before this one has been read
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    v = lane < warps ? scratch[lane] : 0.0f;
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

template <typename T, int VEC, bool CACHED>
__global__ void add_layer_norm_kernel(AddLayerNorm op) {
    using P = Pack<T, VEC>;
    // Where CACHED: a column per thread, so that no two threads meet in a bank or read what another wrote.
    extern __shared__ float cache[];  // (ceil(N / step) * VEC, threads)
    __shared__ float scratch[MAX_THREADS / 32];

    const int64_t m = blockIdx.x;
    const T* x = static_cast<const T*>(op.x) + m * op.stride_xm;
    const T* residual = op.residual ? static_cast<const T*>(op.residual) + m * op.stride_rm : nullptr;
    T* y = static_cast<T*>(op.y) + m * op.stride_ym;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * VEC;
    const int64_t step = static_cast<int64_t>(blockDim.x) * VEC;

    const auto read = [&](int64_t n, float (&v)[VEC]) {
        const P px = *reinterpret_cast<const P*>(x + n);
        for (int i = 0; i < VEC; ++i) v[i] = to_float(px.lane[i]);
        if (residual) {
            const P pr = *reinterpret_cast<const P*>(residual + n);
            for (int i = 0; i < VEC; ++i) v[i] += to_float(pr.lane[i]);
        }
    };
    const auto slot = [&](int64_t n, int i) -> float& {
        return cache[n - first + i * blockDim.x + threadIdx.x];
    };
    const auto again = [&](int64_t n, float (&v)[VEC]) {
        if constexpr (CACHED)
            for (int i = 0; i < VEC; ++i) v[i] = slot(n, i);
        else
            read(n, v);
    };

    float v[VEC];
    float total = 0.0f;
    for (int64_t n = first; n < op.N; n += step) {
        read(n, v);
        for (int i = 0; i < VEC; ++i) {
            total += v[i];
            if constexpr (CACHED) slot(n, i) = v[i];
        }
    }
    const float mean = block_sum(total, scratch) / static_cast<float>(op.N);

    float squares = 0.0f, deviations = 0.0f;
    for (int64_t n = first; n < op.N; n += step) {
        again(n, v);
        for (int i = 0; i < VEC; ++i) {
            const float u = v[i] - mean;
            squares += u * u;
            deviations += u;
        }
    }
    const float off = block_sum(deviations, scratch) / static_cast<float>(op.N);
    const float variance = fmaxf(block_sum(squares, scratch) / static_cast<float>(op.N) - off * off, 0.0f);
    // not rsqrtf, which is approximate: sqrt and division are rounded correctly
    const float rstd = 1.0f / sqrtf(variance + op.eps);

    for (int64_t n = first; n < op.N; n += step) {
        again(n, v);
        const P pw = *reinterpret_cast<const P*>(static_cast<const T*>(op.weight) + n);
        const P pb = *reinterpret_cast<const P*>(static_cast<const T*>(op.bias) + n);
        P py;
        for (int i = 0; i < VEC; ++i)
            from_float(py.lane + i, (v[i] - mean - off) * rstd * to_float(pw.lane[i]) + to_float(pb.lane[i]));
        *reinterpret_cast<P*>(y + n) = py;
    }
}

template <typename T>
bool aligned(const AddLayerNorm& op, int vec) {
    const uintptr_t bytes = sizeof(T) * vec;
    const auto fits = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    return fits(op.x) && fits(op.residual) && fits(op.weight) && fits(op.bias) && fits(op.y) &&
           op.N % vec == 0 && op.stride_xm % vec == 0 && op.stride_ym % vec == 0 &&
           (!op.residual || op.stride_rm % vec == 0);
}

template <typename T, int VEC>
void launch_packs(const AddLayerNorm& op, cudaStream_t stream) {
    const int64_t packs = (op.N + VEC - 1) / VEC;
    const int threads = packs >= MAX_THREADS ? MAX_THREADS : static_cast<int>((packs + 31) / 32 * 32);
    const dim3 grid(static_cast<unsigned>(op.M));
    const int64_t cache = (packs + threads - 1) / threads * threads * VEC * sizeof(float);
    if (cache + MAX_THREADS / 32 * static_cast<int64_t>(sizeof(float)) <= MAX_SHARED)
        add_layer_norm_kernel<T, VEC, true><<<grid, threads, cache, stream>>>(op);
    else
        add_layer_norm_kernel<T, VEC, false><<<grid, threads, 0, stream>>>(op);
}

template <typename T>
void launch(const AddLayerNorm& op, cudaStream_t stream) {
    constexpr int VEC = 16 / sizeof(T);
    if (aligned<T>(op, VEC))
        launch_packs<T, VEC>(op, stream);
    else
        launch_packs<T, 1>(op, stream);
}

}  // namespace

int add_layer_norm_cuda(const AddLayerNorm& op, int device, void* stream) {
    if (op.M == 0 || op.N == 0) return cudaSuccess;
    if (op.M > INT32_MAX) return cudaErrorInvalidValue;  // the limit of a grid
    return on_device(device, [&] {
        switch (op.dtype) {
            case DType::f32: launch<float>(op, static_cast<cudaStream_t>(stream)); break;
            case DType::f16: launch<__half>(op, static_cast<cudaStream_t>(stream)); break;
            case DType::bf16: launch<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream)); break;
        }
    });
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace fastbert
