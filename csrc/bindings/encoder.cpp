#include "bindings.h"

namespace fastbert::bindings {
namespace {

// Python lays out the layers the same way: eleven words of 64 bits each, nine of them pointers.
static_assert(sizeof(EncoderLayer) == 11 * sizeof(uint64_t));

}  // namespace

Encoder encoder_of(const EncoderKind& kind, int64_t L, Address layers) {
    const auto& [dtype, precision, activation, gated, pre_norm, rms, E, H, G, eps, scale_log2, weight, bias] = kind;
    Encoder op = {};
    op.dtype = static_cast<DType>(dtype);
    op.precision = checked_precision(precision);
    op.activation = static_cast<Activation>(activation);
    op.gated = gated, op.pre_norm = pre_norm, op.rms = rms;
    op.E = E, op.H = H, op.G = G;
    op.L = L, op.layers = layers;
    op.eps = eps, op.scale_log2 = scale_log2;
    op.final_weight = weight, op.final_bias = bias;
    return op;
}

void bind_encoder(py::module_& m) {
    m.def("encoder_workspace_bytes", [](const EncoderKind& kind, int64_t L, Address layers, int64_t T, int64_t P, int isa,
                                        int threads) {
        Encoder op = encoder_of(kind, L, layers);
        op.T = T, op.P = P;
        return encoder_workspace_bytes(op, checked_isa(isa, static_cast<int>(op.dtype)), threads);
    });
    m.def("encoder_cpu", [](const EncoderKind& kind, int64_t L, Address layers, int64_t T, int64_t B, Address cu_seqlens,
                            Address x, Address y, Address workspace, Address distance_bias, int64_t reach,
                            Address positions, Address picked, int64_t P, int isa, int threads) {
        Encoder op = encoder_of(kind, L, layers);
        op.T = T, op.B = B, op.cu_seqlens = cu_seqlens;
        op.x = x, op.y = y, op.workspace = workspace;
        op.distance_bias = distance_bias, op.reach = reach;
        op.positions = positions;
        op.picked = picked, op.P = P;
        if (P > T) throw py::value_error("more tokens are picked than there are");
        for (int64_t i = 0; i < P; ++i)
            if (op.picked[i] < 0 || op.picked[i] >= T)
                throw py::value_error("picked holds " + std::to_string(op.picked[i]) + "; there are " +
                                      std::to_string(T) + " tokens");
        check_offsets(op.cu_seqlens, B, T);
        call(encoder_cpu, op, static_cast<int>(op.dtype), isa, threads);
    });
}

}  // namespace fastbert::bindings
