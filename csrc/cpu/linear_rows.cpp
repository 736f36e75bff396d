// y = act(x W^T + bias) for a block of rows and a range of weight panels; compiled once per instruction set.
#include "kernels.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {
namespace {

static inline Vec activate(Activation activation, Vec x) {
    switch (activation) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::relu: return max(x, set(0.0f));
        case Activation::silu: return silu(x);
        case Activation::tanh: return tanh(x);
        case Activation::none: break;
    }
    return x;
}

// Panel p holds columns [p * TILE_N, ...): their fp32 biases, then their words.
int64_t panel_words(int64_t words) { return TILE_N * (words + 1); }

template <typename T>
void pack(const PackWeight& op, int64_t begin, int64_t end) {
    const int64_t words = op.K / PER_WORD<T>, stride = op.stride_wn / PER_WORD<T>;
    const uint32_t* weight = static_cast<const uint32_t*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * TILE_N, n = op.N - first < TILE_N ? op.N - first : TILE_N;
        uint32_t* panel = static_cast<uint32_t*>(op.packed) + p * panel_words(words);
        float* biases = reinterpret_cast<float*>(panel);
        for (int64_t j = 0; j < TILE_N; ++j) {
            float lanes[WIDTH];
            store(lanes, j < n && bias ? load_n(bias + first + j, 1) : set(0.0f));
            biases[j] = lanes[0];
        }
        pack_panel(weight + first * stride, stride, n, words, panel + TILE_N);
    }
}

template <typename T>
void linear(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    const int64_t words = op.K / PER_WORD<T>, lda = op.stride_xm / PER_WORD<T>;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint32_t* panel = static_cast<const uint32_t*>(op.packed) + p * panel_words(words);
        const float* biases = reinterpret_cast<const float*>(panel);
        const int64_t first = p * TILE_N, n = op.N - first < TILE_N ? op.N - first : TILE_N;
        for (int64_t m = row_begin; m < row_end; m += TILE_M) {
            with_rows(row_end - m, [&](auto rows) {
                constexpr int M = decltype(rows)::value;
                Vec acc[M][NV];
                for (int i = 0; i < M; ++i)
                    for (int v = 0; v < NV; ++v) acc[i][v] = load(biases + v * WIDTH);
                const uint32_t* x = static_cast<const uint32_t*>(op.x) + m * lda;
                multiply<T>(x, lda, panel + TILE_N, words, acc);
                for (int i = 0; i < M; ++i) {
                    T* y = static_cast<T*>(op.y) + (m + i) * op.stride_ym + first;
                    for (int v = 0; v < NV; ++v) {
                        const int lanes = static_cast<int>(n - v * WIDTH);
                        if (lanes <= 0) break;
                        const Vec out = activate(op.activation, acc[i][v]);
                        if (lanes >= WIDTH) store(y + v * WIDTH, out);
                        else store_n(y + v * WIDTH, out, lanes);
                    }
                }
            });
        }
    }
}

}  // namespace

const LinearKernels linear_kernels = {TILE_M, TILE_N, pack<float>, pack<bf16>, linear<float>, linear<bf16>};

}  // namespace fastbert::FASTBERT_ISA
