#include "bindings.h"

namespace fastbert::bindings {
namespace {

void attention_cpu_binding(int dtype, int64_t T, int64_t B, int64_t H, int64_t D, uintptr_t qkv, int64_t stride_t,
                           int64_t stride_3, uintptr_t cu_seqlens, uintptr_t y, float scale_log2, int isa, int threads) {
    const Attention op = {static_cast<DType>(dtype), T, B, H, D, pointer(qkv),
                          static_cast<const int32_t*>(pointer(cu_seqlens)), pointer(y), stride_t, stride_3, scale_log2};
    check_offsets(op.cu_seqlens, B, T);
    const Isa checked = checked_isa(isa, dtype);
    py::gil_scoped_release nogil;
    attention_cpu(op, checked, threads);
}

}  // namespace

void bind_attention(py::module_& m) { m.def("attention_cpu", &attention_cpu_binding); }

}  // namespace fastbert::bindings
