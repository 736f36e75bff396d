// The steps of linear_cross_entropy between its products, on transposed logits; compiled once per instruction set.
//
// Logits are (V, K): a row belongs to a word of the vocabulary, a column to a token. A vector holds one word's logits
// of WIDTH tokens, so maximum, sum and softmax need no reduction across lanes. K is a multiple of WIDTH.
#include "kernels.h"
#include "vec_math.h"

namespace fastbert::FASTBERT_ISA {
namespace {

Vec element(const float* p) { return set(*p); }
Vec element(const bf16* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return set(value);
}

// Vocabulary rows [begin, end): top[k] = max_v logit and total[k] = sum_v exp(logit - top[k]), logits with their bias.
template <typename T>
void statistics(const CrossEntropy& op, int64_t begin, int64_t end, float* top, float* total) {
    const T *logits = static_cast<const T*>(op.logits), *bias = static_cast<const T*>(op.bias);
    for (int64_t k = 0; k < op.K; k += WIDTH) {
        // Rows are taken in groups: one update of the maximum per group, and a sum per group for fp32 accuracy.
        constexpr int64_t GROUP = 8;
        // Not -infinity: where the first logits are -infinity, the difference of the two would be NaN.
        Vec highest = set(-__FLT_MAX__), sums = set(0.0f);
        for (int64_t first = begin; first < end; first += GROUP) {
            const int count = static_cast<int>(end - first < GROUP ? end - first : GROUP);
            Vec v[GROUP], above = highest;
            for (int i = 0; i < count; ++i) {
                v[i] = load(logits + (first + i) * op.K + k);
                if (bias) v[i] = add(v[i], element(bias + first + i));
                above = max(v[i], above);
            }
            Vec part = set(0.0f);
            for (int i = 0; i < count; ++i) part = add(part, exp(sub(v[i], above)));
            sums = fma(sums, exp(sub(highest, above)), part);
            highest = above;
        }
        store(top + k, highest);
        store(total + k, sums);
    }
}

// row_max[k] and sums[k] of tokens [begin, end), combined from `count` tops and totals, (count, 2, K).
void combine(const float* partial, int64_t count, int64_t K, float* row_max, float* sums, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += WIDTH) {
        Vec highest = load(partial + k), total = set(0.0f);
        for (int64_t i = 1; i < count; ++i) highest = max(load(partial + 2 * i * K + k), highest);
        for (int64_t i = 0; i < count; ++i) {
            const float* row = partial + 2 * i * K + k;
            total = fma(load(row + K), exp(sub(load(row), highest)), total);
        }
        store(row_max + k, highest);
        store(sums + k, total);
    }
}

// Vocabulary rows [begin, end): logits become scale (softmax - onehot) in place; dbias, if not null, their row sums.
template <typename T>
void gradient(const CrossEntropy& op, int64_t begin, int64_t end) {
    T* logits = static_cast<T*>(op.logits);
    const T* bias = static_cast<const T*>(op.bias);
    for (int64_t v = begin; v < end; ++v) {
        T* row = logits + v * op.K;
        const Vec shift = bias ? element(bias + v) : set(0.0f);
        const Ints word = Ints{} + static_cast<int32_t>(op.first + v);
        Vec total = set(0.0f);
        for (int64_t k = 0; k < op.K; k += WIDTH) {
            Ints label;
            std::memcpy(&label, op.labels + k, sizeof label);
            const Vec above = exp(sub(add(load(row + k), shift), load(op.row_max + k)));
            const Vec onehot = (Vec)((Ints)set(1.0f) & (Ints)(label == word));
            const Vec out = mul(sub(mul(above, load(op.inverse + k)), onehot), load(op.scale + k));
            total = add(total, out);
            store(row + k, out);
        }
        if (op.dbias) store_n(static_cast<T*>(op.dbias) + v, set(sum(total)), 1);
    }
}

}  // namespace

const CrossEntropyKernels cross_entropy_kernels = {statistics<float>, statistics<bf16>, combine, gradient<float>,
                                                   gradient<bf16>};

}  // namespace fastbert::FASTBERT_ISA
