// fastbert._C: the features of the build and the processor. The other files of this folder bind the ops.
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace fastbert::bindings {
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

// The number of a named instruction set; raises ValueError if this machine cannot run it.
int isa_id(const std::string& name) {
    const std::vector<Isa> have = supported_isas();
    std::vector<Isa> all;
    for (int isa = 0; isa < ISAS; ++isa) all.push_back(static_cast<Isa>(isa));
    for (const Isa isa : have)
        if (name == isa_name(isa)) return static_cast<int>(isa);
    for (const Isa isa : all)
        if (name == isa_name(isa))
            throw py::value_error("this CPU or this build has no " + name + ", only: " + join_names(have));
    throw py::value_error("unknown instruction set '" + name + "', known: " + join_names(all));
}

unsigned long main_thread = 0;

// Runs pending Python signal handlers; true if one raised, with its exception set. Python runs handlers on its main
// thread only: other threads do not wait for the GIL here.
bool handler_raised() {
    if (PyThread_get_thread_ident() != main_thread) return false;
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// Lets long ops run Python's signal handlers, and end if one raises.
void watch_signals() {
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    set_stop(&handler_raised);
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const Stopped&) {  // the handler's exception is already set
        }
    });
}

}  // namespace

Isa checked_isa(int isa, int dtype) {
    static const std::vector<Isa> have = supported_isas();
    if (std::find(have.begin(), have.end(), static_cast<Isa>(isa)) == have.end())
        throw py::value_error("no instruction set of number " + std::to_string(isa) + " here");
    if (dtype != static_cast<int>(DType::f32) && dtype != static_cast<int>(DType::bf16))
        throw py::value_error("the CPU kernels take fp32 and bf16 only");
    return static_cast<Isa>(isa);
}

Precision checked_precision(int precision) {
    if (precision < 0 || precision > static_cast<int>(Precision::highest))
        throw py::value_error("no precision of number " + std::to_string(precision));
    return static_cast<Precision>(precision);
}

void check_offsets(const int32_t* cu_seqlens, int64_t B, int64_t T) {
    if (B < 0) throw py::value_error("cu_seqlens is empty; offsets must rise from 0 to the number of tokens");
    for (int64_t b = 0; b <= B; ++b)
        if (cu_seqlens[b] < (b ? cu_seqlens[b - 1] : 0) || cu_seqlens[b] > (b ? T : 0) || (b == B && cu_seqlens[b] != T))
            throw py::value_error("cu_seqlens[" + std::to_string(b) + "] is " + std::to_string(cu_seqlens[b]) +
                                  "; offsets must rise from 0 to the number of tokens, " + std::to_string(T));
}

Dropout dropout_of(uint64_t seed, double p) {
    // p < 1, so this fits; rounding p to 1 would drop all.
    const double threshold = p * 4294967296.0;
    return {seed, threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 4294967295u,
            static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace fastbert::bindings

PYBIND11_MODULE(_C, m) {
    using namespace fastbert;
    using namespace fastbert::bindings;
    m.doc() = "The C++ and CUDA kernels of fastbert; use fastbert.native";
    m.attr("F32") = static_cast<int>(DType::f32);
    m.attr("BF16") = static_cast<int>(DType::bf16);
#ifdef _OPENMP
    m.attr("has_openmp") = true;
#else
    m.attr("has_openmp") = false;
#endif
#ifdef FASTBERT_HAS_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    m.def("cpu_features", [] {
        std::vector<std::string> names;
        for (const char* name : cpu_features()) names.emplace_back(name);
        return names;
    });
    m.attr("HUGE_PAGE") = HUGE_PAGE;
    m.def("prefer_huge_pages", [](Address memory, int64_t bytes) { prefer_huge_pages(memory, bytes); });
    m.def("isas", &isas);
    m.def("isa_id", &isa_id);
    watch_signals();
    bind_add_layer_norm(m);
    bind_attention(m);
    bind_encode_batch(m);
    bind_encoder(m);
    bind_embed_layer_norm(m);
    bind_linear(m);
    bind_linear_cross_entropy(m);
    bind_packing(m);
    bind_peak(m);
    bind_rotary(m);
    bind_checksum(m);
    bind_same_objects(m);
}
