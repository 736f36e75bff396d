#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

#ifdef FASTBERT_HAS_CUDA
template <typename Op>
void launch(int (*run)(const Op& op, int device, void* stream), const Op& op, int device, Address stream,
            const char* name) {
    int error;
    {
        py::gil_scoped_release nogil;
        error = run(op, device, stream);
    }
    if (error) throw std::runtime_error(std::string(name) + ": CUDA: " + cuda_error_string(error));
}
#endif

}  // namespace

void bind_packing(py::module_& m) {
    m.def("read_mask_cpu", [](int mask_bytes, uint64_t one, uint64_t magnitude, int64_t B, int64_t S, Address mask,
                              Address cu_seqlens, Address indices) {
        const ReadMask op = {mask_bytes, one, magnitude, B, S, mask, cu_seqlens, indices};
        MaskSummary found;
        {
            py::gil_scoped_release nogil;
            found = read_mask_cpu(op);
        }
        return py::make_tuple(found.tokens, found.longest, found.leading_pads, found.bad);
    });
    m.def("bounds_cpu", [](int bytes, int64_t n, Address x) {
        py::gil_scoped_release nogil;
        return bounds_cpu(bytes, n, x);
    });
#ifdef FASTBERT_HAS_CUDA
    m.def("pack_mask_workspace", &pack_mask_workspace);
    m.def("pack_mask_cuda", [](int mask_bytes, int64_t B, int64_t S, Address mask, Address cu_seqlens, Address indices,
                               Address places, Address bad, Address workspace, int device, Address stream) {
        if (mask_bytes != 1 && mask_bytes != 4 && mask_bytes != 8)
            throw py::value_error("a mask's values are 1, 4 or 8 bytes, not " + std::to_string(mask_bytes));
        const PackMask op = {mask_bytes, B, S, mask, cu_seqlens, indices, places, bad, workspace};
        launch(pack_mask_cuda, op, device, stream, "pack_mask");
    });
    m.def("gather_rows_cuda", [](int64_t M, int64_t rows, int64_t row_bytes, Address x, int64_t stride_x, Address index,
                               Address y, int device, Address stream) {
        launch(gather_rows_cuda, TakeRows{M, rows, row_bytes, x, index, y, stride_x}, device, stream, "gather_rows");
    });
#endif
}

}  // namespace fastbert::bindings
