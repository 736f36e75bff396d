// fastbert._C: pointers, sizes and strides in, nothing out. fastbert/native.py checks the tensors first;
// what is checked here is only what would crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "fastbert.h"

namespace py = pybind11;
using namespace fastbert;

namespace {

std::string join_names(const std::vector<Isa>& isas) {
    std::string out;
    for (const Isa isa : isas) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
    return out;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    return names;
}

// The number of a named instruction set; a ValueError where this machine cannot run it.
int isa_id(const std::string& name) {
    const std::vector<Isa> all = {Isa::avx512, Isa::avx2, Isa::portable}, have = supported_isas();
    for (const Isa isa : have)
        if (name == isa_name(isa)) return static_cast<int>(isa);
    for (const Isa isa : all)
        if (name == isa_name(isa))
            throw py::value_error("this CPU or this build has no " + name + ", only: " + join_names(have));
    throw py::value_error("unknown instruction set '" + name + "', known: " + join_names(all));
}

AddLayerNorm add_layer_norm_args(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                 uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                 uintptr_t y, int64_t stride_ym, float eps) {
    const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    return {static_cast<DType>(dtype), M, N, pointer(x), pointer(residual), pointer(weight), pointer(bias),
            pointer(y), stride_xm, stride_rm, stride_ym, eps};
}

void add_layer_norm_cpu_binding(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                uintptr_t y, int64_t stride_ym, float eps, int isa, int threads) {
    static const std::vector<Isa> have = supported_isas();
    if (std::find(have.begin(), have.end(), static_cast<Isa>(isa)) == have.end())
        throw py::value_error("no instruction set of number " + std::to_string(isa) + " here");
    if (dtype != static_cast<int>(DType::f32) && dtype != static_cast<int>(DType::bf16))
        throw py::value_error("add_layer_norm on CPU takes fp32 and bf16 only");
    const AddLayerNorm op = add_layer_norm_args(dtype, M, N, x, stride_xm, residual, stride_rm, weight, bias, y,
                                                stride_ym, eps);
    py::gil_scoped_release nogil;
    add_layer_norm_cpu(op, static_cast<Isa>(isa), threads);
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

// Arguments go by position: keywords would double the cost of a call.
PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ and CUDA kernels of fastbert; use fastbert.native";
    m.attr("F32") = static_cast<int>(DType::f32);
    m.attr("F16") = static_cast<int>(DType::f16);
    m.attr("BF16") = static_cast<int>(DType::bf16);
#ifdef _OPENMP
    m.attr("has_openmp") = true;
#else
    m.attr("has_openmp") = false;
#endif
    m.def("cpu_features", [] {
        std::vector<std::string> names;
        for (const char* name : cpu_features()) names.emplace_back(name);
        return names;
    });
    m.def("isas", &isas);
    m.def("isa_id", &isa_id);
    m.def("add_layer_norm_cpu", &add_layer_norm_cpu_binding);
#ifdef FASTBERT_HAS_CUDA
    m.attr("has_cuda") = true;
    m.def("add_layer_norm_cuda", &add_layer_norm_cuda_binding);
#else
    m.attr("has_cuda") = false;
#endif
}
