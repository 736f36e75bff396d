// The library's C++ interface: plain pointers, sizes, strides (in elements) and a stream. It depends on neither torch
// nor Python. The caller owns every buffer.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastbert {

enum class DType : int { f32 = 0, bf16 = 1 };

// Instruction sets that the kernels are compiled for, best first. A build for tests (FASTBERT_AMX_EMULATION) has one
// more: `amx` with its tiles emulated, for a processor without them.
enum class Isa : int {
    amx, avx512_bf16, avx512_vnni, avx512, avx2, neon_bf16, neon_dot, neon, portable,
#ifdef FASTBERT_AMX_EMULATION
    amx_emulated,
#endif
    count
};
constexpr int ISAS = static_cast<int>(Isa::count);

// Operands of a product: full, as they are; int8, x quantised with a scale per row and the weight with a scale per
// column; high and highest, where AMX makes it faster, fp32 split into two or three bf16 terms.
enum class Precision : int { full = 0, int8 = 1, high = 2, highest = 3 };

// y = LayerNorm(x + residual) * weight + bias, over rows of N; residual and bias may be null. With `rms`, RMSNorm:
// without the mean. x, residual, weight, bias, y and sum share one dtype; columns are contiguous; statistics are fp32.
struct AddLayerNorm {
    DType dtype;
    int64_t M, N;
    const void* x;         // (M, N)
    const void* residual;  // (M, N) or null
    const void* weight;    // (N,)
    const void* bias;      // (N,) or null
    void* y;               // (M, N)
    int64_t stride_xm, stride_rm, stride_ym;
    float eps;
    void* sum = nullptr;   // (M, N) or null: receives x + residual, of which y is then the norm; may be residual
    int64_t stride_sm = 0;
    bool rms = false;
    bool rounded = false;  // in training: y is the norm of x + residual as the dtype rounds it, as it is with `sum`
};

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4, tanh = 5 };

// Packs a weight and its bias for `linear` of one instruction set and precision.
struct PackWeight {
    DType dtype;
    int64_t N, K;
    const void* weight;  // (N, K)
    const void* bias;    // (N,) or null
    void* packed;        // packed_weight_bytes bytes, aligned to 64
    int64_t stride_wn;
    Precision precision;
};

// y = activation(x weight^T + bias); sums in fp32, for int8 in int32. At full precision, bf16 requires even K and row
// strides. If `gated`, y = activation(a) b, (M, N / 2), where a and b are the halves of the columns; the weight's rows
// were then packed in turns: half a panel of a, half a panel of b.
struct Linear {
    DType dtype;
    int64_t M, N, K;
    const void* x;       // (M, K)
    const void* packed;  // made by pack_weight_cpu for the same instruction set and precision
    void* y;             // (M, N)
    int64_t stride_xm, stride_ym;
    Activation activation;
    Precision precision;
    void* prepared;      // set by linear_cpu, as is scales: leave both null
    float* scales;
    bool gated = false;
};

// y = softmax(scale q k^T + bias) v within each sequence; scores, softmax and sums in fp32. The bias is a function of
// the head and of the distance from query to key. Keys farther than `window` from a query are left out. bf16 requires an
// even D and an even token stride.
struct Attention {
    DType dtype;
    int64_t T, B, H, D;
    const void* qkv;            // (T, 3, H, D), the last two dimensions contiguous
    const int32_t* cu_seqlens;  // (B + 1,), from 0 to T
    void* y;                    // (T, H, D), contiguous
    int64_t stride_t, stride_3;
    float scale_log2;           // scale * log2(e), positive
    const float* distance_bias = nullptr;  // (H, 2 reach - 1) or null: at reach - 1 + key - query
    int64_t reach = 0;                 // at least the longest sequence
    int64_t window = -1;               // negative: all keys are seen
};

// Rotary positions (Su et al., 2021) for attention: of each head of q and k, columns i and i + D / 2 turn by the angle of
// the token's position and i. Keys and values of G heads are repeated for the H heads of queries.
struct Rotary {
    DType dtype;
    int64_t T, H, G, D;         // G divides H; D is even
    const void* x;              // (T, H + 2 G, D): queries, keys, values
    void* y;                    // (T, 3, H, D); may be x if G = H
    const float* table;         // (positions, 2, D / 2): cosines, then sines
    const int64_t* positions;   // (T,), each within the table
    bool backward = false;      // then x is the gradient of the result, (T, 3, H, D), and y, (T, H + 2 G, D), that of x
};

// One layer of an encoder: packed weights with their biases, and the vectors of its two norms, (E,).
struct EncoderLayer {
    const void *qkv, *out, *up, *down;  // ((H + 2 G) D, E), (E, E), (F, E), (E, F), made by pack_weight_cpu
    // Biases may be null; before the layer's attention, so may be the weight: then there is no norm.
    const void *attention_norm_weight, *attention_norm_bias, *norm_weight, *norm_bias;
    const float* rotary;  // the table of Rotary, or null
    int64_t F, window;    // F columns of `down`; the window of Attention
};

// All layers over packed tokens; x and y (T, E) are contiguous and do not overlap. If `picked`, y's first P rows receive
// the states of these tokens, and no others are computed past the last attention; the rest of y is undefined.
struct Encoder {
    DType dtype;
    Precision precision;
    Activation activation;
    bool gated, pre_norm, rms;   // `up` is gated, (2 F, E); norms stand before attention and feed-forward; RMSNorm
    int64_t T, E, H, G, B, L;    // G heads of keys and values
    const int32_t* cu_seqlens;   // (B + 1,)
    const EncoderLayer* layers;  // (L,)
    const void* x;
    void* y;
    void* workspace;             // encoder_workspace_bytes bytes, aligned to 64
    float eps, scale_log2;
    const float* distance_bias = nullptr;  // of Attention, as is reach: the same for all layers
    int64_t reach = 0;
    const int64_t* positions = nullptr;    // (T,), with rotary tables
    const void *final_weight = nullptr, *final_bias = nullptr;  // the norm after the last layer, where norms stand before
    const int64_t* picked = nullptr;       // (P,) in [0, T), or null
    int64_t P = 0;
};

// Element (row, column) is dropped where a hash of seed, row and column is below the threshold, and multiplied by
// `scale` elsewhere. The mask is never stored, and is the same on every instruction set.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // p * 2^32; 0 for no dropout
    float scale;         // 1 / (1 - p)
};

// A table of embeddings, and the table row of each token.
struct EmbedTable {
    const void* rows;    // (count, N)
    const int64_t* ids;  // (M,)
    int64_t count, stride;
};

// y = dropout(LayerNorm(word[id] + token_type[id] + position[id]) * weight + bias); statistics in fp32.
struct EmbedLayerNorm {
    DType dtype;
    int64_t M, N;
    EmbedTable word, token_type, position;
    const void* weight;  // (N,)
    const void* bias;    // (N,)
    void* y;             // (M, N), contiguous
    float* statistics;   // (M, 2) mean and rstd, saved for the backward; or null
    float eps;
    Dropout dropout;
};

// Computes the gradients that are not null, contiguous, in the dtype of the op. Sums are fp32, in an order independent
// of the number of threads. Every element of a table's gradient is written, zeros too.
struct EmbedLayerNormBwd {
    EmbedLayerNorm forward;  // with its statistics; y is not read
    const void* dy;          // (M, N)
    int64_t stride_dym;
    void *dword, *dtoken_type, *dposition;  // (count, N) of each table
    void *dweight, *dbias;                  // (N,)
    int64_t padding_idx;                    // row of `dword` that is zero, or -1
};

// Softmax and cross entropy of one chunk of the vocabulary, on transposed logits: the steps of linear_cross_entropy
// between its products. K is the number of tokens, a multiple of 32.
struct CrossEntropy {
    DType dtype;
    int64_t V, K;
    int64_t first;          // vocabulary index of row 0 of the logits
    void* logits;           // (V, K), contiguous; without the bias
    const void* bias;       // (V,) or null
    const int32_t* labels;  // (K,), -1 for none
    float* partial;         // (cross_entropy_blocks(V), 2, K): the input of cross_entropy_combine_cpu
    float* picked;          // (K,): the logit of each token's label, written if the label lies in this chunk
    const float* row_max;   // (K,): the largest logit of each token
    const float* inverse;   // (K,): 1 / the sum of exp(logit - row_max)
    const float* scale;     // (K,)
    void* dbias;            // (V,) or null
};

// Locates the real tokens of a (B, S) batch, B * S < 2^31: the result of `batch_from_mask` in fastbert/packing.py,
// without the host knowing the number of tokens.
struct PackMask {
    int mask_bytes;        // per value: 1, 4 or 8
    int64_t B, S;
    const void* mask;      // (B, S), contiguous integers: 1 at a real token, 0 at a pad
    int32_t* cu_seqlens;   // (B + 1,)
    int64_t* indices;      // (B * S,): the position of each packed token, then -1
    int64_t* places;       // (B * S,): the packed row of each position, -1 at a pad
    int32_t* bad;          // (1,): 1 if a value is neither 0 nor 1; such a value counts as a pad
    int64_t* workspace;    // (pack_mask_workspace(B * S),)
};

// A mask on the host, B * S < 2^31. Values are compared as bits, whatever their type.
struct ReadMask {
    int mask_bytes;        // per value: 1, 2, 4 or 8
    uint64_t one;          // the bits of 1
    uint64_t magnitude;    // the bits that are 0 in a zero: all but a float's sign
    int64_t B, S;
    const void* mask;      // (B, S), contiguous: 1 at a real token, 0 at a pad
    int32_t* cu_seqlens;   // (B + 1,)
    int64_t* indices;      // (B * S,): the position of each packed token, then unspecified
};

struct MaskSummary {
    int64_t tokens, longest;
    bool leading_pads;     // a row with tokens begins with a pad
    bool bad;              // a value is neither 0 nor 1; such a value counts as a pad
};

// A whole model: the embeddings, the layers and the pooler. The tokens and the memory of `embed` and `layers` are set by
// encode_batch_cpu for each call.
struct BatchEncoder {
    EmbedLayerNorm embed;
    Encoder layers;
    const void* pooler;  // (E, E), made by pack_weight_cpu at full precision; or null
    int64_t places = 0;  // rows of the layers' rotary tables, if they have any; then no token's embedding has a position:
                         // embed.position is one row of zeros
};

// A batch of B rows of S positions, and the memory of its results.
struct PaddedBatch {
    int64_t B, S;
    ReadMask mask;              // its B, S, cu_seqlens and indices are set here; its `mask` is null without pads
    const int64_t *input_ids, *token_type_ids, *position_ids;  // (B, S); the latter two may be null: 0, and the column
    int64_t pad_id;             // not negative: masked ids of a row with tokens must be this one, and not come first
    void* states;               // (B, S, E), zeros at the pads
    void* pooled;               // (B, E), or null without a pooler
    void* workspace;            // encode_batch_workspace_bytes bytes, aligned to 64
    const float* distance_bias = nullptr;  // of Attention, as is reach: then no pad may stand between two tokens of a row
    int64_t reach = 0;
};

// y[m] = x[index[m]], rows of bytes; zeros where index[m] is out of range.
struct TakeRows {
    int64_t M, rows, row_bytes;
    const void* x;         // (rows, row_bytes)
    const int64_t* index;  // (M,)
    void* y;               // (M, row_bytes), contiguous
    int64_t stride_x;      // bytes
};

// ---- CPU ----

const char* isa_name(Isa isa);

// The instruction sets supported by both this processor and this build, best first; `portable` is always the last.
std::vector<Isa> supported_isas();

// True if bf16 is multiplied as fp32: the instruction set has no products of pairs, or they are slower here.
bool widens_bf16(Isa isa);

// Names of the present processor features among those that decide the instruction set.
std::vector<const char*> cpu_features();

// Thrown by an op that `stop` ended (see set_stop). Its outputs are then only partly written.
struct Stopped {};

// Registers a function that long ops call on their calling thread, between two tasks and at most every 50 ms; if it
// returns true, the op ends. `stop` must not throw. It may call ops, which then do not call `stop`.
void set_stop(bool (*stop)());

// dtype f32 or bf16; `isa` must be one of supported_isas(). At most `threads` threads.
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads);

// Columns of a weight in a panel of a packed one.
int64_t panel_columns(Isa isa);
int64_t packed_weight_bytes(DType dtype, Precision precision, int64_t N, int64_t K, Isa isa);
void pack_weight_cpu(const PackWeight& op, Isa isa, int threads);
void linear_cpu(const Linear& op, Isa isa, int threads);
void attention_cpu(const Attention& op, Isa isa, int threads);
void rotary_cpu(const Rotary& op, Isa isa, int threads);
int64_t encoder_workspace_bytes(const Encoder& op, Isa isa, int threads);
void encoder_cpu(const Encoder& op, Isa isa, int threads);
// Enough for any number of tokens up to op.T.
int64_t encoder_most_workspace_bytes(const Encoder& op, Isa isa, int threads);
int64_t encode_batch_workspace_bytes(const BatchEncoder& model, int64_t B, int64_t S, Isa isa, int threads);
// Returns false, and writes no result, where an id or the length is outside its table, the mask holds other values than
// 0 and 1, or the call breaks the rules of `pad_id`.
bool encode_batch_cpu(const BatchEncoder& model, const PaddedBatch& batch, Isa isa, int threads);

// Asks the operating system to back the whole HUGE_PAGEs within a range, before its first use, by pages of that size.
constexpr int64_t HUGE_PAGE = 2 << 20;
void prefer_huge_pages(void* memory, int64_t bytes);

// A memory range that others may write to, with its checksum when it was last read.
struct Chunk {
    const void* memory;
    int64_t bytes;
    uint64_t checksum;
};
// checksum_cpu fills in the checksums. changed_cpu: whether one has changed of the first `always` chunks and of [begin,
// end).
void checksum_cpu(Chunk* chunks, int64_t count, int threads);
bool changed_cpu(const Chunk* chunks, int64_t always, int64_t begin, int64_t end, int threads);

MaskSummary read_mask_cpu(const ReadMask& op);
// The minimum and maximum of n > 0 integers of 4 or 8 bytes.
std::pair<int64_t, int64_t> bounds_cpu(int bytes, int64_t n, const void* x);

// Both throw std::invalid_argument for an id outside its table, before anything is read or written.
void embed_layer_norm_cpu(const EmbedLayerNorm& op, Isa isa, int threads);
void embed_layer_norm_bwd_cpu(const EmbedLayerNormBwd& op, Isa isa, int threads);

int64_t cross_entropy_blocks(int64_t V);
// Writes partial and picked. Every chunk of a vocabulary but the last must be whole blocks.
void cross_entropy_statistics_cpu(const CrossEntropy& op, Isa isa, int threads);
// Combines the partial results of all blocks, (blocks, 2, K): each token's largest logit, and the sum of exp(logit -
// row_max). They stay separate: added to a large maximum, the logarithm of the sum would lose its digits.
void cross_entropy_combine_cpu(const float* partial, int64_t blocks, int64_t K, float* row_max, float* total, Isa isa,
                               int threads);
// logits = scale (softmax - onehot), in place; dbias is their sum over K.
void cross_entropy_bwd_cpu(const CrossEntropy& op, Isa isa, int threads);

// The machine's peak, measured on `threads` threads: FLOP/s of a loop that only multiplies registers, with the
// instructions that the products use, or bytes/s read from main memory.
enum class PeakKind : int { f32 = 0, bf16 = 1, int8 = 2, read = 3 };
double peak_cpu(PeakKind kind, Isa isa, int threads);

// ---- CUDA: always declared, defined where the build found nvcc (FASTBERT_HAS_CUDA) ----

// Pointers are on `device`; `stream` is a cudaStream_t. Launches asynchronously; returns 0 or a cudaError_t code.
int64_t pack_mask_workspace(int64_t positions);
int pack_mask_cuda(const PackMask& op, int device, void* stream);
int gather_rows_cuda(const TakeRows& op, int device, void* stream);

const char* cuda_error_string(int code);

}  // namespace fastbert
