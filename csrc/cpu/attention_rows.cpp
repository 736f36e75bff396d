// softmax(scale q k^T) v of one head of one sequence; compiled once per instruction set.
//
// Keys and values are packed once into the caller's scratch memory; then TILE_M queries at a time form all
// their scores (TILE_M x L fp32, in cache), their exponentials, and their context. Nothing of size L x L exists.
#include "kernels.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {
namespace {

int64_t panels(int64_t n) { return (n + TILE_N - 1) / TILE_N; }

// Values as B of the second product: words run along the keys, so two bf16 rows are interleaved.
void pack_values(const float* v, int64_t stride, int64_t L, int64_t n, uint32_t* panel) {
    for (int64_t k = 0; k < L; ++k)
        for (int64_t j = 0; j < TILE_N; ++j) {
            uint32_t word = 0;
            if (j < n) std::memcpy(&word, v + k * stride + j, sizeof word);
            panel[k * TILE_N + j] = word;
        }
}
void pack_values(const bf16* v, int64_t stride, int64_t L, int64_t n, uint32_t* panel) {
    for (int64_t k = 0; k < L; k += 2)
        for (int64_t j = 0; j < TILE_N; ++j) {
            const uint32_t even = j < n ? v[k * stride + j] : 0, odd = j < n && k + 1 < L ? v[(k + 1) * stride + j] : 0;
            panel[k / 2 * TILE_N + j] = even | odd << 16;
        }
}

// scores[0, L) -> 2^(scores * scale - their maximum) as T in place, zeros up to `padded`; returns 1 / the sum.
template <typename T>
float exponentials(float* scores, int64_t L, int64_t padded, float scale) {
    Vec top = set(scores[0]);
    int64_t n = 0;
    for (; n + WIDTH <= L; n += WIDTH) top = max(top, load(scores + n));
    float lanes[WIDTH];
    store(lanes, top);
    float highest = lanes[0];
    for (int i = 1; i < WIDTH; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
    for (int64_t i = n; i < L; ++i) highest = scores[i] > highest ? scores[i] : highest;

    const Vec factor = set(scale), shift = set(-highest * scale);
    Vec total = set(0.0f);
    T* out = reinterpret_cast<T*>(scores);  // at most as wide as fp32, so it never overtakes what is read
    for (n = 0; n + WIDTH <= L; n += WIDTH) {
        const Vec e = exp2(fma(load(scores + n), factor, shift));
        total = add(total, e);
        store(out + n, e);
    }
    if (n < L) {
        const int rest = static_cast<int>(L - n);
        const Vec e = keep_n(exp2(fma(load_n(scores + n, rest), factor, shift)), rest);
        total = add(total, e);
        store(out + n, e);
        n += WIDTH;
    }
    for (; n < padded; n += WIDTH) store(out + n, set(0.0f));
    return 1.0f / sum(total);
}

// Bytes of scratch memory for a sequence of L tokens.
template <typename T>
int64_t scratch(int64_t L, int64_t D) {
    const int64_t key_panels = panels(L) * TILE_N * (D / PER_WORD<T>);
    const int64_t value_panels = panels(D) * TILE_N * ((L + PER_WORD<T> - 1) / PER_WORD<T>);
    return sizeof(uint32_t) * (key_panels + value_panels + TILE_M * panels(L) * TILE_N);
}

template <typename T>
void attention(const Attention& op, int64_t start, int64_t L, int64_t head, void* memory) {
    const int64_t words = op.D / PER_WORD<T>, stride = op.stride_t / PER_WORD<T>;
    const int64_t key_words = (L + PER_WORD<T> - 1) / PER_WORD<T>, padded = panels(L) * TILE_N;
    const T* q = static_cast<const T*>(op.qkv) + start * op.stride_t + head * op.D;
    const T* k = q + op.stride_3;
    const T* v = k + op.stride_3;
    uint32_t* keys = static_cast<uint32_t*>(memory);
    uint32_t* values = keys + padded * words;
    float* scores = reinterpret_cast<float*>(values + panels(op.D) * TILE_N * key_words);

    for (int64_t p = 0; p < panels(L); ++p) {
        const int64_t first = p * TILE_N, n = L - first < TILE_N ? L - first : TILE_N;
        const uint32_t* rows = reinterpret_cast<const uint32_t*>(k + first * op.stride_t);
        pack_panel(rows, stride, n, words, keys + p * TILE_N * words);
    }
    for (int64_t p = 0; p < panels(op.D); ++p) {
        const int64_t first = p * TILE_N, n = op.D - first < TILE_N ? op.D - first : TILE_N;
        pack_values(v + first, op.stride_t, L, n, values + p * TILE_N * key_words);
    }

    for (int64_t m = 0; m < L; m += TILE_M) {
        with_rows(L - m, [&](auto rows) {
            constexpr int M = decltype(rows)::value;
            float inverse[M];
            for (int64_t p = 0; p < panels(L); ++p) {
                Vec acc[M][NV];
                for (int i = 0; i < M; ++i)
                    for (int j = 0; j < NV; ++j) acc[i][j] = set(0.0f);
                const uint32_t* queries = reinterpret_cast<const uint32_t*>(q + m * op.stride_t);
                multiply<T>(queries, stride, keys + p * TILE_N * words, words, acc);
                for (int i = 0; i < M; ++i)
                    for (int j = 0; j < NV; ++j) store(scores + i * padded + p * TILE_N + j * WIDTH, acc[i][j]);
            }
            for (int i = 0; i < M; ++i) inverse[i] = exponentials<T>(scores + i * padded, L, padded, op.scale_log2);
            for (int64_t p = 0; p < panels(op.D); ++p) {
                Vec acc[M][NV];
                for (int i = 0; i < M; ++i)
                    for (int j = 0; j < NV; ++j) acc[i][j] = set(0.0f);
                const uint32_t* probabilities = reinterpret_cast<const uint32_t*>(scores);
                multiply<T>(probabilities, padded, values + p * TILE_N * key_words, key_words, acc);
                for (int i = 0; i < M; ++i) {
                    T* y = static_cast<T*>(op.y) + ((start + m + i) * op.H + head) * op.D + p * TILE_N;
                    for (int j = 0; j < NV; ++j) {
                        const int lanes = static_cast<int>(op.D - p * TILE_N - j * WIDTH);
                        if (lanes <= 0) break;
                        const Vec out = mul(acc[i][j], set(inverse[i]));
                        if (lanes >= WIDTH) store(y + j * WIDTH, out);
                        else store_n(y + j * WIDTH, out, lanes);
                    }
                }
            }
        });
    }
}

}  // namespace

const AttentionKernels attention_kernels = {scratch<float>, scratch<bf16>, attention<float>, attention<bf16>};

}  // namespace fastbert::FASTBERT_ISA
