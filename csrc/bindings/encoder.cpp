#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

constexpr int WORDS_A_LAYER = 9;  // the members of EncoderLayer

// What the two calls below share: all but the pointers to data.
Encoder encoder_args(int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B,
                     const std::vector<EncoderLayer>& layers) {
    Encoder op = {};
    op.dtype = static_cast<DType>(dtype);
    op.precision = checked_precision(precision);
    op.activation = static_cast<Activation>(activation);
    op.T = T;
    op.E = E;
    op.H = H;
    op.B = B;
    op.L = static_cast<int64_t>(layers.size());
    op.layers = layers.data();
    return op;
}

std::vector<EncoderLayer> layers_of(const std::vector<uintptr_t>& words) {
    std::vector<EncoderLayer> layers;
    for (size_t i = 0; i + WORDS_A_LAYER <= words.size(); i += WORDS_A_LAYER)
        layers.push_back({pointer(words[i]), pointer(words[i + 1]), pointer(words[i + 2]), pointer(words[i + 3]),
                          pointer(words[i + 4]), pointer(words[i + 5]), pointer(words[i + 6]), pointer(words[i + 7]),
                          static_cast<int64_t>(words[i + 8])});
    return layers;
}

int64_t encoder_workspace_bytes_binding(int dtype, int precision, int64_t T, int64_t E, int64_t H,
                                        const std::vector<uintptr_t>& words, int isa, int threads) {
    const std::vector<EncoderLayer> layers = layers_of(words);
    return encoder_workspace_bytes(encoder_args(dtype, precision, 0, T, E, H, 0, layers), checked_isa(isa, dtype), threads);
}

void encoder_cpu_binding(int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B,
                         const std::vector<uintptr_t>& words, uintptr_t cu_seqlens, uintptr_t x, uintptr_t y,
                         uintptr_t workspace, float eps, float scale_log2, int isa, int threads) {
    const std::vector<EncoderLayer> layers = layers_of(words);
    Encoder op = encoder_args(dtype, precision, activation, T, E, H, B, layers);
    op.cu_seqlens = static_cast<const int32_t*>(pointer(cu_seqlens));
    op.x = pointer(x);
    op.y = pointer(y);
    op.workspace = pointer(workspace);
    op.eps = eps;
    op.scale_log2 = scale_log2;
    check_offsets(op.cu_seqlens, B, T);
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    encoder_cpu(op, checked, threads);
}

}  // namespace

void bind_encoder(py::module_& m) {
    m.def("encoder_workspace_bytes", &encoder_workspace_bytes_binding);
    m.def("encoder_cpu", &encoder_cpu_binding);
}

}  // namespace fastbert::bindings
