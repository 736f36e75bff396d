// softmax(scale q k^T + bias) v of one head of one sequence, with dropout of the probabilities, and its gradient (Dao et al.,
// 2022); compiled once per instruction set.
//
// The forward goes over tiles of queries, as attention_rows.cpp does. It saves each query's largest score and 1 / its
// sum separately: added to a large score, the logarithm of the sum would lose its digits. The backward goes over tiles
// of keys. It computes rows of S^T = K Q^T and dP^T = V dO^T, with queries along the vectors: values per query (sum,
// delta, mask key) are vectors, and rows of P^T and dS^T are the left operands of dV = P^T dO and dK = dS^T Q without a
// transpose. Only dQ = dS K is accumulated over tiles, by groups of GROUP keys.
#include "kernels.h"
#include "words.h"

namespace fastbert::FASTBERT_ISA {
namespace {

constexpr int64_t GROUP = 4 * VECTOR_ROWS;

// Calls f(m, rows) for tiles of [0, n): first full tiles, then thirds, then single rows. Instantiating every height, as
// with_rows does, would take the compiler four times as long.
template <typename F>
void each_tile(int64_t n, const F& f) {
    int64_t m = 0;
    for (; m + VECTOR_ROWS <= n; m += VECTOR_ROWS) f(m, Rows<VECTOR_ROWS>{});
    for (; m + VECTOR_ROWS / 3 <= n; m += VECTOR_ROWS / 3) f(m, Rows<VECTOR_ROWS / 3>{});
    for (; m < n; ++m) f(m, Rows<1>{});
}

// Packs a matrix m (L, D) as operand B of x m^T.
template <typename T>
void pack_along(const T* m, int64_t stride, int64_t L, int64_t D, uint32_t* out) {
    const int64_t words = D / PER_WORD<T>;
    for (int64_t p = 0; p < panels(L); ++p) {
        const int64_t first = p * TILE_N, n = L - first < TILE_N ? L - first : TILE_N;
        pack_panel(reinterpret_cast<const uint32_t*>(m + first * stride), stride / PER_WORD<T>, n, words, words,
                   out + p * TILE_N * words);
    }
}

// Packs a matrix m (L, D) as operand B of x m.
template <typename T>
void pack_values(const T* m, int64_t stride, int64_t L, int64_t D, uint32_t* out) {
    for (int64_t p = 0; p < panels(D); ++p)
        pack_down(m + p * TILE_N, stride, L, D - p * TILE_N, out + p * TILE_N * words_of<T>(L));
}

// Calls f(i, column, acc) for each vector of rows [0, M) of A times a packed matrix of `columns` columns, whose panels
// are `panel` words apart. `lda` is the distance in words of A's rows or, if SIDEWAYS, of its words along k.
template <typename T, int M, bool SIDEWAYS = false, typename F>
void product(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t panel, int64_t words, int64_t columns,
             const F& f) {
    for (int64_t p = 0; p < panels(columns); ++p) {
        Vec acc[M][NV];
        if constexpr (SIDEWAYS) {
            for (int i = 0; i < M; ++i)
                for (int v = 0; v < NV; ++v) acc[i][v] = set(0.0f);
            for (int64_t k = 0; k < words; ++k)
                add_step<T, M>(acc, [&](int i) { return a + k * lda + i; }, b + p * panel + k * B_WORDS<T>);
        } else {
            multiply<T, M>(a, lda, b + p * panel, words, acc, false, ahead_in<T>(b + p * panel));
        }
        for (int i = 0; i < M; ++i)
            for (int v = 0; v < NV; ++v) f(i, p * TILE_N + v * WIDTH, acc[i][v]);
    }
}

// A token's row of the mask in one head. It does not depend on how many tokens there are, so that a batch can be computed
// in parts, each with the rows that it has in the whole.
inline RowKey mask_key(const Dropout& dropout, int64_t head, int64_t token) {
    return row_key(dropout.seed, (static_cast<uint64_t>(head) << 40) + static_cast<uint64_t>(token));
}

// scores[begin, end) -> 2^(scores * scale - their maximum) as T in place, with dropout of columns counted from `origin`,
// and zeros elsewhere in [0, padded). Returns 1 / their sum before dropout, and the maximum in `largest`.
template <typename T>
float exponentials(float* scores, int64_t begin, int64_t end, int64_t padded, int64_t origin, float scale,
                   const Dropout& dropout, RowKey key, float* largest) {
    const float most = highest(scores + begin, end - begin);
    *largest = most;
    const Words a = fill(key.a), b = fill(key.b);
    T* out = reinterpret_cast<T*>(scores);  // at most as wide as fp32: writes never overtake reads
    along(begin, [&](int64_t n, int lanes) { store_part(out + n, set(0.0f), lanes); });
    Vec total = set(0.0f);
    along(end - begin, [&](int64_t i, int lanes) {
        const int64_t n = begin + i;
        const Vec e = exp2(mul(sub(load_part(scores + n, lanes), set(most)), set(scale)));  // 1 at the maximum
        const Vec kept = lanes == WIDTH ? e : keep_n(e, lanes);
        total = add(total, kept);
        const Words column = count_from(static_cast<uint32_t>(origin + n));
        const Vec p = dropout.threshold ? mul(kept, keep_factor(dropout, a, b, column)) : kept;
        store_within(out, n, padded, p);
    });
    for (int64_t n = begin + (end - begin + WIDTH - 1) / WIDTH * WIDTH; n < padded; n += WIDTH)
        store_within(out, n, padded, set(0.0f));
    return 1.0f / sum(total);
}

template <typename T>
int64_t forward_scratch(int64_t L, int64_t D) {
    const int64_t keys = panels(L) * TILE_N * (D / PER_WORD<T>), values = panels(D) * TILE_N * words_of<T>(L);
    return sizeof(uint32_t) * (keys + values + VECTOR_ROWS * panels(L) * TILE_N);
}

template <typename T>
void forward(const AttentionFwdTrain& training, int64_t start, int64_t L, int64_t head, void* memory) {
    const Attention& op = training.op;
    const int64_t D = op.D, words = D / PER_WORD<T>, padded = panels(L) * TILE_N;
    const T* q = static_cast<const T*>(op.qkv) + start * op.stride_t + head * D;
    uint32_t* keys = static_cast<uint32_t*>(memory);
    uint32_t* values = keys + padded * words;
    float* scores = reinterpret_cast<float*>(values + panels(D) * TILE_N * words_of<T>(L));
    const float* bias = op.distance_bias ? op.distance_bias + head * (2 * op.reach - 1) + op.reach - 1 : nullptr;
    pack_along(q + op.stride_3, op.stride_t, L, D, keys);
    pack_values(q + 2 * op.stride_3, op.stride_t, L, D, values);

    each_tile(L, [&](int64_t m, auto rows) {
        constexpr int M = decltype(rows)::value;
        const uint32_t* queries = reinterpret_cast<const uint32_t*>(q + m * op.stride_t);
        // The keys that these queries see, from the first panel with one; `scores` begins there.
        const Columns seen(op.window, L, m, M);
        const int64_t origin = seen.begin / TILE_N * TILE_N, count = seen.end - origin, width = panels(count) * TILE_N;
        product<T, M>(queries, op.stride_t / PER_WORD<T>, keys + origin * words, TILE_N * words, words, count,
                      [&](int i, int64_t n, Vec acc) { store(scores + i * width + n, acc); });
        float inverse[M];
        for (int i = 0; i < M; ++i) {
            const int64_t row = head * training.T + start + m + i;
            float row_max;
            float* own_scores = scores + i * width;
            const Columns own(op.window, L, m + i, 1);
            const int64_t from = own.begin - origin, to = own.end - origin;
            if (bias) scale_and_add(own_scores + from, to - from, op.scale_log2 * LN2, bias + own.begin - (m + i));
            inverse[i] = exponentials<T>(own_scores, from, to, width, origin, bias ? LOG2E : op.scale_log2,
                                         training.dropout, mask_key(training.dropout, head, start + m + i), &row_max);
            if (!training.row_max) continue;
            training.row_max[row] = row_max;
            training.row_max[op.H * training.T + row] = inverse[i];
        }
        T* y = static_cast<T*>(op.y) + ((start + m) * op.H + head) * D;
        product<T, M>(reinterpret_cast<const uint32_t*>(scores), width, values + origin / PER_WORD<T> * TILE_N,
                      TILE_N * words_of<T>(L), words_of<T>(count), D, [&](int i, int64_t n, Vec acc) {
                          store_within(y + i * op.H * D, n, D, mul(acc, set(inverse[i])));
                      });
    });
}

// The parts of the backward's scratch memory; Lp is the number of queries in whole panels.
template <typename T>
struct Workspace {
    uint32_t *q_along, *y_along, *dy_along;   // panels(L) x D words
    uint32_t *q_down, *dy_down, *k_down;      // panels(D) x L words
    float *row_max, *inverse, *delta;         // (Lp,)
    uint32_t *key_a, *key_b;                  // (Lp,)
    float* p;                                 // (VECTOR_ROWS, Lp): P^T, negative where dropped
    T* kept;                                  // (VECTOR_ROWS, Lp): P^T after dropout
    T* ds;                                    // (GROUP, Lp): dS^T
    uint32_t* ds_down;                        // (words of GROUP, Lp): dS^T, words along the keys
    float* dq;                                // (L, panels(D) * TILE_N)
    // (L - 1 + Lp,): for key j they begin at L - 1 - j, queries along them. Null without a bias. A tile of keys adds to
    // dbias; its sums are added up in double, as a diagonal may be long.
    float *bias, *dbias;
    double* dbias_sums;
    int64_t bytes;

    Workspace(void* memory, int64_t L, int64_t D, bool has_bias) {
        bytes = 0;
        const auto take = [&](auto*& part, int64_t count) {
            part = reinterpret_cast<decltype(+part)>(reinterpret_cast<uintptr_t>(memory) + bytes);
            bytes += (count * sizeof(*part) + 63) / 64 * 64;
        };
        const int64_t Lp = panels(L) * TILE_N;
        take(q_along, Lp * (D / PER_WORD<T>));
        take(y_along, Lp * (D / PER_WORD<T>));
        take(dy_along, Lp * (D / PER_WORD<T>));
        take(q_down, panels(D) * TILE_N * words_of<T>(L));
        take(dy_down, panels(D) * TILE_N * words_of<T>(L));
        take(k_down, panels(D) * TILE_N * words_of<T>(L));
        take(row_max, Lp);
        take(inverse, Lp);
        take(delta, Lp);
        take(key_a, Lp);
        take(key_b, Lp);
        take(p, VECTOR_ROWS * Lp);
        take(kept, VECTOR_ROWS * Lp);
        take(ds, GROUP * Lp);
        take(ds_down, PER_WORD<T> > 1 ? GROUP / PER_WORD<T> * Lp : 0);
        take(dq, L * panels(D) * TILE_N);
        take(bias, has_bias ? L - 1 + Lp : 0);
        take(dbias, has_bias ? L - 1 + Lp : 0);
        take(dbias_sums, has_bias ? L - 1 + Lp : 0);
        if (!has_bias) bias = nullptr;
    }
};

template <typename T>
int64_t backward_scratch(int64_t L, int64_t D) { return Workspace<T>(nullptr, L, D, true).bytes; }

// Prepares the data of all queries: packed matrices, sums, deltas, mask keys. Beyond L the probabilities are zero.
template <typename T>
void prepare(const AttentionBwd& back, int64_t start, int64_t L, int64_t head, const T* q, const T* dy,
             const Workspace<T>& w) {
    const Attention& op = back.op;
    const int64_t D = op.D, stride = op.H * D;
    pack_along(q, op.stride_t, L, D, w.q_along);
    pack_values(q, op.stride_t, L, D, w.q_down);
    pack_values(q + op.stride_3, op.stride_t, L, D, w.k_down);
    pack_along(dy, stride, L, D, w.dy_along);
    pack_values(dy, stride, L, D, w.dy_down);
    const T* y = static_cast<const T*>(op.y) + (start * op.H + head) * D;
    for (int64_t i = 0; i < panels(L) * TILE_N; ++i) {
        const int64_t row = head * back.T + start + i;
        const RowKey key = mask_key(back.dropout, head, start + i);
        w.row_max[i] = i < L ? back.row_max[row] : 0.0f;
        w.inverse[i] = i < L ? back.row_max[op.H * back.T + row] : 0.0f;
        w.key_a[i] = key.a;
        w.key_b[i] = key.b;
    }
    // delta is summed in the order of a product, so that dP - delta is zero where one key has all the probability.
    pack_along(y, stride, L, D, w.y_along);
    const int64_t words = D / PER_WORD<T>;
    for (int64_t i = 0; i < panels(L) * TILE_N; i += WIDTH) {
        const int64_t first = i / TILE_N * TILE_N * words + i % TILE_N;
        Vec delta = set(0.0f);
        for (int64_t k = 0; k < words; ++k) {
            const int64_t at = first + k * TILE_N;
            delta = dot(delta, load_word(w.y_along + at), load_word(w.dy_along + at), static_cast<const T*>(nullptr));
        }
        store(w.delta + i, delta);
    }
    for (int64_t i = 0; i < L * panels(D) * TILE_N; i += WIDTH) store(w.dq + i, set(0.0f));
    if (!w.bias) return;
    const float* bias = op.distance_bias + head * (2 * op.reach - 1) + op.reach - 1;  // at key - query
    for (int64_t i = 0; i < L - 1 + panels(L) * TILE_N; ++i) {
        w.bias[i] = i < 2 * L - 1 ? bias[L - 1 - i] : 0.0f;
        w.dbias[i] = 0.0f;
        w.dbias_sums[i] = 0.0;
    }
}

// row[0, begin) = row[end, columns) = 0.
template <typename T>
void clear_outside(T* row, int64_t begin, int64_t end, int64_t columns) {
    std::memset(row, 0, begin * sizeof(T));
    std::memset(row + end, 0, (columns - end) * sizeof(T));
}

// Moves the sums of the keys [m, m + rows) to those of all keys.
template <typename T>
void add_to_dbias(int64_t L, int64_t m, int64_t rows, const Workspace<T>& w) {
    for (int64_t i = L - m - rows; i < L - 1 - m + panels(L) * TILE_N; ++i) {
        w.dbias_sums[i] += w.dbias[i];
        w.dbias[i] = 0.0f;
    }
}

// For keys [m, m + M): rows of P^T, rows of dS^T (from row `at` of the group on), and from these dK and dV. The columns
// of all rows are the `count` queries from `origin` on, a multiple of TILE_N.
template <typename T, int M>
void key_tile(const AttentionBwd& back, int64_t L, int64_t m, int64_t at, int64_t origin, int64_t count, const T* k,
              T* dk, const Workspace<T>& w) {
    const Attention& op = back.op;
    const Dropout& dropout = back.dropout;
    const int64_t D = op.D, words = D / PER_WORD<T>, padded = panels(count) * TILE_N, lda = op.stride_t / PER_WORD<T>;
    const Vec scale = set(op.scale_log2 * LN2);
    const float* bias = w.bias ? w.bias + L - 1 - m + origin : nullptr;
    float* dbias = w.dbias + (w.bias ? L - 1 - m + origin : 0);
    const float *row_max = w.row_max + origin, *inverse = w.inverse + origin, *deltas = w.delta + origin;
    const uint32_t *key_a = w.key_a + origin, *key_b = w.key_b + origin;
    const auto load_key = [](const uint32_t* p) { return (Words)load_word(p); };
    const uint32_t* keys = reinterpret_cast<const uint32_t*>(k);
    product<T, M>(keys, lda, w.q_along + origin * words, TILE_N * words, words, count, [&](int i, int64_t n, Vec s) {
        const Vec top = load(row_max + n);
        const Vec above = bias ? mul(sub(fma(s, scale, load(bias - i + n)), top), set(LOG2E))
                               : mul(sub(s, top), set(op.scale_log2));
        const Vec p = mul(exp2(above), load(inverse + n));
        if (!dropout.threshold) {
            store(w.p + i * padded + n, p);
            store(w.kept + i * padded + n, p);
            return;
        }
        const Words key = fill(static_cast<uint32_t>(m + i));
        const Vec factor = keep_factor(dropout, load_key(key_a + n), load_key(key_b + n), key);
        store(w.p + i * padded + n, factor > set(0.0f) ? p : sub(set(0.0f), p));
        store(w.kept + i * padded + n, mul(p, factor));
    });
    for (int i = 0; op.window >= 0 && i < M; ++i) {  // a probability outside the window may be infinite
        const Columns own(op.window, L, m + i, 1);
        clear_outside(w.p + i * padded, own.begin - origin, own.end - origin, padded);
        clear_outside(w.kept + i * padded, own.begin - origin, own.end - origin, padded);
    }
    T* ds = w.ds + at * padded;
    const uint32_t* values = reinterpret_cast<const uint32_t*>(k + op.stride_3);
    product<T, M>(values, lda, w.dy_along + origin * words, TILE_N * words, words, count, [&](int i, int64_t n, Vec dp) {
        const Vec p = load(w.p + i * padded + n), delta = load(deltas + n);
        // A dropped probability is stored as -p: p (0 - delta) = (-p) delta.
        const Vec scaled = dropout.threshold ? mul(dp, set(dropout.scale)) : dp;
        const Vec change = p < set(0.0f) ? mul(p, delta) : mul(p, sub(scaled, delta));
        store(ds + i * padded + n, change);
        if (bias) store(dbias - i + n, add(load(dbias - i + n), change));
    });
    const int64_t panel = TILE_N * words_of<T>(L), stride = 3 * op.H * D, row = padded / PER_WORD<T>;
    const int64_t skipped = origin / PER_WORD<T> * TILE_N;
    product<T, M>(reinterpret_cast<const uint32_t*>(ds), row, w.q_down + skipped, panel, words_of<T>(count), D,
                  [&](int i, int64_t n, Vec acc) { store_within(dk + i * stride, n, D, mul(acc, scale)); });
    T* dv = dk + op.H * D;
    product<T, M>(reinterpret_cast<const uint32_t*>(w.kept), row, w.dy_down + skipped, panel, words_of<T>(count), D,
                  [&](int i, int64_t n, Vec acc) { store_within(dv + i * stride, n, D, acc); });
}

// dQ += dS K over the keys [first, first + count), with dS^T of the `queries` queries from `origin` on in the workspace.
template <typename T>
void add_to_dq(int64_t L, int64_t D, int64_t first, int64_t count, int64_t origin, int64_t queries, const Workspace<T>& w) {
    const int64_t padded = panels(queries) * TILE_N, width = panels(D) * TILE_N, words = words_of<T>(count);
    const uint32_t* ds = reinterpret_cast<const uint32_t*>(w.ds);
    if constexpr (PER_WORD<T> > 1) {
        ds = w.ds_down;
        for (int64_t k = 0; k < words; ++k)
            for (int64_t n = 0; n < padded; n += WIDTH) {
                const T* rows = w.ds + k * PER_WORD<T> * padded + n;
                store_words(w.ds_down + k * padded + n, down(rows, padded, (k + 1) * PER_WORD<T> <= count, WIDTH));
            }
    }
    const uint32_t* keys = w.k_down + first / PER_WORD<T> * TILE_N;
    each_tile(queries, [&](int64_t m, auto rows) {
        constexpr int M = decltype(rows)::value;
        const int64_t panel = TILE_N * words_of<T>(L);
        product<T, M, true>(ds + m, padded, keys, panel, words, D, [&](int i, int64_t n, Vec acc) {
            float* out = w.dq + (origin + m + i) * width + n;
            store(out, add(load(out), acc));
        });
    });
}

template <typename T>
void backward(const AttentionBwd& back, int64_t start, int64_t L, int64_t head, void* memory) {
    const Attention& op = back.op;
    const int64_t D = op.D, stride = 3 * op.H * D;
    const T* q = static_cast<const T*>(op.qkv) + start * op.stride_t + head * D;
    const T* dy = static_cast<const T*>(back.dy) + (start * op.H + head) * D;
    T* dq = static_cast<T*>(back.dqkv) + start * stride + head * D;
    const Workspace<T> w(memory, L, D, op.distance_bias != nullptr);
    prepare(back, start, L, head, q, dy, w);
    for (int64_t first = 0; first < L; first += GROUP) {
        const int64_t count = L - first < GROUP ? L - first : GROUP;
        const Columns seeing(op.window, L, first, count);  // the queries that see these keys
        const int64_t origin = seeing.begin / TILE_N * TILE_N, queries = seeing.end - origin;
        each_tile(count, [&](int64_t at, auto rows) {
            const int64_t m = first + at;
            key_tile<T, decltype(rows)::value>(back, L, m, at, origin, queries, q + op.stride_3 + m * op.stride_t,
                                               dq + op.H * D + m * stride, w);
            if (w.bias) add_to_dbias(L, m, decltype(rows)::value, w);
        });
        add_to_dq(L, D, first, count, origin, queries, w);
    }
    const Vec scale = set(op.scale_log2 * LN2);
    for (int64_t i = 0; i < L; ++i)
        along(D, [&](int64_t n, int lanes) {
            store_part(dq + i * stride + n, mul(load(w.dq + i * panels(D) * TILE_N + n), scale), lanes);
        });
    if (!w.bias) return;
    float* parts = back.dbias_parts + 2 * (head * back.T + start);
    for (int64_t i = 0; i < 2 * L - 1; ++i) parts[i] = static_cast<float>(w.dbias_sums[2 * L - 2 - i]);
}

}  // namespace

const AttentionBwdKernels attention_fwd_train_kernels = {
    forward_scratch<float>,  forward_scratch<bf16>, backward_scratch<float>, backward_scratch<bf16>,
    forward<float>,          forward<bf16>,         backward<float>,         backward<bf16>};

}  // namespace fastbert::FASTBERT_ISA
