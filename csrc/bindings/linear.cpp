#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

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

// A hash of 16 words of each of several matrices of `rows` rows of `widths` 32-bit words: one in each sixteenth of the
// rows and one in each sixteenth of the columns, in an order that keeps them apart.
uint64_t sample(const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& rows,
                const std::vector<int64_t>& widths) {
    constexpr int64_t SAMPLES = 16, APART = 7;  // no divisor in common
    if (addresses.size() != rows.size() || rows.size() != widths.size()) throw py::value_error("sizes differ");
    uint64_t hash = 1469598103934665603u;
    for (size_t piece = 0; piece < addresses.size(); ++piece) {
        const auto* start = static_cast<const char*>(pointer(addresses[piece]));
        for (int64_t i = 0; i < SAMPLES && rows[piece] * widths[piece] > 0; ++i) {
            const int64_t row = (2 * i + 1) * rows[piece] / (2 * SAMPLES);
            const int64_t column = (2 * (i * APART % SAMPLES) + 1) * widths[piece] / (2 * SAMPLES);
            uint32_t word;  // bf16 may begin in the middle of one
            std::memcpy(&word, start + (row * widths[piece] + column) * 4, sizeof word);
            hash = (hash ^ word) * 1099511628211u;
        }
    }
    return hash;
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
    m.def("sample", &sample);
    m.def("linear_cpu", &linear_cpu_binding);
}

}  // namespace fastbert::bindings
