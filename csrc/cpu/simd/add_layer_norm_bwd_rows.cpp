// LayerNorm(dropout(x) + residual) * weight + bias, saving its statistics, and its gradients; compiled once per
// instruction set.
//
// With u = (h - mean) * rstd of h = dropout(x) + residual, and g = dy * weight:
//     dh = rstd * (g - mean(g) - u * mean(g * u)),  dresidual = dh,  dx = dropout(dh),
//     dweight = sum over rows of dy * u,  dbias = sum over rows of dy.
// The gradient of h itself, where h is an output too, is added to dh. RMSNorm has neither mean nor mean(g).
// The backward recomputes h from x, residual and the mask's hash instead of storing it: the residual is saved in any
// case, by the layer that made or reads it.
#include <math.h>  // sqrtf: see add_layer_norm_rows.cpp

#include "dropout.h"
#include "kernels.h"
#include "rows.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Writes h of row m and, with dropout, the mask's factors.
template <typename T>
void sum_row(const AddLayerNorm& op, const Dropout& dropout, int64_t m, float* h, float* factors) {
    const T* x = static_cast<const T*>(op.x) + m * op.stride_xm;
    const T* residual = op.residual ? static_cast<const T*>(op.residual) + m * op.stride_rm : nullptr;
    const RowKey key = row_key(dropout.seed, m);
    const Words a = fill(key.a), b = fill(key.b);
    along(op.N, [&](int64_t n, int lanes) {
        Vec v = load_part(x + n, lanes);
        if (dropout.threshold) {
            const Vec factor = keep_factor(dropout, a, b, count_from(static_cast<uint32_t>(n)));
            store(factors + n, factor);
            v = factor > set(0.0f) ? mul(v, factor) : factor;
        }
        if (residual) v = add(v, load_part(residual + n, lanes));
        if (op.rounded) {
            T rounded[WIDTH];
            store(rounded, v);
            v = load(rounded);
        }
        store(h + n, v);
    });
}

// The mean of h - shift: the rounding error of the mean `shift`.
float distance(const float* h, Vec shift, int64_t N) {
    const float total = sum_along(N, [&](Vec acc, int64_t n, int lanes) {
        const Vec u = sub(load_part(h + n, lanes), shift);
        return add(acc, lanes == WIDTH ? u : keep_n(u, lanes));
    });
    return total / static_cast<float>(N);
}

int64_t scratch(int64_t N) { return (N + WIDTH - 1) / WIDTH * WIDTH; }

template <typename T>
void forward(const AddLayerNormFwdTrain& training, int64_t begin, int64_t end, float* memory) {
    const AddLayerNorm& op = training.op;
    const T* weight = static_cast<const T*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    const float count = static_cast<float>(op.N);
    float* h = memory;
    for (int64_t m = begin; m < end; ++m) {
        sum_row<T>(op, training.dropout, m, h, memory + scratch(op.N));
        if (op.sum) {
            T* sum = static_cast<T*>(op.sum) + m * op.stride_sm;
            along(op.N, [&](int64_t n, int lanes) { store_part(sum + n, load_part(h + n, lanes), lanes); });
        }
        const float total =
            op.rms ? 0.0f : sum_along(op.N, [&](Vec acc, int64_t n, int lanes) { return add(acc, load_part(h + n, lanes)); });
        const float mean = total / count;
        const Vec shift = set(mean);
        const float off = op.rms ? 0.0f : distance(h, shift, op.N);
        const float squares = sum_along(op.N, [&](Vec acc, int64_t n, int lanes) {
            const Vec u = sub(load_part(h + n, lanes), shift);
            const Vec v = lanes == WIDTH ? u : keep_n(u, lanes);
            return fma(v, v, acc);
        }) / count;
        const float rstd = 1.0f / sqrtf(variance_about(squares, off) + op.eps);
        const Vec rest = set(-off * rstd);
        if (training.mean) training.mean[m] = mean;
        if (training.rstd) training.rstd[m] = rstd;
        T* y = static_cast<T*>(op.y) + m * op.stride_ym;
        along(op.N, [&](int64_t n, int lanes) {
            const Vec unit = fma(sub(load_part(h + n, lanes), shift), set(rstd), rest);
            const Vec factor = load_part(weight + n, lanes);
            store_part(y + n, bias ? fma(unit, factor, load_part(bias + n, lanes)) : mul(unit, factor), lanes);
        });
    }
}

template <typename T>
void backward(const AddLayerNormBwd& back, int64_t block, float* memory) {
    const AddLayerNorm& op = back.op;
    const bool sums = back.dweight || back.dbias, gradients = back.dx || back.dresidual;
    const T* weight = static_cast<const T*>(op.weight);
    const float count = static_cast<float>(op.N);
    float* u = memory;
    float* factors = memory + scratch(op.N);
    float* dweight = back.partials + block * 2 * op.N;
    float* dbias = dweight + op.N;
    if (sums)
        for (int64_t n = 0; n < 2 * op.N; ++n) dweight[n] = 0.0f;

    const int64_t begin = block * PARTIAL_ROWS, end = begin + PARTIAL_ROWS < op.M ? begin + PARTIAL_ROWS : op.M;
    for (int64_t m = begin; m < end; ++m) {
        const T* dy = static_cast<const T*>(back.dy) + m * back.stride_dym;
        T* dx = back.dx ? static_cast<T*>(back.dx) + m * op.N : nullptr;
        T* dresidual = back.dresidual ? static_cast<T*>(back.dresidual) + m * op.N : nullptr;
        const Vec shift = set(back.mean[m]), rstd = set(back.rstd[m]);
        sum_row<T>(op, back.dropout, m, u, factors);
        const T* dsum = back.dsum ? static_cast<const T*>(back.dsum) + m * back.stride_dsm : nullptr;
        const Vec rest = set(op.rms ? 0.0f : -distance(u, shift, op.N) * back.rstd[m]);
        const float g = sum_along(op.N, [&](Vec acc, int64_t n, int lanes) {
            return fma(load_part(dy + n, lanes), load_part(weight + n, lanes), acc);
        });
        const float gu = sum_along(op.N, [&](Vec acc, int64_t n, int lanes) {
            const Vec d = load_part(dy + n, lanes), unit = fma(sub(load(u + n), shift), rstd, rest);
            store(u + n, unit);
            if (sums) {
                store_part(dweight + n, fma(d, unit, load_part(dweight + n, lanes)), lanes);
                store_part(dbias + n, add(d, load_part(dbias + n, lanes)), lanes);
            }
            const Vec term = mul(d, load_part(weight + n, lanes));
            return fma(term, lanes == WIDTH ? unit : keep_n(unit, lanes), acc);
        });
        if (!gradients) continue;
        const Vec mean_g = set(op.rms ? 0.0f : g / count), mean_gu = set(gu / count);
        along(op.N, [&](int64_t n, int lanes) {
            const Vec centred = sub(mul(load_part(dy + n, lanes), load_part(weight + n, lanes)), mean_g);
            const Vec through = mul(rstd, sub(centred, mul(load(u + n), mean_gu)));
            const Vec dh = dsum ? add(through, load_part(dsum + n, lanes)) : through;
            if (dresidual) store_part(dresidual + n, dh, lanes);
            if (dx) store_part(dx + n, back.dropout.threshold ? mul(dh, load(factors + n)) : dh, lanes);
        });
    }
}

}  // namespace

const AddLayerNormBwdKernels add_layer_norm_fwd_train_kernels = {scratch, forward<float>, forward<bf16>,
                                                                     backward<float>, backward<bf16>};

}  // namespace fastbert::FASTBERT_ISA
