#include "bindings.h"

namespace fastbert::bindings {
namespace {

void add_layer_norm_cpu_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                uintptr_t y, int64_t stride_ym, float eps, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    const AddLayerNorm op = {static_cast<DType>(dtype), M, N, pointer(x), pointer(residual), pointer(weight),
                             pointer(bias), pointer(y), stride_xm, stride_rm, stride_ym, eps};
    py::gil_scoped_release nogil;
    add_layer_norm_cpu(op, checked, threads);
}

}  // namespace

void bind_add_layer_norm(py::module_& m) { m.def("add_layer_norm_cpu", &add_layer_norm_cpu_binding); }

}  // namespace fastbert::bindings
