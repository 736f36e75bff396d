// The training passes of csrc/training.h.
#include <string>

#include "../training.h"
#include "bindings.h"

namespace fastbert::bindings {
namespace {

AddLayerNorm norm_of(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm, uintptr_t residual,
                     int64_t stride_rm, uintptr_t weight) {
    return {static_cast<DType>(dtype), M, N, pointer(x), pointer(residual), pointer(weight), nullptr, nullptr,
            stride_xm, stride_rm, N, 0.0f};
}

void add_layer_norm_training_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                     uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                     uintptr_t y, float eps, double p, uint64_t seed, uintptr_t mean, uintptr_t rstd,
                                     int isa, int threads) {
    AddLayerNormTraining op = {norm_of(dtype, M, N, x, stride_xm, residual, stride_rm, weight), dropout_of(seed, p),
                               static_cast<float*>(pointer(mean)), static_cast<float*>(pointer(rstd))};
    op.op.bias = pointer(bias);
    op.op.y = pointer(y);
    op.op.eps = eps;
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    add_layer_norm_training_cpu(op, checked, threads);
}

void add_layer_norm_backward_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                     uintptr_t residual, int64_t stride_rm, uintptr_t weight, double p, uint64_t seed,
                                     uintptr_t mean, uintptr_t rstd, uintptr_t dy, int64_t stride_dym, uintptr_t dx,
                                     uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias, uintptr_t partials,
                                     int isa, int threads) {
    const AddLayerNormBackward op = {norm_of(dtype, M, N, x, stride_xm, residual, stride_rm, weight),
                                     dropout_of(seed, p), static_cast<const float*>(pointer(mean)),
                                     static_cast<const float*>(pointer(rstd)),
                                     pointer(dy), pointer(dx), pointer(dresidual), pointer(dweight), pointer(dbias),
                                     static_cast<float*>(pointer(partials)), stride_dym};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    add_layer_norm_backward_cpu(op, checked, threads);
}

void activate_binding(int dtype, int64_t n, uintptr_t x, uintptr_t y, int activation, int isa, int threads) {
    const Activate op = {static_cast<DType>(dtype), n, pointer(x), pointer(y), static_cast<Activation>(activation)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    activate_cpu(op, checked, threads);
}

void activation_backward_binding(int dtype, int64_t M, int64_t N, uintptr_t dy, int64_t stride_dym, uintptr_t saved,
                                 int64_t stride_sm, uintptr_t dz, int64_t stride_dz, uintptr_t dzt, int64_t stride_dzt,
                                 uintptr_t partials, int activation, int isa, int threads) {
    const ActivationBackward op = {static_cast<DType>(dtype), M, N, pointer(dy), pointer(saved), pointer(dz),
                                   pointer(dzt), static_cast<float*>(pointer(partials)), stride_dym, stride_sm,
                                   stride_dz, stride_dzt, static_cast<Activation>(activation)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    activation_backward_cpu(op, checked, threads);
}

void sum_partials_binding(int dtype, int64_t blocks, int64_t N, uintptr_t partials, uintptr_t out, int isa) {
    const SumPartials op = {static_cast<DType>(dtype), blocks, N, static_cast<const float*>(pointer(partials)),
                            pointer(out)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    sum_partials_cpu(op, checked);
}

void weight_gradient_binding(int dtype, int64_t N, int64_t K, int64_t tokens, uintptr_t dzt, int64_t stride_dzt,
                             uintptr_t packed, uintptr_t sums, uintptr_t dweight, bool first, bool last, int isa,
                             int threads) {
    const WeightGradient op = {static_cast<DType>(dtype), N, K, tokens, pointer(dzt), pointer(packed),
                               static_cast<float*>(pointer(sums)), pointer(dweight), stride_dzt, first, last};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    weight_gradient_cpu(op, checked, threads);
}

void pack_transposed_binding(int dtype, int64_t N, int64_t K, uintptr_t source, int64_t rows, int64_t stride,
                             uintptr_t packed, int64_t first, int64_t last, int isa, int threads) {
    const PackTransposed op = {static_cast<DType>(dtype), N, K, pointer(source), pointer(packed), rows, stride, first,
                               last};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    pack_transposed_cpu(op, checked, threads);
}

LinearBackward linear_backward_of(int dtype, int64_t M, int64_t N, int64_t K, uintptr_t dy, int64_t stride_dym,
                                  int activation, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, int64_t chunk_words) {
    if (chunk_words < 1) throw py::value_error("chunk_words is " + std::to_string(chunk_words) + "; it must be positive");
    LinearBackward op = {};
    op.dtype = static_cast<DType>(dtype);
    op.M = M, op.N = N, op.K = K;
    op.dy = pointer(dy), op.stride_dym = stride_dym;
    op.activation = static_cast<Activation>(activation);
    op.dx = pointer(dx), op.dweight = pointer(dweight), op.dbias = pointer(dbias);
    op.chunk_words = chunk_words;
    return op;
}

int64_t linear_backward_workspace_bytes_binding(int dtype, int64_t M, int64_t N, int64_t K, uintptr_t dy,
                                                int64_t stride_dym, int activation, uintptr_t dx, uintptr_t dweight,
                                                uintptr_t dbias, int64_t chunk_words, int isa) {
    return linear_backward_workspace_bytes(
        linear_backward_of(dtype, M, N, K, dy, stride_dym, activation, dx, dweight, dbias, chunk_words),
        checked_isa(isa, dtype));
}

void linear_backward_binding(int dtype, int64_t M, int64_t N, int64_t K, uintptr_t dy, int64_t stride_dym,
                             int activation, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                             int64_t chunk_words, uintptr_t x, int64_t stride_xm, uintptr_t saved, int64_t stride_sm, uintptr_t packed,
                             uintptr_t workspace, int isa, int threads) {
    LinearBackward op = linear_backward_of(dtype, M, N, K, dy, stride_dym, activation, dx, dweight, dbias,
                                           chunk_words);
    op.x = pointer(x), op.stride_xm = stride_xm;
    op.saved = pointer(saved), op.stride_sm = stride_sm;
    op.packed = pointer(packed), op.workspace = pointer(workspace);
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    linear_backward_cpu(op, checked, threads);
}

Attention attention_of(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, uintptr_t qkv, int64_t stride_t,
                       int64_t stride_3, uintptr_t cu_seqlens, uintptr_t y, float scale_log2) {
    const auto* offsets = static_cast<const int32_t*>(pointer(cu_seqlens));
    check_offsets(offsets, B, T);
    return {static_cast<DType>(dtype), T, B, H, D, pointer(qkv), offsets, pointer(y), stride_t, stride_3, scale_log2};
}

void attention_training_binding(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, uintptr_t qkv, int64_t stride_t,
                                int64_t stride_3, uintptr_t cu_seqlens, uintptr_t y, float scale_log2, double p,
                                uint64_t seed, uintptr_t highest, int isa, int threads) {
    const AttentionTraining op = {attention_of(dtype, T, B, H, D, qkv, stride_t, stride_3, cu_seqlens, y, scale_log2),
                                  dropout_of(seed, p), T, static_cast<float*>(pointer(highest))};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    attention_training_cpu(op, checked, threads);
}

void attention_backward_binding(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, uintptr_t qkv, int64_t stride_t,
                                int64_t stride_3, uintptr_t cu_seqlens, uintptr_t y, float scale_log2, double p,
                                uint64_t seed, uintptr_t highest, uintptr_t dy, uintptr_t dqkv, int isa, int threads) {
    const AttentionBackward op = {attention_of(dtype, T, B, H, D, qkv, stride_t, stride_3, cu_seqlens, y, scale_log2),
                                  dropout_of(seed, p), T, static_cast<const float*>(pointer(highest)), pointer(dy),
                                  pointer(dqkv)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    attention_backward_cpu(op, checked, threads);
}

}  // namespace

void bind_training(py::module_& m) {
    m.attr("PARTIAL_ROWS") = PARTIAL_ROWS;
    m.def("add_layer_norm_training_cpu", &add_layer_norm_training_binding);
    m.def("add_layer_norm_backward_cpu", &add_layer_norm_backward_binding);
    m.def("activate_cpu", &activate_binding);
    m.def("activation_backward_cpu", &activation_backward_binding);
    m.def("sum_partials_cpu", &sum_partials_binding);
    m.def("weight_gradient_cpu", &weight_gradient_binding);
    m.def("linear_backward_workspace_bytes", &linear_backward_workspace_bytes_binding);
    m.def("linear_backward_cpu", &linear_backward_binding);
    m.def("pack_transposed_cpu", &pack_transposed_binding);
    m.def("attention_training_cpu", &attention_training_binding);
    m.def("attention_backward_cpu", &attention_backward_binding);
}

}  // namespace fastbert::bindings
