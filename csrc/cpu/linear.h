// What linear.cpp offers to ops that are made of products. For sources of the base instruction set.
#pragma once

#include "kernels.h"

namespace fastbert {

const LinearKernel& linear_kernel(DType dtype, Precision precision, Isa isa);

// Memory for the rows of x as the kernel wants them; 0 where it takes them as they are.
int64_t prepared_bytes(DType dtype, Precision precision, int64_t M, int64_t K, Isa isa);
void place_prepared(Linear& op, void* memory);

}  // namespace fastbert
