// What the files of this folder share. They hand pointers, sizes and strides to C++ and nothing back;
// fastbert/native/ checks the tensors first, what is checked here is only what would crash.
#pragma once

#include <pybind11/pybind11.h>

#include "bwd.h"

namespace fastbert::bindings {

namespace py = pybind11;

// A pointer that Python passes as a number; it converts to a pointer to any type.
struct Address {
    uintptr_t number = 0;
    template <typename T>
    operator T*() const { return reinterpret_cast<T*>(number); }
};

// Throws where a number that came from Python would crash: no such instruction set here, no such dtype on CPU.
Isa checked_isa(int isa, int dtype);
Precision checked_precision(int precision);
// Throws where offsets do not rise from 0 to T: rows would be read that do not exist, or left unwritten.
void check_offsets(const int32_t* cu_seqlens, int64_t B, int64_t T);

Dropout dropout_of(uint64_t seed, double p);

// Runs an op without Python's lock.
template <typename Op>
void call(void (*run)(const Op& op, Isa isa, int threads), const Op& op, int dtype, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    run(op, checked, threads);
}

// One a file: arguments go by position, keywords would double the cost of a call.
void bind_add_layer_norm(py::module_& m);
void bind_attention(py::module_& m);
void bind_encoder(py::module_& m);
void bind_embed_layer_norm(py::module_& m);
void bind_linear(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);
void bind_packing(py::module_& m);
void bind_peak(py::module_& m);
void bind_checksum(py::module_& m);

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
