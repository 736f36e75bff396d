// Shared by the bindings, which pass pointers, sizes and strides to C++. fastbert/native/ checks the tensors first;
// these files check only what would crash.
#pragma once

#include <pybind11/pybind11.h>

#include <tuple>

#include "bwd.h"

namespace fastbert::bindings {

namespace py = pybind11;

// A pointer that Python passes as a number; it converts to a pointer to any type.
struct Address {
    uintptr_t number = 0;
    template <typename T>
    operator T*() const { return reinterpret_cast<T*>(number); }
};

// Throws for numbers from Python that would crash: an instruction set not supported here, a dtype without CPU kernels.
Isa checked_isa(int isa, int dtype);
Precision checked_precision(int precision);
// Throws unless offsets rise from 0 to T: otherwise, rows out of bounds would be read, or rows left unwritten.
void check_offsets(const int32_t* cu_seqlens, int64_t B, int64_t T);

Dropout dropout_of(uint64_t seed, double p);

// What all layers share, as Python passes it: dtype, precision, activation, gated, pre_norm, rms, E, H, G, eps,
// scale_log2, the last norm's weight and bias.
using EncoderKind = std::tuple<int, int, int, bool, bool, bool, int64_t, int64_t, int64_t, float, float, Address, Address>;
Encoder encoder_of(const EncoderKind& kind, int64_t L, Address layers);

// Runs an op with the GIL released.
template <typename Op>
void call(void (*run)(const Op& op, Isa isa, int threads), const Op& op, int dtype, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    run(op, checked, threads);
}

// One per file. Arguments are positional: keywords would double the cost of a call.
void bind_add_layer_norm(py::module_& m);
void bind_attention(py::module_& m);
void bind_encode_batch(py::module_& m);
void bind_encoder(py::module_& m);
void bind_embed_layer_norm(py::module_& m);
void bind_linear(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);
void bind_packing(py::module_& m);
void bind_peak(py::module_& m);
void bind_rotary(py::module_& m);
void bind_checksum(py::module_& m);
void bind_same_objects(py::module_& m);

}  // namespace fastbert::bindings

template <>
struct pybind11::detail::type_caster<fastbert::bindings::Address> {
    PYBIND11_TYPE_CASTER(fastbert::bindings::Address, const_name("int"));
    bool load(handle source, bool convert) {
        make_caster<uintptr_t> number;
        if (!number.load(source, convert)) return false;
        value.number = cast_op<uintptr_t>(number);
        return true;
    }
};
