#include "bindings.h"

namespace fastbert::bindings {
namespace {

template <typename T>
T* typed(uintptr_t address) {
    return static_cast<T*>(pointer(address));
}

void check_tokens(int64_t K) {
    if (K % 32) throw py::value_error("tokens come in multiples of 32");
}

void cross_entropy_statistics_cpu_binding(int dtype, int64_t V, int64_t K, int64_t first, uintptr_t logits,
                                          uintptr_t bias, uintptr_t labels, uintptr_t partial, uintptr_t picked,
                                          int isa, int threads) {
    check_tokens(K);
    const Isa checked = checked_isa(isa, dtype);
    const CrossEntropy op = {static_cast<DType>(dtype), V, K, first, pointer(logits), pointer(bias),
                             typed<const int32_t>(labels), typed<float>(partial), typed<float>(picked),
                             nullptr, nullptr, nullptr, nullptr};
    py::gil_scoped_release nogil;
    cross_entropy_statistics_cpu(op, checked, threads);
}

void cross_entropy_combine_cpu_binding(uintptr_t partial, int64_t blocks, int64_t K, uintptr_t row_max, uintptr_t total,
                                       int isa, int threads) {
    check_tokens(K);
    const Isa checked = checked_isa(isa, static_cast<int>(DType::f32));
    py::gil_scoped_release nogil;
    cross_entropy_combine_cpu(typed<const float>(partial), blocks, K, typed<float>(row_max), typed<float>(total), checked,
                              threads);
}

void cross_entropy_gradient_cpu_binding(int dtype, int64_t V, int64_t K, int64_t first, uintptr_t logits, uintptr_t bias,
                                        uintptr_t labels, uintptr_t row_max, uintptr_t inverse, uintptr_t scale,
                                        uintptr_t dbias, int isa, int threads) {
    check_tokens(K);
    const Isa checked = checked_isa(isa, dtype);
    const CrossEntropy op = {static_cast<DType>(dtype), V, K, first, pointer(logits), pointer(bias),
                             typed<const int32_t>(labels), nullptr, nullptr, typed<const float>(row_max),
                             typed<const float>(inverse), typed<const float>(scale), pointer(dbias)};
    py::gil_scoped_release nogil;
    cross_entropy_gradient_cpu(op, checked, threads);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
    m.def("cross_entropy_blocks", &cross_entropy_blocks);
    m.def("cross_entropy_statistics_cpu", &cross_entropy_statistics_cpu_binding);
    m.def("cross_entropy_combine_cpu", &cross_entropy_combine_cpu_binding);
    m.def("cross_entropy_gradient_cpu", &cross_entropy_gradient_cpu_binding);
}

}  // namespace fastbert::bindings
