#include "bindings.h"

namespace fastbert::bindings {
namespace {

void check_tokens(int64_t K) {
    if (K % 32) throw py::value_error("tokens come in multiples of 32");
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
    m.def("cross_entropy_blocks", &cross_entropy_blocks);
    m.def("cross_entropy_statistics_cpu", [](int dtype, int64_t V, int64_t K, int64_t first, Address logits,
                                             Address bias, Address labels, Address partial, Address picked, int isa,
                                             int threads) {
        check_tokens(K);
        const CrossEntropy op = {static_cast<DType>(dtype), V, K, first, logits, bias, labels, partial, picked, nullptr,
                                 nullptr, nullptr, nullptr};
        call(cross_entropy_statistics_cpu, op, dtype, isa, threads);
    });
    m.def("cross_entropy_combine_cpu", [](Address partial, int64_t blocks, int64_t K, Address row_max, Address total,
                                          int isa, int threads) {
        check_tokens(K);
        const Isa checked = checked_isa(isa, static_cast<int>(DType::f32));
        py::gil_scoped_release nogil;
        cross_entropy_combine_cpu(partial, blocks, K, row_max, total, checked, threads);
    });
    m.def("cross_entropy_bwd_cpu", [](int dtype, int64_t V, int64_t K, int64_t first, Address logits, Address bias,
                                           Address labels, Address row_max, Address inverse, Address scale,
                                           Address dbias, int isa, int threads) {
        check_tokens(K);
        const CrossEntropy op = {static_cast<DType>(dtype), V, K, first, logits, bias, labels, nullptr, nullptr,
                                 row_max, inverse, scale, dbias};
        call(cross_entropy_bwd_cpu, op, dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
