#include "bindings.h"

namespace fastbert::bindings {
namespace {

Attention attention_of(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, Address qkv, int64_t stride_t,
                       int64_t stride_3, Address cu_seqlens, Address y, float scale_log2, Address distance_bias,
                       int64_t reach, int64_t window) {
    check_offsets(cu_seqlens, B, T);
    return {static_cast<DType>(dtype), T, B, H, D, qkv, cu_seqlens, y, stride_t, stride_3, scale_log2, distance_bias, reach, window};
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_cpu", [](int dtype, int64_t T, int64_t B, int64_t H, int64_t D, Address qkv, int64_t stride_t,
                              int64_t stride_3, Address cu_seqlens, Address y, float scale_log2, Address distance_bias,
                              int64_t reach, int64_t window, int isa, int threads) {
        const auto op =
            attention_of(dtype, T, B, H, D, qkv, stride_t, stride_3, cu_seqlens, y, scale_log2, distance_bias, reach, window);
        call(attention_cpu, op, dtype, isa, threads);
    });
    m.def("attention_fwd_train_cpu", [](int dtype, int64_t T, int64_t B, int64_t H, int64_t D, Address qkv,
                                       int64_t stride_t, int64_t stride_3, Address cu_seqlens, Address y,
                                       float scale_log2, Address distance_bias, int64_t reach, int64_t window, double p, uint64_t seed,
                                       Address row_max, int isa, int threads) {
        const auto op =
            attention_of(dtype, T, B, H, D, qkv, stride_t, stride_3, cu_seqlens, y, scale_log2, distance_bias, reach, window);
        call(attention_fwd_train_cpu, AttentionFwdTrain{op, dropout_of(seed, p), T, row_max}, dtype, isa, threads);
    });
    m.def("attention_bwd_cpu", [](int dtype, int64_t T, int64_t B, int64_t H, int64_t D, Address qkv,
                                       int64_t stride_t, int64_t stride_3, Address cu_seqlens, Address y,
                                       float scale_log2, Address distance_bias, int64_t reach, int64_t window, double p, uint64_t seed,
                                       Address row_max, Address dy, Address dqkv, Address dbias, Address dbias_parts,
                                       int isa, int threads) {
        const auto op =
            attention_of(dtype, T, B, H, D, qkv, stride_t, stride_3, cu_seqlens, y, scale_log2, distance_bias, reach, window);
        call(attention_bwd_cpu, AttentionBwd{op, dropout_of(seed, p), T, row_max, dy, dqkv, dbias, dbias_parts}, dtype,
             isa, threads);
    });
}

}  // namespace fastbert::bindings
