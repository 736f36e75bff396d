// The steps around the products of linear's backward: activations and their derivatives, transposes and sums; compiled
// once per instruction set.
#include "kernels.h"
#include "words.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// Phi(z) + z phi(z), phi the density of the normal distribution.
Vec gelu_slope(Vec z) {
    const Vec a = z < set(0.0f) ? sub(set(0.0f), z) : z;
    const Vec tail = a > set(6.0f) ? set(0.0f) : normal_tail(min(a, set(6.0f)));
    const Vec below = z < set(0.0f) ? tail : sub(set(1.0f), tail);
    const Vec density = mul(exp(mul(set(-0.5f), mul(z, z))), set(0.3989422804014327f));
    return fma(z, density, below);
}

// s + factor s (1 - s), s = sigmoid(t). 1 - s is computed from exp(-|t|): a difference would lose its digits where s is
// close to 1, and factor is large there.
Vec sigmoid_slope(Vec t, Vec factor) {
    const Vec e = exp(t < set(0.0f) ? t : sub(set(0.0f), t)), above = set(1.0f) / add(set(1.0f), e);
    const Vec below = mul(e, above);
    return fma(factor, mul(above, below), t < set(0.0f) ? below : above);
}

// gelu_tanh(z) = z sigmoid(t), t = k z (1 + 0.044715 z^2). z is clamped to [-16, 16]: beyond, the slope is 0 or 1 and
// z^3 may overflow. z is the first operand of min and max, so that NaN stays NaN.
Vec gelu_tanh_slope(Vec z) {
    z = max(min(z, set(16.0f)), set(-16.0f));
    const Vec square = mul(z, z), line = mul(set(1.5957691216057308f), z);
    return sigmoid_slope(mul(line, fma(set(0.044715f), square, set(1.0f))),
                         mul(line, fma(set(0.134145f), square, set(1.0f))));
}

Vec silu_slope(Vec z) { return sigmoid_slope(z, z); }

// Calls f with the activation's derivative as a function of z, or of y = activation(z) for relu and tanh.
template <typename F>
void with_slope(Activation activation, const F& f) {
    switch (activation) {
        case Activation::gelu: return f([](Vec z) { return gelu_slope(z); });
        case Activation::gelu_tanh: return f([](Vec z) { return gelu_tanh_slope(z); });
        case Activation::relu: return f([](Vec y) { return y > set(0.0f) ? set(1.0f) : set(0.0f); });
        case Activation::silu: return f([](Vec z) { return silu_slope(z); });
        case Activation::tanh: return f([](Vec y) { return sub(set(1.0f), mul(y, y)); });
        case Activation::none: return;
    }
}

template <typename T>
void activate(const Activate& op, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(op.x) + begin;
    T* y = static_cast<T*>(op.y) + begin;
    with_activation(op.activation, [&](auto function) {
        along(end - begin, [&](int64_t n, int lanes) { store_part(y + n, function(load_part(x + n, lanes)), lanes); });
    });
}

template <typename T>
void gate(const Gate& op, int64_t begin, int64_t end) {
    with_activation(op.activation, [&](auto function) {
        for (int64_t m = begin; m < end; ++m) {
            const T *a = static_cast<const T*>(op.z) + m * 2 * op.F, *b = a + op.F;
            T* y = static_cast<T*>(op.out) + m * op.F;
            along(op.F, [&](int64_t n, int lanes) {
                store_part(y + n, mul(function(load_part(a + n, lanes)), load_part(b + n, lanes)), lanes);
            });
        }
    });
}

// da = dy b activation'(a), db = dy activation(a).
template <typename T>
void gate_backward(const Gate& op, int64_t begin, int64_t end) {
    const auto rows = [&](auto one) {
        for (int64_t m = begin; m < end; ++m) {
            const T *a = static_cast<const T*>(op.z) + m * 2 * op.F, *dy = static_cast<const T*>(op.dy) + m * op.F;
            T* da = static_cast<T*>(op.out) + m * 2 * op.F;
            along(op.F, [&](int64_t n, int lanes) { one(load_part(a + n, lanes), load_part(dy + n, lanes), a, da, n, lanes); });
        }
    };
    with_activation(op.activation, [&](auto function) {
        rows([&](Vec z, Vec dy, const T*, T* da, int64_t n, int lanes) {
            store_part(da + op.F + n, mul(dy, function(z)), lanes);
        });
    });
    const bool of_tanh = op.activation == Activation::tanh;  // whose slope is a function of its value
    with_slope(op.activation, [&](auto slope) {
        rows([&](Vec z, Vec dy, const T* a, T* da, int64_t n, int lanes) {
            const Vec b = load_part(a + op.F + n, lanes);
            store_part(da + n, mul(mul(dy, b), slope(of_tanh ? tanh(z) : z)), lanes);
        });
    });
}

template <typename T>
void gate_rows(const Gate& op, int64_t begin, int64_t end) {
    op.dy ? gate_backward<T>(op, begin, end) : gate<T>(op, begin, end);
}

// Columns of a strip: the tile of dz to be transposed stays in L1. Its rows are padded so that a column does not fall
// into a single set of the cache.
constexpr int64_t STRIP = 128, PADDED = STRIP + 16;

// sum += v, with the rounding error carried in `lost` (Kahan, 1965): a bias gradient is a sum over all tokens.
static inline void add_exactly(float* sum, float* lost, Vec v) {
    const Vec before = load(sum), term = sub(v, load(lost)), after = add(before, term);
    store(lost, sub(sub(after, before), term));
    store(sum, after);
}

// Computes dz of a tile and writes it where needed: to `tile` for dzt, to op.dz, and into the sums (2, PADDED).
template <typename T>
void activation_tile(const ActivationBwd& op, int64_t m, int64_t rows, int64_t n, int64_t columns, T* tile,
                     float* sums) {
    const auto run = [&](auto slope, auto plain) {
        for (int64_t i = 0; i < rows; ++i) {
            const T* dy = static_cast<const T*>(op.dy) + (m + i) * op.stride_dym + n;
            const int64_t at = decltype(plain)::value ? 0 : (m + i) * op.stride_sm + n;
            const T* saved = static_cast<const T*>(op.saved) + at;
            T* dz = op.dz ? static_cast<T*>(op.dz) + (m + i) * op.stride_dz + n : nullptr;
            along(columns, [&](int64_t j, int lanes) {
                Vec v = load_part(dy + j, lanes);
                if constexpr (!decltype(plain)::value) v = mul(v, slope(load_part(saved + j, lanes)));
                if (sums) add_exactly(sums + j, sums + PADDED + j, v);
                if (op.dzt) store(tile + i * PADDED + j, v);
                if (dz) store_part(dz + j, v, lanes);
            });
        }
    };
    if (op.activation == Activation::none) run([](Vec v) { return v; }, Rows<1>{});
    else with_slope(op.activation, [&](auto slope) { run(slope, Rows<0>{}); });
}

template <typename T>
void backward(const ActivationBwd& op, int64_t block, int64_t strip) {
    const int64_t m = block * PARTIAL_ROWS, n = strip * STRIP;
    const int64_t rows = op.M - m < PARTIAL_ROWS ? op.M - m : PARTIAL_ROWS;
    const int64_t columns = op.N - n < STRIP ? op.N - n : STRIP;
    alignas(64) T tile[PARTIAL_ROWS * PADDED];
    alignas(64) float sums[2 * PADDED];
    for (int64_t j = 0; j < 2 * PADDED; ++j) sums[j] = 0.0f;
    activation_tile<T>(op, m, rows, n, columns, tile, op.partials ? sums : nullptr);

    if (op.partials)
        for (int64_t j = 0; j < columns; ++j) op.partials[block * op.N + n + j] = sums[j];
    if (op.dz && n + columns == op.N)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = op.N; j < op.stride_dz; ++j) static_cast<T*>(op.dz)[(m + i) * op.stride_dz + j] = 0;
    if (!op.dzt) return;
    // The last block also writes the zeros behind the last row.
    const int64_t padded = m + rows == op.M ? op.stride_dzt - m : rows;
    for (int64_t j = 0; j < columns; ++j) {
        T* out = static_cast<T*>(op.dzt) + (n + j) * op.stride_dzt + m;
        for (int64_t i = 0; i < rows; ++i) out[i] = tile[i * PADDED + j];
        for (int64_t i = rows; i < padded; ++i) out[i] = 0;
    }
}

// The packed layout is that of linear_rows.cpp: TILE_N biases, here zeros, then the words along K.
template <typename T>
void pack(const PackTransposed& op, int64_t begin, int64_t end) {
    const T* source = static_cast<const T*>(op.source);
    const int64_t words = padded_words<T>(op.K / PER_WORD<T>), count = panels(op.N);
    const int64_t last = end < op.rows ? words_of<T>(end) : words;
    for (int64_t k = begin / PER_WORD<T>; k < last; ++k)
        for (int64_t p = 0; p < count; ++p) {
            uint32_t* panel = static_cast<uint32_t*>(op.packed) + p * TILE_N * (words + 1);
            uint32_t* out = panel + TILE_N + k * TILE_N;
            if (k * PER_WORD<T> < op.rows)
                pack_down_row(source + p * TILE_N, op.stride, op.rows, op.N - p * TILE_N, k, out);
            else
                for (int v = 0; v < NV; ++v) store_words(out + v * WIDTH, fill(0));
        }
    for (int64_t p = 0; p < count && begin == 0; ++p)
        for (int v = 0; v < NV; ++v)
            store_words(static_cast<uint32_t*>(op.packed) + p * TILE_N * (words + 1) + v * WIDTH, fill(0));
}

template <typename T>
void gradient(const LinearDweight& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
#if defined(FASTBERT_AMX)
    const TilesInUse tiles;
#endif
    const int64_t words = op.tokens / PER_WORD<T>, lda = op.stride_dzt / PER_WORD<T>;
    const uint32_t* dzt = static_cast<const uint32_t*>(op.dzt);
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint32_t* panel = static_cast<const uint32_t*>(op.packed) + p * TILE_N * (padded_words<T>(words) + 1);
        for (int64_t m = row_begin; m < row_end; m += TILE_M<T>) {
            const int64_t rows = row_end - m < TILE_M<T> ? row_end - m : TILE_M<T>;
            product<T>(dzt + m * lda, lda, rows, panel + TILE_N, words, [&](int i, const Vec* parts) {
                for (int64_t n = p * TILE_N; n < op.K && n < (p + 1) * TILE_N; n += WIDTH, ++parts) {
                    const int64_t at = (m + i) * op.K + n;
                    const int lanes = op.K - n < WIDTH ? static_cast<int>(op.K - n) : WIDTH;
                    const Vec sum = op.first ? *parts : add(load_part(op.sums + at, lanes), *parts);
                    if (op.last) store_part(static_cast<T*>(op.dweight) + at, sum, lanes);
                    else store_part(op.sums + at, sum, lanes);
                }
            });
        }
    }
}

template <typename T>
void sum_partials(const float* partials, int64_t blocks, int64_t stride, int64_t N, void* out) {
    along(N, [&](int64_t n, int lanes) {
        float sums[2 * WIDTH] = {};
        for (int64_t block = 0; block < blocks; ++block)
            add_exactly(sums, sums + WIDTH, load_part(partials + block * stride + n, lanes));
        store_part(static_cast<T*>(out) + n, load(sums), lanes);
    });
}

}  // namespace

const LinearBwdKernels linear_fwd_train_kernels = {
    activate<float>, activate<bf16>, gate_rows<float>, gate_rows<bf16>, STRIP,  backward<float>, backward<bf16>, pack<float>,         pack<bf16>,
    TILE_M<bf16>,   TILE_N,         gradient<float>, gradient<bf16>,  sum_partials<float>, sum_partials<bf16>};

}  // namespace fastbert::FASTBERT_ISA
