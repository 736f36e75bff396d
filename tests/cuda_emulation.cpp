// csrc/cuda's functions for ctypes: a binding's arguments, but for the device and the stream. Addresses are numbers.
#include "cuda_runtime.h"
#include "fastbert.h"

using namespace fastbert;

template <typename T = void>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

extern "C" {

int pack_mask(int mask_bytes, int64_t B, int64_t S, int64_t mask, int64_t cu_seqlens, int64_t indices, int64_t places,
              int64_t bad, int64_t workspace) {
    const PackMask op = {mask_bytes, B, S, at(mask), at<int32_t>(cu_seqlens), at<int64_t>(indices),
                         at<int64_t>(places), at<int32_t>(bad), at<int64_t>(workspace)};
    return pack_mask_cuda(op, 0, nullptr);
}

int64_t workspace(int64_t positions) { return pack_mask_workspace(positions); }

int gather_rows(int64_t M, int64_t rows, int64_t row_bytes, int64_t x, int64_t stride_x, int64_t index, int64_t y) {
    const TakeRows op = {M, rows, row_bytes, at(x), at<int64_t>(index), at(y), stride_x};
    return gather_rows_cuda(op, 0, nullptr);
}

void set_order(int order) { emulation::order = static_cast<emulation::Order>(order); }
}
