// What the launchers of this folder share.
#pragma once

#include <cuda_runtime.h>

namespace fastbert {

// Launches on `device`, which is made the current one meanwhile; the code of what went wrong, or 0.
template <typename Launch>
int on_device(int device, const Launch& launch) {
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    launch();
    error = cudaGetLastError();
    if (before != device) cudaSetDevice(before);
    return error;
}

}  // namespace fastbert
