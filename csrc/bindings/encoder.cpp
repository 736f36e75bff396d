#include "bindings.h"

namespace fastbert::bindings {
namespace {

// Python has the layers as they lie here: nine words of 64 bits each, eight of them pointers.
static_assert(sizeof(EncoderLayer) == 9 * sizeof(uint64_t));

// What the two calls below share: all but the pointers to data.
Encoder encoder_args(int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B, int64_t L,
                     uintptr_t layers) {
    Encoder op = {};
    op.dtype = static_cast<DType>(dtype);
    op.precision = checked_precision(precision);
    op.activation = static_cast<Activation>(activation);
    op.T = T;
    op.E = E;
    op.H = H;
    op.B = B;
    op.L = L;
    op.layers = static_cast<const EncoderLayer*>(pointer(layers));
    return op;
}

int64_t encoder_workspace_bytes_binding(int dtype, int precision, int64_t T, int64_t E, int64_t H, int64_t L,
                                        uintptr_t layers, int isa, int threads) {
    const Encoder op = encoder_args(dtype, precision, 0, T, E, H, 0, L, layers);
    return encoder_workspace_bytes(op, checked_isa(isa, dtype), threads);
}

void encoder_cpu_binding(int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B,
                         int64_t L, uintptr_t layers, uintptr_t cu_seqlens, uintptr_t x, uintptr_t y,
                         uintptr_t workspace, float eps, float scale_log2, int isa, int threads) {
    Encoder op = encoder_args(dtype, precision, activation, T, E, H, B, L, layers);
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
