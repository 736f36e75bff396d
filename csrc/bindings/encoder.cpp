#include "bindings.h"

namespace fastbert::bindings {
namespace {

// Python lays out the layers the same way: nine words of 64 bits each, eight of them pointers.
static_assert(sizeof(EncoderLayer) == 9 * sizeof(uint64_t));

// The arguments that the two calls below share: all but the data pointers.
Encoder encoder_of(int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B, int64_t L,
                   Address layers) {
    Encoder op = {};
    op.dtype = static_cast<DType>(dtype);
    op.precision = checked_precision(precision);
    op.activation = static_cast<Activation>(activation);
    op.T = T;
    op.E = E;
    op.H = H;
    op.B = B;
    op.L = L;
    op.layers = layers;
    return op;
}

}  // namespace

void bind_encoder(py::module_& m) {
    m.def("encoder_workspace_bytes", [](int dtype, int precision, int64_t T, int64_t E, int64_t H, int64_t L,
                                        Address layers, int isa, int threads) {
        const Encoder op = encoder_of(dtype, precision, 0, T, E, H, 0, L, layers);
        return encoder_workspace_bytes(op, checked_isa(isa, dtype), threads);
    });
    m.def("encoder_cpu", [](int dtype, int precision, int activation, int64_t T, int64_t E, int64_t H, int64_t B,
                            int64_t L, Address layers, Address cu_seqlens, Address x, Address y, Address workspace,
                            float eps, float scale_log2, Address distance_bias, int64_t reach, int isa, int threads) {
        Encoder op = encoder_of(dtype, precision, activation, T, E, H, B, L, layers);
        op.cu_seqlens = cu_seqlens;
        op.x = x;
        op.y = y;
        op.workspace = workspace;
        op.eps = eps;
        op.scale_log2 = scale_log2;
        op.distance_bias = distance_bias;
        op.reach = reach;
        check_offsets(op.cu_seqlens, B, T);
        call(encoder_cpu, op, dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
