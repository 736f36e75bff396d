// y = LayerNorm(x + residual) * weight + bias, or RMSNorm, for a range of rows; compiled once per instruction set.
//
// Each row is read three times, from memory once and then from the L1 cache: for the mean, for the squares about that
// mean, and for the output. E[x^2] - E[x]^2 would save one pass but cancel where the mean is large against the spread.
// The mean is rounded, so the second pass also sums its error: otherwise a row of equal numbers would not become zeros.
// Everything between load and store is fp32, including the sum x + residual.
#include <math.h>  // sqrtf, a C function: std::sqrt is inline, see kernels.h

#include "kernels.h"
#include "rows.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// One row of x + residual.
template <typename T>
struct Row {
    const T* x;
    const T* residual;
    int64_t N;

    Vec at(int64_t n, int lanes) const {
        const Vec v = load_part(x + n, lanes);
        return residual ? add(v, load_part(residual + n, lanes)) : v;
    }
};

// Returns the variance and, in `off`, the mean of row - mean.
template <typename T>
float row_variance(const Row<T>& row, float mean, float& off) {
    const Vec m = set(mean);
    Vec a = set(0.0f), b = set(0.0f), c = set(0.0f), d = set(0.0f);
    int64_t n = 0;
    for (; n + 2 * WIDTH <= row.N; n += 2 * WIDTH) {
        const Vec u = sub(row.at(n, WIDTH), m), v = sub(row.at(n + WIDTH, WIDTH), m);
        a = fma(u, u, a);
        b = fma(v, v, b);
        c = add(c, u);
        d = add(d, v);
    }
    for (; n + WIDTH <= row.N; n += WIDTH) {
        const Vec u = sub(row.at(n, WIDTH), m);
        a = fma(u, u, a);
        c = add(c, u);
    }
    if (n < row.N) {
        const int lanes = static_cast<int>(row.N - n);
        const Vec u = keep_n(sub(row.at(n, lanes), m), lanes);
        b = fma(u, u, b);
        d = add(d, u);
    }
    off = sum(add(c, d)) / static_cast<float>(row.N);
    return variance_about(sum(add(a, b)) / static_cast<float>(row.N), off);
}

template <typename T>
float mean_square(const Row<T>& row) {
    const float total = sum_along(row.N, [&](Vec acc, int64_t n, int lanes) {
        const Vec v = row.at(n, lanes);  // zero beyond the row
        return fma(v, v, acc);
    });
    return total / static_cast<float>(row.N);
}

// y = ((row - shift) * rstd + rest) * weight + bias.
template <typename T>
static inline void normalise(const Row<T>& row, Vec shift, Vec rstd, Vec rest, const T* weight, const T* bias, T* y) {
    along(row.N, [&](int64_t n, int lanes) {
        const Vec unit = fma(sub(row.at(n, lanes), shift), rstd, rest), factor = load_part(weight + n, lanes);
        store_part(y + n, bias ? fma(unit, factor, load_part(bias + n, lanes)) : mul(unit, factor), lanes);
    });
}

template <typename T>
void add_layer_norm(const AddLayerNorm& op, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    for (int64_t m = begin; m < end; ++m) {
        const T* residual = static_cast<const T*>(op.residual);
        Row<T> row{static_cast<const T*>(op.x) + m * op.stride_xm, residual ? residual + m * op.stride_rm : nullptr, op.N};
        if (op.sum) {
            T* sum = static_cast<T*>(op.sum) + m * op.stride_sm;
            along(op.N, [&](int64_t n, int lanes) { store_part(sum + n, row.at(n, lanes), lanes); });
            row = {sum, nullptr, op.N};
        }
        T* y = static_cast<T*>(op.y) + m * op.stride_ym;
        if (op.rms) {
            normalise(row, set(0.0f), set(1.0f / sqrtf(mean_square(row) + op.eps)), set(0.0f), weight, bias, y);
            continue;
        }
        const float total = sum_along(op.N, [&](Vec acc, int64_t n, int lanes) { return add(acc, row.at(n, lanes)); });
        const float mean = total / static_cast<float>(op.N);
        float off;
        const float scale = 1.0f / sqrtf(row_variance(row, mean, off) + op.eps);
        normalise(row, set(mean), set(scale), set(-off * scale), weight, bias, y);
    }
}

}  // namespace

const AddLayerNormKernels add_layer_norm_kernels = {add_layer_norm<float>, add_layer_norm<bf16>};

}  // namespace fastbert::FASTBERT_ISA
