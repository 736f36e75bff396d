// y = act(x W^T + b) for a block of rows and a range of weight panels; compiled once per instruction set.
//
// A `Kind` defines the operands: values as they are, bytes, or bf16 terms of fp32. A packed panel of TILE_N columns is
// a header (biases; for bytes also the columns' scales and corrections), then the words of each term.
#include "kernels.h"
#include "rows.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// The operands as they are.
template <typename T>
struct Plain {
    using Value = T;
    using Operand = T;
    static constexpr int PIECES = 1, HEADER = 1;
    static constexpr int PAIRS[][2] = {{0, 0}};
};

// bf16 as fp32: x is widened, the weight stays as it is.
struct Wide {
    using Value = bf16;
    using Operand = Widened;
    static constexpr int PIECES = 1, HEADER = 1;
    static constexpr int PAIRS[][2] = {{0, 0}};
};

// Bytes: x quantised with a scale per row, the weight with a scale per column.
template <typename T>
struct Int8 {
    using Value = T;
    using Operand = Bytes;
    static constexpr int PIECES = 1, HEADER = 3;
    static constexpr int PAIRS[][2] = {{0, 0}};
};

// fp32 as a sum of bf16 terms, each the rounded remainder of the terms before it. Pairs of terms are multiplied, the
// small ones first. The omitted pairs are at most 2^-16 (two terms) or 2^-24 (three) of the product.
struct Split2 {
    using Value = float;
    using Operand = bf16;
    static constexpr int PIECES = 2, HEADER = 1;
    static constexpr int PAIRS[][2] = {{1, 0}, {0, 1}, {0, 0}};
};
struct Split3 {
    using Value = float;
    using Operand = bf16;
    static constexpr int PIECES = 3, HEADER = 1;
    static constexpr int PAIRS[][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
};

template <typename Kind>
constexpr bool IS_BYTES = false;
template <typename T>
constexpr bool IS_BYTES<Int8<T>> = true;
template <typename Kind>
constexpr bool PREPARED = IS_BYTES<Kind> || Kind::PIECES > 1 || A_WORDS<typename Kind::Operand> > 1;

template <typename Kind, typename T = typename Kind::Operand>
int64_t piece_words(int64_t K) { return padded_words<T>(words_of<T>(K)); }
template <typename Kind>
int64_t panel_words(int64_t K) {
    return TILE_N * Kind::HEADER + Kind::PIECES * piece_words<Kind>(K) * B_WORDS<typename Kind::Operand>;
}

// Words from one prepared row to the next: an odd number of cache lines, so neighbours fall into different cache sets.
template <typename Kind>
int64_t prepared_stride(int64_t K) {
    if (!PREPARED<Kind>) return 0;
    const int64_t lines = (A_WORDS<typename Kind::Operand> * Kind::PIECES * piece_words<Kind>(K) + 15) / 16;
    return (lines | 1) * 16;
}

template <typename T>
static inline Vec load_up_to(const T* p, int64_t n) { return n >= WIDTH ? load(p) : load_n(p, static_cast<int>(n)); }

static inline float lane(Vec v) {
    float lanes[WIDTH];
    store(lanes, v);
    return lanes[0];
}

// Calls take(k, v, n) with the n numbers from column k of the rotated row, over the whole row. Each full block of 128
// columns, as 8 x 16, is multiplied by the orthonormal Hadamard matrix of order 8 (see fastbert/reference.py), by
// adding and subtracting whole vectors.
template <typename T, typename Take>
static inline void rotate(const T* x, int64_t K, const Take& take) {
    constexpr int BLOCK = 128, LANES = 16;
    const Vec norm = set(0.35355339f);  // 8^-1/2
    int64_t k = 0;
    for (; k + BLOCK <= K; k += BLOCK)
        for (int c = 0; c < LANES; c += WIDTH) {
            Vec v[8];
            for (int r = 0; r < 8; ++r) v[r] = load(x + k + r * LANES + c);
            for (int step = 4; step > 0; step /= 2)
                for (int r = 0; r < 8; ++r)
                    if (!(r & step)) {
                        const Vec a = v[r], b = v[r + step];
                        v[r] = add(a, b);
                        v[r + step] = sub(a, b);
                    }
            for (int r = 0; r < 8; ++r) take(k + r * LANES + c, mul(v[r], norm), WIDTH);
        }
    for (; k < K; k += WIDTH) take(k, load_up_to(x + k, K - k), K - k < WIDTH ? K - k : WIDTH);
}

// The largest absolute value of a rotated row; NaN if any of its numbers is not finite. Without the sign bit, floats
// order as their bits do as integers, with infinity and NaN above all. Calls also(k, v) for each vector of the row.
template <typename T, typename Also>
float largest(const T* p, int64_t n, const Also& also) {
    const Ints magnitude = Ints{} + 0x7fffffff;
    Ints top = {}, other = {};
    bool odd = false;
    rotate(p, n, [&](int64_t k, Vec v, int64_t) {
        also(k, v);
        const Ints x = (Ints)v & magnitude;
        Ints& best = odd ? other : top;
        best = x > best ? x : best;
        odd = !odd;
    });
    top = other > top ? other : top;
    int32_t most = 0;
    for (int lane = 0; lane < WIDTH; ++lane) most = top[lane] > most ? top[lane] : most;
    float amax;
    std::memcpy(&amax, &most, sizeof amax);
    return amax + (amax - amax);
}

// 127 / amax; 0 for a row that is zero, too small to divide by, or not finite.
static inline float inverse_scale(float amax) { return amax > 1e-36f ? 127.0f / amax : 0.0f; }

// x rounded to the nearest integer, ties to even; |x| < 2^22.
static inline Ints round_to_int(Vec x) {
    return (Ints)add(x, set(ROUNDING)) - (Ints)set(ROUNDING);
}

using Byte = Choice<BYTES_PER_WORD == 4, int8_t, int16_t>;  // a number of x, as a word has it
using ByteVec = Byte __attribute__((vector_size(WIDTH * sizeof(Byte))));

// Quantises a rotated row of x to bytes, with BYTE_OFFSET, zeros up to `padded` words; returns its scale.
template <typename T>
float prepare_bytes(const T* x, int64_t K, int64_t padded, uint32_t* out) {
    constexpr int64_t KEPT = 4096;  // numbers that are rotated once and kept, in L1
    alignas(64) float kept[KEPT];
    const bool keeps = K <= KEPT;
    const float amax = largest(x, K, [&](int64_t k, Vec v) {
        if (keeps) store(kept + k, v);
    });
    const Vec inverse = set(inverse_scale(amax));
    Byte* bytes = reinterpret_cast<Byte*>(out);
    const auto quantise = [&](int64_t k, Vec v, int64_t n) {
        const ByteVec b = __builtin_convertvector(round_to_int(mul(v, inverse)) + BYTE_OFFSET, ByteVec);
        if (n == WIDTH) std::memcpy(bytes + k, &b, sizeof b);
        else std::memcpy(bytes + k, &b, n * sizeof(Byte));
    };
    if (!keeps) rotate(x, K, quantise);
    for (int64_t k = 0; keeps && k < K; k += WIDTH) quantise(k, load(kept + k), K - k < WIDTH ? K - k : WIDTH);
    for (int64_t k = K; k < padded * BYTES_PER_WORD; ++k) bytes[k] = 0;  // the weight has zeros there
    return amax / 127.0f;
}

// Splits n fp32 numbers into PIECES rows of bf16 terms, each row `padded` words long, zeros beyond n.
template <int PIECES>
void split(const float* x, int64_t n, int64_t padded, uint32_t* out) {
    for (int64_t k = 0; k < 2 * padded; k += WIDTH) {
        Vec rest = k < n ? load_up_to(x + k, n - k) : set(0.0f);
        const int64_t lanes = 2 * padded - k < WIDTH ? 2 * padded - k : WIDTH;
        for (int piece = 0; piece < PIECES; ++piece) {
            bf16 rounded[WIDTH];
            store(rounded, rest);
            std::memcpy(reinterpret_cast<bf16*>(out + piece * padded) + k, rounded, lanes * sizeof(bf16));
            rest = sub(rest, load(rounded));
        }
    }
}

template <typename Kind>
void prepare(const Linear& op, int64_t row_begin, int64_t row_end) {
    using T = typename Kind::Value;
    const int64_t stride = prepared_stride<Kind>(op.K), padded = piece_words<Kind>(op.K);
    for (int64_t m = row_begin; m < row_end; ++m) {
        const T* x = static_cast<const T*>(op.x) + m * op.stride_xm;
        uint32_t* out = static_cast<uint32_t*>(op.prepared) + m * stride;
        if constexpr (IS_BYTES<Kind>) op.scales[m] = prepare_bytes(x, op.K, padded, out);
        else if constexpr (Kind::PIECES > 1) split<Kind::PIECES>(x, op.K, padded, out);
        else if constexpr (PREPARED<Kind>) {
            float* row = reinterpret_cast<float*>(out);
            widen(x, op.K, row);
            for (int64_t k = op.K; k < 2 * padded; ++k) row[k] = 0.0f;  // the weight has zeros there
        }
    }
}

// Packs column j of a panel: a row of the weight, rotated and quantised, its scale, and the correction for BYTE_OFFSET.
template <typename T>
void pack_bytes(const T* row, int64_t K, int64_t j, uint32_t* panel) {
    const float amax = largest(row, K, [](int64_t, Vec) {});
    const Vec inverse = set(inverse_scale(amax));
    int8_t* words = reinterpret_cast<int8_t*>(panel + Int8<T>::HEADER * TILE_N);
    int32_t total = 0;
    rotate(row, K, [&](int64_t k, Vec v, int64_t n) {
        const Ints q = round_to_int(mul(v, inverse));
        for (int64_t i = 0; i < n; ++i) {
            const int64_t word = (k + i) / BYTES_PER_WORD, place = (k + i) % BYTES_PER_WORD;
            words[(word * TILE_N + j) * BYTES_PER_WORD + place] = static_cast<int8_t>(q[i]);
            total += q[i];
        }
    });
    reinterpret_cast<float*>(panel)[TILE_N + j] = amax / 127.0f;
    reinterpret_cast<int32_t*>(panel)[2 * TILE_N + j] = -BYTE_OFFSET * total;
}

template <typename Kind>
void pack(const PackWeight& op, int64_t begin, int64_t end) {
    using T = typename Kind::Value;
    const T* weight = static_cast<const T*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    const int64_t words = words_of<typename Kind::Operand>(op.K), padded = piece_words<Kind>(op.K), stride = op.stride_wn;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * TILE_N, n = op.N - first < TILE_N ? op.N - first : TILE_N;
        uint32_t* panel = static_cast<uint32_t*>(op.packed) + p * panel_words<Kind>(op.K);
        float* biases = reinterpret_cast<float*>(panel);
        for (int64_t j = 0; j < TILE_N; ++j) biases[j] = j < n && bias ? lane(load_n(bias + first + j, 1)) : 0.0f;
        uint32_t* values = panel + Kind::HEADER * TILE_N;
        const T* rows = weight + first * stride;
        if constexpr (IS_BYTES<Kind>) {
            std::memset(panel + TILE_N, 0, (panel_words<Kind>(op.K) - TILE_N) * sizeof(uint32_t));
            for (int64_t j = 0; j < n; ++j) pack_bytes(rows + j * stride, op.K, j, panel);
        } else if constexpr (Kind::PIECES > 1) {
            constexpr int64_t PART = 64;  // words at a time, to keep the buffer small
            uint32_t pieces[Kind::PIECES * PART];
            for (int64_t j = 0; j < TILE_N; ++j)
                for (int64_t k = 0; k < padded; k += PART) {
                    const int64_t part = padded - k < PART ? padded - k : PART;
                    split<Kind::PIECES>(rows + j * stride + 2 * k, j < n ? op.K - 2 * k : 0, part, pieces);
                    for (int piece = 0; piece < Kind::PIECES; ++piece)
                        for (int64_t i = 0; i < part; ++i)
                            values[(piece * padded + k + i) * TILE_N + j] = pieces[piece * part + i];
                }
        } else {
            pack_panel(reinterpret_cast<const uint32_t*>(rows), stride / PER_WORD<T>, n, words, padded, values);
        }
    }
}

// The header of a panel at a vector of columns: their biases and, for bytes, scales and corrections.
template <typename Kind>
struct PanelHeader {
    Vec bias, scale;
    Ints correction;
    explicit PanelHeader(const uint32_t* header) : bias(load_word(header)) {
        if constexpr (IS_BYTES<Kind>) scale = load_word(header + TILE_N), correction = load_ints(header + 2 * TILE_N);
    }

    // Adds the bias and, for bytes, applies the scales of row and column.
    Vec scaled(Sum<typename Kind::Operand> sum, float row) const {
        if constexpr (IS_BYTES<Kind>) return fma(mul(__builtin_convertvector(sum + correction, Vec), scale), set(row), bias);
        else return add(sum, bias);
    }
};

// Turns the sums of one panel into outputs.
template <typename Kind>
struct Finish {
    using T = typename Kind::Value;
    using Numbers = Sum<typename Kind::Operand>;
    const Linear* linear;
    const uint32_t* panel;
    int64_t first;  // column
    int n;          // columns that exist

    Finish(const Linear& op, const uint32_t* panel, int64_t number) : linear(&op), panel(panel) {
        const int64_t columns = op.gated ? op.N / 2 : op.N, wide = op.gated ? TILE_N / 2 : TILE_N;
        first = number * wide;
        n = static_cast<int>(columns - first < wide ? columns - first : wide);
    }

    // Prefetches the outputs of rows [begin, end) for writing, while the product runs.
    void ask(int64_t begin, int64_t end) const {
        for (int64_t m = begin; m < end; ++m) {
            const T* y = static_cast<const T*>(linear->y) + m * linear->stride_ym + first;
            for (int64_t byte = 0; byte < TILE_N * static_cast<int64_t>(sizeof(T)); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(y) + byte, 1);
        }
    }

    // Writes rows [begin, end) of the outputs from their sums.
    void operator()(int64_t begin, int64_t end, const void* sums) const {
        with_activation(linear->activation, [&](auto activation) { write(begin, end, sums, activation); });
    }

    template <typename F>
    void write(int64_t begin, int64_t end, const void* sums, const F& activation) const {
        static_assert(NV == 2);
        const PanelHeader<Kind> left(panel), right(panel + WIDTH);
        const uint32_t* words = static_cast<const uint32_t*>(sums);
        T* y = static_cast<T*>(linear->y) + begin * linear->stride_ym + first;
        const float* scales = IS_BYTES<Kind> ? linear->scales + begin : nullptr;
        const int64_t stride = linear->stride_ym;
        const bool gated = linear->gated;
        for (int64_t i = 0; i < end - begin; ++i, words += TILE_N, y += stride) {
            const float scale = IS_BYTES<Kind> ? scales[i] : 0.0f;
            const Vec a = left.scaled((Numbers)load_word(words), scale);
            const Vec b = right.scaled((Numbers)load_word(words + WIDTH), scale);
            if (gated) store_part(y, mul(activation(a), b), n);
            else if (n == TILE_N) store_two(y, activation(a), activation(b));
            else {
                store_part(y, activation(a), n < WIDTH ? n : WIDTH);
                if (n > WIDTH) store_part(y + WIDTH, activation(b), n - WIDTH);
            }
        }
    }
};

// The rows of x as words: their start and stride.
template <typename Kind>
struct Operands {
    const uint32_t* begin;
    int64_t stride;
    explicit Operands(const Linear& op)
        : begin(static_cast<const uint32_t*>(PREPARED<Kind> ? op.prepared : op.x)),
          stride(PREPARED<Kind> ? prepared_stride<Kind>(op.K) : op.stride_xm / PER_WORD<typename Kind::Operand>) {}
};

#if defined(FASTBERT_AMX)

// A panel is processed in chunks of STEP words along K that stay in the L1 cache for a block of rows; `sums` holds the
// running sums. While the tiles of a step multiply, part of the next chunk is prefetched, and the vector units finish
// some of the block before: all at once they would wait for its stores, whose lines come from L2 or farther.
template <typename Kind>
void linear_by_tiles(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    using Operand = typename Kind::Operand;
    constexpr int64_t STEP = 192, BLOCK = 256, AHEAD = 16, ROWS = TILE_M<Operand>, LINES = STEP * TILE_N * 4 / 64;
    constexpr int PAIRS = sizeof(Kind::PAIRS) / sizeof(Kind::PAIRS[0]);
    const TilesInUse tiles;
    const Operands<Kind> x(op);
    const int64_t padded = piece_words<Kind>(op.K);
    const int64_t words = PREPARED<Kind> ? padded : words_of<typename Kind::Operand>(op.K);
    const int64_t steps = (words ? (words + STEP - 1) / STEP : 1) * PAIRS;
    const int64_t tiles_of_words = words ? (words + 15) / 16 * PAIRS : 1;
    alignas(64) uint32_t buffers[2][BLOCK * TILE_N];
    uint32_t* sums = buffers[0];
    const auto panel_of = [&](int64_t p) { return static_cast<const uint32_t*>(op.packed) + p * panel_words<Kind>(op.K); };
    const auto piece = [&](int64_t p, int64_t step) {
        return panel_of(p) + (Kind::HEADER + Kind::PAIRS[step % PAIRS][1] * padded + step / PAIRS * STEP) * TILE_N;
    };

    // The block before: its rows that are not finished, and their sums.
    Finish<Kind> before(op, panel_of(panel_begin), panel_begin);
    int64_t done = 0, end = 0;
    const uint32_t* ready = nullptr;
    const auto finish = [&](int64_t rows) {
        rows = end - done < rows ? end - done : rows;
        if (rows <= 0) return;
        before.ask(done + AHEAD < end ? done + AHEAD : end, done + rows + AHEAD < end ? done + rows + AHEAD : end);
        before(done, done + rows, ready);
        ready += rows * TILE_N;
        done += rows;
    };

    for (int64_t p = panel_begin; p < panel_end; ++p) {
        for (int64_t top = row_begin; top < row_end; top += BLOCK) {
            const int64_t rows = row_end - top < BLOCK ? row_end - top : BLOCK, tiles_of_m = (rows + ROWS - 1) / ROWS;
            const int64_t finished_a_time = (end - done) / (tiles_of_words * tiles_of_m) + 1;
            for (int64_t step = 0; step < steps; ++step) {
                const int* pair = Kind::PAIRS[step % PAIRS];
                const int64_t k = step / PAIRS * STEP, count = words - k < STEP ? words - k : STEP;
                const uint32_t* b = piece(p, step);
                const uint32_t* next = step + 1 < steps ? piece(p, step + 1) : piece(top + BLOCK < row_end ? p : p + 1, 0);
                const int64_t tiles_of_k = count ? (count + 15) / 16 : 1;
                const int64_t asked_a_time = LINES / (tiles_of_k * tiles_of_m) + 1;
                int64_t asked = 0;
                const auto meanwhile = [&] {
                    for (int64_t i = 0; i < asked_a_time && asked < LINES; ++i, ++asked)
                        __builtin_prefetch(next + asked * (64 / 4), 0, 2);  // into L2: L1 is full with this chunk
                    finish(finished_a_time);
                };
                for (int64_t m = 0; m < rows; m += ROWS) {
                    const uint32_t* a = x.begin + (top + m) * x.stride + pair[0] * padded + k;
                    const int64_t tile_rows = rows - m < ROWS ? rows - m : ROWS;
                    uint32_t* out = sums + m * TILE_N;
                    amx_product<Operand>(a, x.stride, static_cast<int>(tile_rows), b, count, step > 0, out, TILE_N,
                                         meanwhile);
                }
            }
            finish(BLOCK);
            before = Finish<Kind>(op, panel_of(p), p), done = top, end = top + rows, ready = sums;
            sums = sums == buffers[0] ? buffers[1] : buffers[0];
        }
    }
    finish(BLOCK);
}

#endif

template <typename Kind>
void linear(const Linear& op, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    using Operand = typename Kind::Operand;
#if defined(FASTBERT_AMX)
    if constexpr (USES_AMX<Operand>) return linear_by_tiles<Kind>(op, row_begin, row_end, panel_begin, panel_end);
#endif
    static_assert(Kind::PIECES == 1 || USES_AMX<Operand>);
    const Operands<Kind> x(op);
    const int64_t words = words_of<typename Kind::Operand>(op.K);
    // Tiles of nearly equal height: a last tile of few rows would cost as much as a full one.
    const int64_t tiles = (row_end - row_begin + VECTOR_ROWS - 1) / VECTOR_ROWS;
    const int64_t height = tiles ? (row_end - row_begin + tiles - 1) / tiles : 0;
    // To hide the latency of memory, each of the first two tiles of a panel prefetches half of the next panel. Where
    // there are exactly two tiles, they take turns on chunks of a panel that stay in the L1 cache, and prefetch by
    // chunks. Chunks end where fp32 sums are cut anyway, and other sums run on: a row's result does not depend on the
    // other rows.
    constexpr int64_t PIECE = CHUNK<float>;
    const bool taking_turns = tiles == 2;
    const int64_t group = taking_turns ? row_end - row_begin : height;
    const int64_t step = taking_turns && words > 2 * PIECE ? PIECE : words ? words : 1;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint32_t* panel = static_cast<const uint32_t*>(op.packed) + p * panel_words<Kind>(op.K);
        const Finish<Kind> finish(op, panel, p);
        for (int64_t m = row_begin; m < row_end; m += group) {
            const int64_t rows = row_end - m < group ? row_end - m : group;
            finish.ask(m, m + rows);
            Sum<Operand> sums[2 * VECTOR_ROWS][NV];
            for (int64_t k = 0; k == 0 || k < words; k += step) {
                const int64_t count = words - k < step ? words - k : step;
                const uint32_t* b = panel + Kind::HEADER * TILE_N + k * B_WORDS<Operand>;
                for (int64_t i = 0; i < rows; i += height) {
                    const uint32_t* a = x.begin + (m + i) * x.stride + k * A_WORDS<Operand>;
                    const int64_t tile = (m + i - row_begin) / height;
                    constexpr int64_t HALF = B_WORDS<Operand> / 2;
                    const Ahead half_of_next = {b + (2 + tile) * count * HALF, HALF};
                    with_rows(rows - i < height ? rows - i : height, [&](auto some) {
                        multiply<Operand, decltype(some)::value>(a, x.stride, b, count, sums + i, k > 0,
                                                                 tiles > 1 && tile < 2 ? half_of_next : ahead_in<Operand>(b));
                    });
                }
            }
            finish(m, m + rows, sums);
        }
    }
}

// Rows per weight read from memory, to hide the read: 256 on AMX, which multiplies faster, 120 on vector units.
template <typename T>
constexpr int64_t BLOCK_ROWS = USES_AMX<T> ? 256 : 120;
template <typename T>
constexpr int64_t BLOCK_BYTES = (USES_AMX<T> ? 768 : 384) * 1024;

template <typename Kind, typename T = typename Kind::Operand>
constexpr LinearKernel kernel_of = {TILE_M<T>, BLOCK_ROWS<T>, BLOCK_BYTES<T>, panel_words<Kind>, prepared_stride<Kind>,
                                    pack<Kind>, PREPARED<Kind> ? prepare<Kind> : nullptr, linear<Kind>};

}  // namespace

// Splitting fp32 pays only where bf16 products are several times as fast: on AMX.
#if defined(FASTBERT_AMX)
using High = Split2;
using Highest = Split3;
#else
using High = Plain<float>;
using Highest = Plain<float>;
#endif

using Half = Choice<MULTIPLIES_BF16, Plain<bf16>, Wide>;

#if defined(__AVX512BF16__) && !defined(FASTBERT_AMX) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
static const LinearKernel wide_kernel = kernel_of<Wide>;
static const LinearKernel* const WIDE = &wide_kernel;
#else
static const LinearKernel* const WIDE = nullptr;
#endif

const LinearKernels linear_kernels = {
    TILE_N,
    {{kernel_of<Plain<float>>, kernel_of<Int8<float>>, kernel_of<High>, kernel_of<Highest>},
     {kernel_of<Half>, kernel_of<Int8<bf16>>, kernel_of<Half>, kernel_of<Half>}},
    !MULTIPLIES_BF16,
    WIDE,
};

}  // namespace fastbert::FASTBERT_ISA
