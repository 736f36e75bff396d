// y = dropout(LayerNorm(word[id] + token_type[type] + position[place])) and its backward; compiled once per
// instruction set.
//
// Forward: a row of each table is read once; their sum stays in the L1 cache for mean, squares and output. The next
// token's word row is prefetched meanwhile: no hardware prefetcher can predict its address.
// Backward: the sum is gathered again, which reads less than storing it in the forward would write. The sum's gradient
// is stored as fp32 rows; sum_rows then adds up the rows of each table row.
#include <math.h>  // sqrtf, a C function: std::sqrt is inline, see kernels.h

#include "dropout.h"
#include "kernels.h"
#include "rows.h"

namespace fastbert::FASTBERT_ISA {
namespace {

#define FASTBERT_INLINE __attribute__((always_inline))

// Calls f(n, lanes, sum) for each vector of a row, with lanes < WIDTH in the last one only. `sum` selects one of SUMS
// accumulators: with a single one, each addition would wait for the one before.
constexpr int SUMS = 4;
template <typename F>
FASTBERT_INLINE inline void vectors(int64_t N, const F& f) {
    int64_t n = 0;
    for (; n + SUMS * WIDTH <= N; n += SUMS * WIDTH) {
        f(n, WIDTH, 0);
        f(n + WIDTH, WIDTH, 1);
        f(n + 2 * WIDTH, WIDTH, 2);
        f(n + 3 * WIDTH, WIDTH, 3);
    }
    for (; n + WIDTH <= N; n += WIDTH) f(n, WIDTH, 0);
    if (n < N) f(n, static_cast<int>(N - n), 1);
}
struct Sums {
    Vec parts[SUMS] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    float total() const { return sum(add(add(parts[0], parts[1]), add(parts[2], parts[3]))); }
};

// The three rows of one token.
template <typename T>
struct Gathered {
    const T *a, *b, *c;

    Gathered(const EmbedLayerNorm& op, int64_t m) : a(row(op.word, m)), b(row(op.token_type, m)), c(row(op.position, m)) {}
    static const T* row(const EmbedTable& table, int64_t m) {
        return static_cast<const T*>(table.rows) + table.ids[m] * table.stride;
    }
    FASTBERT_INLINE Vec at(int64_t n, int lanes) const {
        return add(add(load_part(a + n, lanes), load_part(b + n, lanes)), load_part(c + n, lanes));
    }
};

template <typename T>
void forward(const EmbedLayerNorm& op, int64_t begin, int64_t end, float* sums) {
    const int64_t N = op.N;
    const T *weight = static_cast<const T*>(op.weight), *bias = static_cast<const T*>(op.bias);
    for (int64_t m = begin; m < end; ++m) {
        const Gathered<T> row(op, m);
        const T* next = Gathered<T>::row(op.word, m + 1 < end ? m + 1 : m);
        Sums total;
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            __builtin_prefetch(next + n);
            const Vec v = row.at(n, lanes);
            total.parts[i] = add(total.parts[i], v);
            store_part(sums + n, v, lanes);
        });
        const float mean = total.total() / static_cast<float>(N);
        const Vec shift = set(mean);
        Sums squares, distances;
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            Vec v = sub(load_part(sums + n, lanes), shift);
            if (lanes < WIDTH) v = keep_n(v, lanes);
            squares.parts[i] = fma(v, v, squares.parts[i]);
            distances.parts[i] = add(distances.parts[i], v);
        });
        const float off = distances.total() / static_cast<float>(N);  // rounding error of the mean
        const float variance = variance_about(squares.total() / static_cast<float>(N), off);
        const float rstd = 1.0f / sqrtf(variance + op.eps);
        const Vec rest = set(-off * rstd);
        if (op.statistics) {
            op.statistics[2 * m] = mean;
            op.statistics[2 * m + 1] = rstd;
        }
        const Kept kept(op.dropout, m);
        T* y = static_cast<T*>(op.y) + m * N;
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            const Vec unit = fma(sub(load_part(sums + n, lanes), shift), set(rstd), rest);
            Vec v = fma(unit, load_part(weight + n, lanes), load_part(bias + n, lanes));
            v = kept.of(v, n);
            store_part(y + n, v, lanes);
        });
    }
}

// dsum = rstd (g - mean(g) - unit mean(g unit)) with g = dy weight; rows of fp32. dweight and dbias are sums over
// the rows of this call alone.
template <typename T>
void backward(const EmbedLayerNormBwd& op, int64_t begin, int64_t end, float* dsums, float* units, float* dweight,
              float* dbias) {
    const EmbedLayerNorm& of = op.forward;
    const int64_t N = of.N;
    const T* weight = static_cast<const T*>(of.weight);
    vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
        store_part(dweight + n, set(0.0f), lanes);
        store_part(dbias + n, set(0.0f), lanes);
    });
    for (int64_t m = begin; m < end; ++m) {
        const Gathered<T> row(of, m);
        const Vec mean = set(of.statistics[2 * m]), rstd = set(of.statistics[2 * m + 1]);
        const Kept kept(of.dropout, m);
        const T* next = Gathered<T>::row(of.word, m + 1 < end ? m + 1 : m);
        const T* dy = static_cast<const T*>(op.dy) + m * op.stride_dym;
        float* dsum = dsums + m * N;
        Sums total, product, distances;
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            Vec v = sub(row.at(n, lanes), mean);
            if (lanes < WIDTH) v = keep_n(v, lanes);
            distances.parts[i] = add(distances.parts[i], v);
        });
        const Vec rest = set(-distances.total() / static_cast<float>(N) * of.statistics[2 * m + 1]);
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            __builtin_prefetch(next + n);
            Vec g = load_part(dy + n, lanes);
            g = kept.of(g, n);
            Vec unit = fma(sub(row.at(n, lanes), mean), rstd, rest);
            if (lanes < WIDTH) unit = keep_n(unit, lanes);
            store_part(dbias + n, add(load_part(dbias + n, lanes), g), lanes);
            store_part(dweight + n, fma(g, unit, load_part(dweight + n, lanes)), lanes);
            g = mul(g, load_part(weight + n, lanes));
            total.parts[i] = add(total.parts[i], g);
            product.parts[i] = fma(g, unit, product.parts[i]);
            store_part(units + n, unit, lanes);
            store_part(dsum + n, g, lanes);
        });
        const Vec shift = set(total.total() / static_cast<float>(N));
        const Vec slope = set(-product.total() / static_cast<float>(N));
        vectors(N, [&](int64_t n, int lanes, [[maybe_unused]] int i) FASTBERT_INLINE {
            const Vec g = sub(load_part(dsum + n, lanes), shift);
            store_part(dsum + n, mul(rstd, fma(load_part(units + n, lanes), slope, g)), lanes);
        });
    }
}

// Sums COUNT vectors of columns from n on over the rows, by chunks of CHUNK rows: one running sum over all tokens of a
// type would lose digits.
template <int COUNT, typename T>
FASTBERT_INLINE inline void sum_columns(const SumRows& op, int64_t n, int lanes) {
    constexpr int64_t CHUNK = 64, AHEAD = 4;
    const auto at = [&](int64_t i) FASTBERT_INLINE {
        return op.rows + (op.order ? op.order[i] : i) * op.stride + n;
    };
    Vec total[COUNT];
    for (int v = 0; v < COUNT; ++v) total[v] = set(0.0f);
    for (int64_t start = 0; start < op.count; start += CHUNK) {
        const int64_t end = start + CHUNK < op.count ? start + CHUNK : op.count;
        Vec part[COUNT];
        for (int v = 0; v < COUNT; ++v) part[v] = set(0.0f);
        for (int64_t i = start; i < end; ++i) {
            const float *row = at(i), *later = at(i + AHEAD < op.count ? i + AHEAD : i);
            for (int v = 0; v < COUNT; ++v) {
                __builtin_prefetch(later + v * WIDTH);  // one cache line per AVX-512 vector
                part[v] = add(part[v], load_part(row + v * WIDTH, lanes));
            }
        }
        for (int v = 0; v < COUNT; ++v) total[v] = add(total[v], part[v]);
    }
    for (int v = 0; v < COUNT; ++v) store_part(static_cast<T*>(op.out) + n + v * WIDTH, total[v], lanes);
}

template <typename T>
void sum_rows(const SumRows& op, int64_t begin, int64_t end) {
    // Rows lie pages apart, so each visit to a row reads as many columns as registers can hold.
    constexpr int COUNT = WIDTH == 16 ? 12 : 4;
    int64_t n = begin;
    for (; n + COUNT * WIDTH <= end; n += COUNT * WIDTH) sum_columns<COUNT, T>(op, n, WIDTH);
    for (; n + WIDTH <= end; n += WIDTH) sum_columns<1, T>(op, n, WIDTH);
    if (n < end) sum_columns<1, T>(op, n, static_cast<int>(end - n));
}

}  // namespace

const EmbedLayerNormKernels embed_layer_norm_kernels = {forward<float>, forward<bf16>,   backward<float>,
                                                        backward<bf16>, sum_rows<float>, sum_rows<bf16>};

}  // namespace fastbert::FASTBERT_ISA
