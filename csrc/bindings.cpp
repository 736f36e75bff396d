// fastbert._C: pointers, sizes and strides in, nothing out. fastbert/native.py checks the tensors first;
// what is checked here is only what would crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

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
    const std::vector<Isa> all = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::portable}, have = supported_isas();
    for (const Isa isa : have)
        if (name == isa_name(isa)) return static_cast<int>(isa);
    for (const Isa isa : all)
        if (name == isa_name(isa))
            throw py::value_error("this CPU or this build has no " + name + ", only: " + join_names(have));
    throw py::value_error("unknown instruction set '" + name + "', known: " + join_names(all));
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

AddLayerNorm add_layer_norm_args(int dtype, int64_t M, int64_t N, uintptr_t x, int64_t stride_xm,
                                 uintptr_t residual, int64_t stride_rm, uintptr_t weight, uintptr_t bias,
                                 uintptr_t y, int64_t stride_ym, float eps) {
    return {static_cast<DType>(dtype), M, N, pointer(x), pointer(residual), pointer(weight), pointer(bias),
            pointer(y), stride_xm, stride_rm, stride_ym, eps};
}

// Throws where a number that came from Python would crash: no such instruction set here, no such dtype on CPU.
Isa checked_isa(int isa, int dtype) {
    static const std::vector<Isa> have = supported_isas();
    if (std::find(have.begin(), have.end(), static_cast<Isa>(isa)) == have.end())
        throw py::value_error("no instruction set of number " + std::to_string(isa) + " here");
    if (dtype != static_cast<int>(DType::f32) && dtype != static_cast<int>(DType::bf16))
        throw py::value_error("the CPU kernels take fp32 and bf16 only");
    return static_cast<Isa>(isa);
}

int64_t packed_weight_bytes_binding(int dtype, int64_t N, int64_t K, int isa) {
    return packed_weight_bytes(static_cast<DType>(dtype), N, K, checked_isa(isa, dtype));
}

void pack_weight_cpu_binding(int dtype, int64_t N, int64_t K, uintptr_t weight, int64_t stride_wn, uintptr_t bias,
                             uintptr_t packed, int isa, int threads) {
    const PackWeight op = {static_cast<DType>(dtype), N, K, pointer(weight), pointer(bias), pointer(packed), stride_wn};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    pack_weight_cpu(op, checked, threads);
}

// A hash of some words spread over memory: changes, all but surely, when a weight is written to.
uint64_t sample(uintptr_t address, int64_t bytes) {
    constexpr int64_t SAMPLES = 16;
    uint64_t hash = 1469598103934665603u;
    const int64_t words = bytes / 4;
    for (int64_t i = 0; i < SAMPLES && words > 0; ++i) {
        uint32_t word;
        std::memcpy(&word, static_cast<const char*>(pointer(address)) + (words - 1) * i / (SAMPLES - 1) * 4, 4);
        hash = (hash ^ word) * 1099511628211u;
    }
    return hash;
}

void linear_cpu_binding(int dtype, int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t stride_xm, uintptr_t packed,
                        uintptr_t y, int64_t stride_ym, int activation, int isa, int threads) {
    const Linear op = {static_cast<DType>(dtype), M, N, K, pointer(x), pointer(packed), pointer(y), stride_xm,
                       stride_ym, static_cast<Activation>(activation)};
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    linear_cpu(op, checked, threads);
}

void attention_cpu_binding(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, uintptr_t qkv, int64_t stride_t,
                           int64_t stride_3, uintptr_t cu_seqlens, uintptr_t y, float scale_log2, int isa, int threads) {
    const Attention op = {static_cast<DType>(dtype), B, H, D, pointer(qkv), static_cast<const int32_t*>(pointer(cu_seqlens)),
                          pointer(y), stride_t, stride_3, scale_log2};
    for (int64_t b = 0; b <= B; ++b)
        if (op.cu_seqlens[b] < (b ? op.cu_seqlens[b - 1] : 0) || op.cu_seqlens[b] > T)
            throw py::value_error("cu_seqlens[" + std::to_string(b) + "] is " + std::to_string(op.cu_seqlens[b]) +
                                  "; offsets must rise from 0 to the number of tokens, " + std::to_string(T));
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    attention_cpu(op, checked, threads);
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

double peak_binding(const std::string& kind, int isa, int threads) {
    const std::vector<std::string> kinds = {"fp32", "bf16", "int8", "read"};
    const auto found = std::find(kinds.begin(), kinds.end(), kind);
    if (found == kinds.end()) throw py::value_error("no peak of kind '" + kind + "': fp32, bf16, int8 or read");
    if (threads < 1) throw py::value_error("threads must be at least 1");
    const Isa checked = checked_isa(isa, static_cast<int>(DType::f32));
    py::gil_scoped_release nogil;
    return peak_cpu(static_cast<PeakKind>(found - kinds.begin()), checked, threads);
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
    for (const auto& [name, activation] : {std::pair("none", Activation::none), std::pair("gelu", Activation::gelu),
                                           std::pair("gelu_tanh", Activation::gelu_tanh),
                                           std::pair("relu", Activation::relu), std::pair("silu", Activation::silu),
                                           std::pair("tanh", Activation::tanh)})
        m.attr((std::string("ACTIVATION_") + name).c_str()) = static_cast<int>(activation);
    m.def("add_layer_norm_cpu", &add_layer_norm_cpu_binding);
    m.def("packed_weight_bytes", &packed_weight_bytes_binding);
    m.def("pack_weight_cpu", &pack_weight_cpu_binding);
    m.def("sample", &sample);
    m.def("linear_cpu", &linear_cpu_binding);
    m.def("attention_cpu", &attention_cpu_binding);
    m.def("peak", &peak_binding);
#ifdef FASTBERT_HAS_CUDA
    m.attr("has_cuda") = true;
    m.def("add_layer_norm_cuda", &add_layer_norm_cuda_binding);
#else
    m.attr("has_cuda") = false;
#endif
}
