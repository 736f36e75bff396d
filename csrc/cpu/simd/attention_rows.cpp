// softmax(scale q k^T + bias) v of one head of one sequence; compiled once per instruction set.
//
// Keys and values are packed once into the caller's scratch memory. Each tile of queries then computes all its scores
// (TILE_M x L fp32, in cache), their exponentials, and its context. No L x L matrix is stored. With a window, a tile goes
// over the panels that its queries see. Where there is no product of pairs of bf16, queries, keys, values and
// exponentials are fp32 in that memory.
#include "kernels.h"
#include "rows.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// The numbers that are multiplied for an op of T.
template <typename T>
using Multiplied = Choice<sizeof(T) == sizeof(bf16) && !MULTIPLIES_BF16, float, T>;
template <typename T>
constexpr bool WIDENS = sizeof(Multiplied<T>) > sizeof(T);

// Packs values as B of the second product: words run along keys, so two bf16 rows are interleaved; zeros up to `words`.
template <typename T>
void pack_values(const T* v, int64_t stride, int64_t L, int64_t n, int64_t words, uint32_t* panel, const float*) {
    std::memset(panel, 0, words * TILE_N * sizeof(uint32_t));
    float* to = reinterpret_cast<float*>(panel);
    for (int64_t k = 0; k < L; ++k) widen(v + k * stride, n, to + k * TILE_N);
}
[[maybe_unused]] void pack_values(const bf16* v, int64_t stride, int64_t L, int64_t n, int64_t words, uint32_t* panel,
                                  const bf16*) {
    int64_t k = 0;
    for (; n == TILE_N && k + 2 <= L; k += 2) {
        const bf16 *even = v + k * stride, *odd = even + stride;
        for (int64_t j = 0; j < TILE_N; ++j) panel[k / 2 * TILE_N + j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
    }
    for (; k < 2 * words; k += 2)
        for (int64_t j = 0; j < TILE_N; ++j) {
            const uint32_t even = j < n && k < L ? v[k * stride + j] : 0;
            const uint32_t odd = j < n && k + 1 < L ? v[(k + 1) * stride + j] : 0;
            panel[k / 2 * TILE_N + j] = even | odd << 16;
        }
}

// 2^x, to the precision of T.
template <typename T>
static inline Vec power(Vec x) { return sizeof(T) == 2 ? exp2_bf16(x) : exp2(x); }

// scores[begin, end) -> 2^(scores * scale - their maximum) in place, as what is multiplied for T, zeros elsewhere in
// [0, padded); returns 1 / the sum.
template <typename T>
float exponentials(float* scores, int64_t begin, int64_t end, int64_t padded, float scale) {
    // Subtract before scaling: the result is exactly 0 at the maximum, however large that is.
    const Vec factor = set(scale), top_score = set(highest(scores + begin, end - begin));
    Vec total = set(0.0f);
    auto* out = reinterpret_cast<Multiplied<T>*>(scores);  // at most as wide as fp32: writes never overtake reads
    along(begin, [&](int64_t n, int lanes) { store_part(out + n, set(0.0f), lanes); });
    int64_t n = begin;
    const auto at = [&](int64_t i) { return power<T>(mul(sub(load(scores + i), top_score), factor)); };
    // Two at a time: AMX's tiles, which read 64 bytes, wait for narrower stores.
    for (; n + 2 * WIDTH <= end; n += 2 * WIDTH) {
        const Vec a = at(n), b = at(n + WIDTH);
        total = add(add(total, a), b);
        store_two(out + n, a, b);
    }
    for (; n + WIDTH <= end; n += WIDTH) {
        const Vec e = at(n);
        total = add(total, e);
        store(out + n, e);
    }
    if (n < end) {
        const int rest = static_cast<int>(end - n);
        const Vec e = keep_n(power<T>(mul(sub(load_n(scores + n, rest), top_score), factor)), rest);
        total = add(total, e);
        store_part(out + n, e, padded - n < WIDTH ? static_cast<int>(padded - n) : WIDTH);
        n += WIDTH;
    }
    for (; n < padded; n += WIDTH) store_part(out + n, set(0.0f), padded - n < WIDTH ? static_cast<int>(padded - n) : WIDTH);
    return 1.0f / sum(total);
}

// Sizes in words of the scratch memory of `attention`: keys, values, the scores of a tile of queries, and rows that are
// widened. T is what is multiplied.
template <typename T>
struct Sizes {
    int64_t padded, head_words, key_words;  // keys of whole panels; words of a head; words of all keys
    int64_t keys, values, scores, rows;

    Sizes(int64_t L, int64_t D)
        : padded(panels(L) * TILE_N),
          head_words(padded_words<T>(D / PER_WORD<T>)),
          key_words(padded_words<T>(words_of<T>(L))),
          keys(padded * head_words),
          values(panels(D) * TILE_N * key_words),
          scores(TILE_M<T> * apart(padded)),
          rows((TILE_M<T> > TILE_N ? TILE_M<T> : TILE_N) * D) {}

    // From one row of scores to the next: an odd number of cache lines, so neighbours fall into different cache sets.
    static int64_t apart(int64_t width) { return ((width + 15) / 16 | 1) * 16; }
};

template <typename T>
int64_t scratch(int64_t L, int64_t D) {
    const Sizes<Multiplied<T>> sizes(L, D);
    return sizeof(uint32_t) * (sizes.keys + sizes.values + sizes.scores + (WIDENS<T> ? sizes.rows : 0));
}

template <typename T>
void attention(const Attention& op, const HeadSpan& span, void* memory) {
#if defined(FASTBERT_AMX)
    const TilesInUse tiles;
#endif
    using Operand = Multiplied<T>;
    const int64_t start = span.start, L = span.keys, head = span.head;
    const Sizes<Operand> sizes(L, op.D);
    const int64_t words = op.D / PER_WORD<Operand>, stride = WIDENS<T> ? op.D : op.stride_t / PER_WORD<T>;
    const T* q = static_cast<const T*>(op.qkv) + start * op.stride_t + head * op.D;
    const T* k = q + op.stride_3;
    const T* v = k + op.stride_3;
    uint32_t* keys = static_cast<uint32_t*>(memory);
    uint32_t* values = keys + sizes.keys;
    float* scores = reinterpret_cast<float*>(values + sizes.values);
    float* widened = scores + sizes.scores;
    const auto operands = [&](const T* rows, int64_t n) {
        if constexpr (WIDENS<T>) {
            for (int64_t i = 0; i < n; ++i) widen(rows + i * op.stride_t, op.D, widened + i * op.D);
            return reinterpret_cast<const uint32_t*>(widened);
        } else {
            return reinterpret_cast<const uint32_t*>(rows);
        }
    };
    const float* bias = op.distance_bias ? op.distance_bias + head * (2 * op.reach - 1) + op.reach - 1 : nullptr;
    // Prefetch the next head's rows: they are too far apart for a hardware prefetcher to predict. (It does predict
    // their second cache lines: prefetching those gained nothing.)
    const T* const parts[] = {q, k, v};
    for (int64_t t = 0; t < L && head + 1 < op.H; ++t)
        for (const T* part : parts) __builtin_prefetch(part + t * op.stride_t + op.D);

    for (int64_t p = 0; p < panels(L); ++p) {
        const int64_t first = p * TILE_N, n = L - first < TILE_N ? L - first : TILE_N;
        const uint32_t* rows = operands(k + first * op.stride_t, n);
        pack_panel(rows, stride, n, words, sizes.head_words, keys + p * TILE_N * sizes.head_words);
    }
    for (int64_t p = 0; p < panels(op.D); ++p) {
        const int64_t first = p * TILE_N, n = op.D - first < TILE_N ? op.D - first : TILE_N;
        pack_values(v + first, op.stride_t, L, n, sizes.key_words, values + p * TILE_N * sizes.key_words,
                    static_cast<const Operand*>(nullptr));
    }

    // Tiles of nearly equal height: a last tile of few rows would cost as much as a full one.
    const int64_t number = span.last - span.first, count = (number + TILE_M<Operand> - 1) / TILE_M<Operand>;
    const int64_t height = (number + count - 1) / count;
    for (int64_t m = span.first; m < span.last; m += height) {
        const int64_t rows = span.last - m < height ? span.last - m : height;
        const uint32_t* queries = operands(q + m * op.stride_t, rows);
        // The panels that these queries see; `scores` begins with the first of them.
        const Columns seen(op.window, L, m, rows);
        const int64_t first = seen.begin / TILE_N, end = panels(seen.end), origin = first * TILE_N;
        const int64_t width = (end - first) * TILE_N, apart = Sizes<Operand>::apart(width);
        for (int64_t p = first; p < end; ++p)
            product_to<Operand>(queries, stride, rows, keys + p * TILE_N * sizes.head_words, words,
                                scores + (p - first) * TILE_N, apart);
        float inverse[TILE_M<Operand>];
        for (int i = 0; i < rows; ++i) {
            float* row = scores + i * apart;
            const Columns own(op.window, L, m + i, 1);
            const int64_t from = own.begin - origin, to = own.end - origin;
            if (bias) scale_and_add(row + from, to - from, op.scale_log2 * LN2, bias + own.begin - (m + i));
            inverse[i] = exponentials<T>(row, from, to, width, bias ? LOG2E : op.scale_log2);
        }
        const int64_t skipped = origin / PER_WORD<Operand>, left = sizes.key_words - skipped;
        const int64_t key_words = left < width / PER_WORD<Operand> ? left : width / PER_WORD<Operand>;
        for (int64_t p = 0; p < panels(op.D); ++p) {
            const uint32_t* probabilities = reinterpret_cast<const uint32_t*>(scores);
            const uint32_t* panel = values + p * TILE_N * sizes.key_words + skipped * TILE_N;
            product<Operand>(probabilities, apart, rows, panel, key_words, [&](int i, const Vec* context) {
                static_assert(NV == 2);
                T* y = static_cast<T*>(op.y) + ((start + m + i) * op.H + head) * op.D;
                const Vec a = mul(context[0], set(inverse[i])), b = mul(context[1], set(inverse[i]));
                if ((p + 1) * TILE_N <= op.D) return store_two(y + p * TILE_N, a, b);
                store_within(y, p * TILE_N, op.D, a);
                store_within(y, p * TILE_N + WIDTH, op.D, b);
            });
        }
    }
}

}  // namespace

const AttentionKernels attention_kernels = {scratch<float>, scratch<bf16>, attention<float>, attention<bf16>};

}  // namespace fastbert::FASTBERT_ISA
