#include <string>
#include <utility>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

LinearBwd linear_bwd_of(int dtype, int64_t M, int64_t N, int64_t K, Address dy, int64_t stride_dym,
                                  int activation, Address dx, Address dweight, Address dbias, int64_t chunk_words) {
    if (chunk_words < 1) throw py::value_error("chunk_words is " + std::to_string(chunk_words) + "; it must be positive");
    LinearBwd op = {};
    op.dtype = static_cast<DType>(dtype);
    op.M = M, op.N = N, op.K = K;
    op.dy = dy, op.stride_dym = stride_dym;
    op.activation = static_cast<Activation>(activation);
    op.dx = dx, op.dweight = dweight, op.dbias = dbias;
    op.chunk_words = chunk_words;
    return op;
}

}  // namespace

void bind_linear(py::module_& m) {
    for (const auto& [name, activation] : {std::pair("none", Activation::none), std::pair("gelu", Activation::gelu),
                                           std::pair("gelu_tanh", Activation::gelu_tanh),
                                           std::pair("relu", Activation::relu), std::pair("silu", Activation::silu),
                                           std::pair("tanh", Activation::tanh)})
        m.attr((std::string("ACTIVATION_") + name).c_str()) = static_cast<int>(activation);
    for (const auto& [name, precision] : {std::pair("full", Precision::full), std::pair("int8", Precision::int8),
                                          std::pair("high", Precision::high), std::pair("highest", Precision::highest)})
        m.attr((std::string("PRECISION_") + name).c_str()) = static_cast<int>(precision);
    m.attr("PARTIAL_ROWS") = PARTIAL_ROWS;
    m.def("panel_columns", [](int isa) { return panel_columns(checked_isa(isa, static_cast<int>(DType::f32))); });
    m.def("packed_weight_bytes", [](int dtype, int precision, int64_t N, int64_t K, int isa) {
        return packed_weight_bytes(static_cast<DType>(dtype), checked_precision(precision), N, K, checked_isa(isa, dtype));
    });
    m.def("pack_weight_cpu", [](int dtype, int precision, int64_t N, int64_t K, Address weight, int64_t stride_wn,
                                Address bias, Address packed, int isa, int threads) {
        const PackWeight op = {static_cast<DType>(dtype), N, K, weight, bias, packed, stride_wn,
                               checked_precision(precision)};
        call(pack_weight_cpu, op, dtype, isa, threads);
    });
    m.def("linear_cpu", [](int dtype, int precision, int64_t M, int64_t N, int64_t K, Address x, int64_t stride_xm,
                           Address packed, Address y, int64_t stride_ym, int activation, bool gated, int isa, int threads) {
        const Linear op = {static_cast<DType>(dtype), M, N, K, x, packed, y, stride_xm, stride_ym,
                           static_cast<Activation>(activation), checked_precision(precision), nullptr, nullptr, gated};
        call(linear_cpu, op, dtype, isa, threads);
    });
    m.def("activate_cpu", [](int dtype, int64_t n, Address x, Address y, int activation, int isa, int threads) {
        const Activate op = {static_cast<DType>(dtype), n, x, y, static_cast<Activation>(activation)};
        call(activate_cpu, op, dtype, isa, threads);
    });
    m.def("gate_cpu", [](int dtype, int64_t M, int64_t F, Address z, Address dy, Address out, int activation, int isa,
                         int threads) {
        call(gate_cpu, Gate{static_cast<DType>(dtype), M, F, z, dy, out, static_cast<Activation>(activation)}, dtype, isa,
             threads);
    });
    m.def("activation_bwd_cpu", [](int dtype, int64_t M, int64_t N, Address dy, int64_t stride_dym, Address saved,
                                        int64_t stride_sm, Address dz, int64_t stride_dz, Address dzt,
                                        int64_t stride_dzt, Address partials, int activation, int isa, int threads) {
        const ActivationBwd op = {static_cast<DType>(dtype), M, N, dy, saved, dz, dzt, partials, stride_dym,
                                       stride_sm, stride_dz, stride_dzt, static_cast<Activation>(activation)};
        call(activation_bwd_cpu, op, dtype, isa, threads);
    });
    m.def("linear_dweight_cpu", [](int dtype, int64_t N, int64_t K, int64_t tokens, Address dzt, int64_t stride_dzt,
                                    Address packed, Address sums, Address dweight, bool first, bool last, int isa,
                                    int threads) {
        const LinearDweight op = {static_cast<DType>(dtype), N, K, tokens, dzt, packed, sums, dweight, stride_dzt,
                                   first, last};
        call(linear_dweight_cpu, op, dtype, isa, threads);
    });
    m.def("pack_transposed_cpu", [](int dtype, int64_t N, int64_t K, Address source, int64_t rows, int64_t stride,
                                    Address packed, int64_t first, int64_t last, int isa, int threads) {
        const PackTransposed op = {static_cast<DType>(dtype), N, K, source, packed, rows, stride, first, last};
        call(pack_transposed_cpu, op, dtype, isa, threads);
    });
    m.def("linear_bwd_workspace_bytes", [](int dtype, int64_t M, int64_t N, int64_t K, Address dy,
                                                int64_t stride_dym, int activation, Address dx, Address dweight,
                                                Address dbias, int64_t chunk_words, int isa) {
        return linear_bwd_workspace_bytes(
            linear_bwd_of(dtype, M, N, K, dy, stride_dym, activation, dx, dweight, dbias, chunk_words),
            checked_isa(isa, dtype));
    });
    m.def("linear_bwd_cpu", [](int dtype, int64_t M, int64_t N, int64_t K, Address dy, int64_t stride_dym,
                                    int activation, Address dx, Address dweight, Address dbias, int64_t chunk_words,
                                    Address x, int64_t stride_xm, Address saved, int64_t stride_sm, Address packed,
                                    Address workspace, int isa, int threads) {
        LinearBwd op =
            linear_bwd_of(dtype, M, N, K, dy, stride_dym, activation, dx, dweight, dbias, chunk_words);
        op.x = x, op.stride_xm = stride_xm;
        op.saved = saved, op.stride_sm = stride_sm;
        op.packed = packed, op.workspace = workspace;
        call(linear_bwd_cpu, op, dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
