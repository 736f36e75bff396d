#include <stdexcept>
#include <string>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

AddLayerNorm add_layer_norm_args(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                 uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                 uintptr_t y, int64_t stride_ym, float eps) {
    return {static_cast<DType>(dtype), M, N, pointer(x), pointer(residual), pointer(weight), pointer(bias),
            pointer(y), stride_xm, stride_rm, stride_ym, eps};
}

void add_layer_norm_cpu_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                uintptr_t y, int64_t stride_ym, float eps, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    const AddLayerNorm op = add_layer_norm_args(dtype, M, N, x, stride_xm, residual, stride_rm, weight, bias, y,
                                                stride_ym, eps);
    py::gil_scoped_release nogil;
    add_layer_norm_cpu(op, checked, threads);
}

#ifdef FASTBERT_HAS_CUDA
void add_layer_norm_cuda_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                 uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                 uintptr_t y, int64_t stride_ym, float eps, int device, uintptr_t stream) {
    if (dtype < static_cast<int>(DType::f32) || dtype > static_cast<int>(DType::bf16))
        throw py::value_error("no dtype of number " + std::to_string(dtype));
    const AddLayerNorm op = add_layer_norm_args(dtype, M, N, x, stride_xm, residual, stride_rm, weight, bias, y,
                                                stride_ym, eps);
    int error;
    {
        py::gil_scoped_release nogil;
        error = add_layer_norm_cuda(op, device, reinterpret_cast<void*>(stream));
    }
    if (error) throw std::runtime_error(std::string("add_layer_norm: CUDA: ") + cuda_error_string(error));
}
#endif

}  // namespace

void bind_add_layer_norm(py::module_& m) {
    m.def("add_layer_norm_cpu", &add_layer_norm_cpu_binding);
#ifdef FASTBERT_HAS_CUDA
    m.def("add_layer_norm_cuda", &add_layer_norm_cuda_binding);
#endif
}

}  // namespace fastbert::bindings
