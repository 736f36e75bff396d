#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

py::tuple read_mask_binding(int mask_bytes, uint64_t one, uint64_t magnitude, int64_t B, int64_t S, uintptr_t mask,
                            uintptr_t cu_seqlens, uintptr_t indices) {
    const ReadMask op = {mask_bytes, one, magnitude, B, S, pointer(mask), static_cast<int32_t*>(pointer(cu_seqlens)),
                         static_cast<int64_t*>(pointer(indices))};
    MaskSummary found;
    {
        py::gil_scoped_release nogil;
        found = read_mask_cpu(op);
    }
    return py::make_tuple(found.tokens, found.longest, found.leading_pads, found.bad);
}

#ifdef FASTBERT_HAS_CUDA
void raise_on(int error, const char* op) {
    if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + cuda_error_string(error));
}

void pack_mask_cuda_binding(int mask_bytes, int64_t B, int64_t S, uintptr_t mask, uintptr_t cu_seqlens, uintptr_t indices,
                            uintptr_t places, uintptr_t bad, uintptr_t workspace, int device, uintptr_t stream) {
    if (mask_bytes != 1 && mask_bytes != 4 && mask_bytes != 8)
        throw py::value_error("a mask's values are 1, 4 or 8 bytes, not " + std::to_string(mask_bytes));
    const PackMask op = {mask_bytes, B, S, pointer(mask), static_cast<int32_t*>(pointer(cu_seqlens)),
                         static_cast<int64_t*>(pointer(indices)), static_cast<int64_t*>(pointer(places)),
                         static_cast<int32_t*>(pointer(bad)), static_cast<int64_t*>(pointer(workspace))};
    int error;
    {
        py::gil_scoped_release nogil;
        error = pack_mask_cuda(op, device, pointer(stream));
    }
    raise_on(error, "pack_mask");
}

void take_rows_cuda_binding(int64_t M, int64_t rows, int64_t row_bytes, uintptr_t x, int64_t stride_x, uintptr_t index,
                            uintptr_t y, int device, uintptr_t stream) {
    const TakeRows op = {M, rows, row_bytes, pointer(x), static_cast<const int64_t*>(pointer(index)), pointer(y), stride_x};
    int error;
    {
        py::gil_scoped_release nogil;
        error = take_rows_cuda(op, device, pointer(stream));
    }
    raise_on(error, "take_rows");
}

#endif

}  // namespace

void bind_packing(py::module_& m) {
    m.def("read_mask_cpu", &read_mask_binding);
    m.def("bounds_cpu", [](int bytes, int64_t n, uintptr_t x) {
        py::gil_scoped_release nogil;
        return bounds_cpu(bytes, n, pointer(x));
    });
#ifdef FASTBERT_HAS_CUDA
    m.def("pack_mask_workspace", &pack_mask_workspace);
    m.def("pack_mask_cuda", &pack_mask_cuda_binding);
    m.def("take_rows_cuda", &take_rows_cuda_binding);
#endif
}

}  // namespace fastbert::bindings
