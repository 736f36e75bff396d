// y = LayerNorm(x + residual) * weight + bias for a range of rows; compiled once per instruction set.
//
// Each row is read three times, from memory once and then from the L1 cache: the mean, then the squares
// about that mean, then the output. E[x^2] - E[x]^2 would save one pass and lose all digits where the
// mean is large against the spread. Everything between load and store is fp32, the sum x + residual too.
#include <math.h>  // sqrtf, a C function: std::sqrt is inline, see kernels.h

#include "kernels.h"
#include "vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// One row of x + residual.
template <typename T>
struct Row {
    const T* x;
    const T* residual;
    int64_t N;

    Vec at(int64_t n) const {
        const Vec v = load(x + n);
        return residual ? add(v, load(residual + n)) : v;
    }
    Vec tail(int64_t n, int lanes) const {
        const Vec v = load_n(x + n, lanes);
        return residual ? add(v, load_n(residual + n, lanes)) : v;
    }
};

template <typename T>
float row_mean(const Row<T>& row) {
    Vec a = set(0.0f), b = set(0.0f);
    int64_t n = 0;
    for (; n + 2 * WIDTH <= row.N; n += 2 * WIDTH) {
        a = add(a, row.at(n));
        b = add(b, row.at(n + WIDTH));
    }
    for (; n + WIDTH <= row.N; n += WIDTH) a = add(a, row.at(n));
    if (n < row.N) b = add(b, row.tail(n, static_cast<int>(row.N - n)));
    return sum(add(a, b)) / static_cast<float>(row.N);
}

template <typename T>
float row_variance(const Row<T>& row, float mean) {
    const Vec m = set(mean);
    Vec a = set(0.0f), b = set(0.0f);
    int64_t n = 0;
    for (; n + 2 * WIDTH <= row.N; n += 2 * WIDTH) {
        const Vec u = sub(row.at(n), m), v = sub(row.at(n + WIDTH), m);
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; n + WIDTH <= row.N; n += WIDTH) {
        const Vec u = sub(row.at(n), m);
        a = fma(u, u, a);
    }
    if (n < row.N) {
        const int lanes = static_cast<int>(row.N - n);
        const Vec u = keep_n(sub(row.tail(n, lanes), m), lanes);
        b = fma(u, u, b);
    }
    return sum(add(a, b)) / static_cast<float>(row.N);
}

template <typename T>
void add_layer_norm(const AddLayerNorm& op, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    for (int64_t m = begin; m < end; ++m) {
        const T* residual = static_cast<const T*>(op.residual);
        const Row<T> row{static_cast<const T*>(op.x) + m * op.stride_xm,
                         residual ? residual + m * op.stride_rm : nullptr, op.N};
        T* y = static_cast<T*>(op.y) + m * op.stride_ym;
        const float mean = row_mean(row);
        const Vec shift = set(mean);
        const Vec rstd = set(1.0f / sqrtf(row_variance(row, mean) + op.eps));
        int64_t n = 0;
        for (; n + WIDTH <= op.N; n += WIDTH) {
            const Vec unit = mul(sub(row.at(n), shift), rstd);
            store(y + n, fma(unit, load(weight + n), load(bias + n)));
        }
        if (n < op.N) {
            const int lanes = static_cast<int>(op.N - n);
            const Vec unit = mul(sub(row.tail(n, lanes), shift), rstd);
            store_n(y + n, fma(unit, load_n(weight + n, lanes), load_n(bias + n, lanes)), lanes);
        }
    }
}

}  // namespace

const AddLayerNormKernels add_layer_norm_kernels = {add_layer_norm<float>, add_layer_norm<bf16>};

}  // namespace fastbert::FASTBERT_ISA
