// Functions of linear.cpp for ops that contain products. For sources of the base instruction set.
#pragma once

#include "kernels.h"

namespace fastbert {

// Throws std::invalid_argument if FASTBERT_BF16, which names one of two products of bf16, has another value.
const LinearKernel& linear_kernel(DType dtype, Precision precision, Isa isa);

// Bytes for the rows of x as the kernel reads them (quantised or split); 0 if it reads x itself.
int64_t prepared_bytes(DType dtype, Precision precision, int64_t M, int64_t K, Isa isa);
void place_prepared(Linear& op, void* memory);

}  // namespace fastbert
