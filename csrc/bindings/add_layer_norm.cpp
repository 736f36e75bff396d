#include "bindings.h"

namespace fastbert::bindings {

void bind_add_layer_norm(py::module_& m) {
    m.def("add_layer_norm_cpu", [](int dtype, int64_t M, int64_t N, Address x, int64_t stride_xm, Address residual,
                                   int64_t stride_rm, Address weight, bool rms, Address bias, Address y,
                                   int64_t stride_ym, Address sum, float eps, int isa, int threads) {
        const AddLayerNorm op = {static_cast<DType>(dtype), M, N, x, residual, weight, bias, y, stride_xm, stride_rm,
                                 stride_ym, eps, sum, N, rms};
        call(add_layer_norm_cpu, op, dtype, isa, threads);
    });
    m.def("add_layer_norm_fwd_train_cpu", [](int dtype, int64_t M, int64_t N, Address x, int64_t stride_xm,
                                            Address residual, int64_t stride_rm, Address weight, bool rms, Address bias,
                                            Address y, Address sum, float eps, double p, uint64_t seed, Address mean,
                                            Address rstd, int isa, int threads) {
        const AddLayerNorm op = {static_cast<DType>(dtype), M, N, x, residual, weight, bias, y, stride_xm, stride_rm,
                                 N, eps, sum, N, rms, sum.number != 0};
        call(add_layer_norm_fwd_train_cpu, AddLayerNormFwdTrain{op, dropout_of(seed, p), mean, rstd}, dtype, isa, threads);
    });
    m.def("add_layer_norm_bwd_cpu", [](int dtype, int64_t M, int64_t N, Address x, int64_t stride_xm,
                                            Address residual, int64_t stride_rm, Address weight, bool rms, bool rounded,
                                            double p, uint64_t seed, Address mean, Address rstd, Address dy, int64_t stride_dym,
                                            Address dsum, int64_t stride_dsm, Address dx, Address dresidual, Address dweight, Address dbias,
                                            Address partials, int isa, int threads) {
        const AddLayerNorm op = {static_cast<DType>(dtype), M, N, x, residual, weight, nullptr, nullptr, stride_xm,
                                 stride_rm, N, 0.0f, nullptr, 0, rms, rounded};
        call(add_layer_norm_bwd_cpu,
             AddLayerNormBwd{op, dropout_of(seed, p), mean, rstd, dy, dx, dresidual, dweight, dbias, partials,
                                  stride_dym, dsum, stride_dsm},
             dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
