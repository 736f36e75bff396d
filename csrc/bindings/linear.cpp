#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

int64_t packed_weight_bytes_binding(int dtype, int precision, int64_t N, int64_t K, int isa) {
    return packed_weight_bytes(static_cast<DType>(dtype), checked_precision(precision), N, K, checked_isa(isa, dtype));
}

void pack_weight_cpu_binding(int dtype, int precision, int64_t N, int64_t K, uintptr_t weight, int64_t stride_wn,
                             uintptr_t bias, uintptr_t packed, int isa, int threads) {
    const PackWeight op = {static_cast<DType>(dtype), N, K, pointer(weight), pointer(bias), pointer(packed), stride_wn,
                           checked_precision(precision)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    pack_weight_cpu(op, checked, threads);
}

void linear_cpu_binding(int dtype, int precision, int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t stride_xm,
                        uintptr_t packed, uintptr_t y, int64_t stride_ym, int activation, int isa, int threads) {
    const Linear op = {static_cast<DType>(dtype), M, N, K, pointer(x), pointer(packed), pointer(y), stride_xm, stride_ym,
                       static_cast<Activation>(activation), checked_precision(precision), nullptr, nullptr};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    linear_cpu(op, checked, threads);
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
    m.def("packed_weight_bytes", &packed_weight_bytes_binding);
    m.def("pack_weight_cpu", &pack_weight_cpu_binding);
    m.def("linear_cpu", &linear_cpu_binding);
}

}  // namespace fastbert::bindings
