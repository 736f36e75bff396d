// Everything the library offers to C++: plain pointers, sizes, strides (in elements) and a stream.
// Nothing here knows torch or Python. The caller owns every buffer.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastbert {

enum class DType : int { f32 = 0, bf16 = 1 };

// Instruction sets with an object of their own, best first. A list of these is a list of choices. A build for tests
// (FASTBERT_AMX_EMULATION) has one more: `amx` itself, its tiles emulated on a processor that has none.
enum class Isa : int {
    amx = 0, avx512_bf16 = 1, avx512_vnni = 2, avx512 = 3, avx2 = 4, portable = 5,
#ifdef FASTBERT_AMX_EMULATION
    amx_emulated = 6,
#endif
    count
};
constexpr int ISAS = static_cast<int>(Isa::count);

// How the operands of a product are multiplied: as they are; as bytes, x rounded by a scale a row and the weight by a
// scale a column; or, where AMX makes it faster, fp32 as two or three pieces of bf16.
enum class Precision : int { full = 0, int8 = 1, high = 2, highest = 3 };

// y = LayerNorm(x + residual) * weight + bias, over rows of N; residual may be null.
// x, residual, weight, bias and y share one dtype; columns are contiguous; statistics are fp32.
struct AddLayerNorm {
    DType dtype;
    int64_t M, N;
    const void* x;         // (M, N)
    const void* residual;  // (M, N) or null
    const void* weight;    // (N,)
    const void* bias;      // (N,)
    void* y;               // (M, N)
    int64_t stride_xm, stride_rm, stride_ym;
    float eps;
};

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4, tanh = 5 };

// A weight and its bias, rearranged for `linear` of one instruction set and precision: see packed_weight_bytes.
struct PackWeight {
    DType dtype;
    int64_t N, K;
    const void* weight;  // (N, K)
    const void* bias;    // (N,) or null
    void* packed;        // packed_weight_bytes bytes, aligned to 64
    int64_t stride_wn;
    Precision precision;
};

// y = activation(x weight^T + bias); sums in fp32, those of bytes in int32. At full precision, bf16 wants K and the
// row strides even.
struct Linear {
    DType dtype;
    int64_t M, N, K;
    const void* x;       // (M, K)
    const void* packed;  // made by pack_weight_cpu for the same instruction set and precision
    void* y;             // (M, N)
    int64_t stride_xm, stride_ym;
    Activation activation;
    Precision precision;
    void* prepared;      // what linear_cpu makes of x: leave these two null
    float* scales;
};

// y = softmax(scale q k^T) v within each sequence; scores, softmax and sums in fp32.
// bf16 wants D and the token stride even.
struct Attention {
    DType dtype;
    int64_t T, B, H, D;
    const void* qkv;            // (T, 3, H, D), the last two dimensions contiguous
    const int32_t* cu_seqlens;  // (B + 1,), from 0 to T
    void* y;                    // (T, H, D), contiguous
    int64_t stride_t, stride_3;
    float scale_log2;           // scale * log2(e), positive
};

// One layer of an encoder: packed weights with their biases, and the vectors of its two norms, (E,).
struct EncoderLayer {
    const void *qkv, *out, *up, *down;  // (3E, E), (E, E), (F, E), (E, F), made by pack_weight_cpu
    const void *attention_norm_weight, *attention_norm_bias, *norm_weight, *norm_bias;
    int64_t F;
};

// All layers over packed tokens; x and y (T, E) are contiguous and apart.
struct Encoder {
    DType dtype;
    Precision precision;
    Activation activation;
    int64_t T, E, H, B, L;
    const int32_t* cu_seqlens;   // (B + 1,)
    const EncoderLayer* layers;  // (L,)
    const void* x;
    void* y;
    void* workspace;             // encoder_workspace_bytes bytes, aligned to 64
    float eps, scale_log2;
};

// Element (row, column) is dropped where a hash of seed, row and column is below the threshold, and multiplied by
// `scale` elsewhere: the mask is never stored, and the same on every instruction set.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // p * 2^32; 0 for no dropout
    float scale;         // 1 / (1 - p)
};

// A table of embeddings and which of its rows each token takes.
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
    float* statistics;   // (M, 2) mean and 1 / deviation, for the backward; or null
    float eps;
    Dropout dropout;
};

// The gradients that are not null, in the dtype of the op, contiguous; sums in fp32, in an order that does not
// depend on the threads. A table's gradient is written whole, zeros too.
struct EmbedLayerNormBwd {
    EmbedLayerNorm forward;  // with its statistics; y is not read
    const void* dy;          // (M, N)
    int64_t stride_dym;
    void *dword, *dtoken_type, *dposition;  // as the tables, (count, N)
    void *dweight, *dbias;                  // (N,)
    int64_t padding_idx;                    // the row of `dword` that stays zero, or -1
};

// Softmax and cross entropy over transposed logits, a chunk of the vocabulary at a time: what linear_cross_entropy
// does between its products. K, the tokens, is a multiple of 32.
struct CrossEntropy {
    DType dtype;
    int64_t V, K;
    int64_t first;          // the word that row 0 of the logits is of
    void* logits;           // (V, K), contiguous; without the bias
    const void* bias;       // (V,) or null
    const int32_t* labels;  // (K,), -1 for none
    float* partial;         // (cross_entropy_blocks(V), 2, K): what cross_entropy_combine_cpu takes
    float* picked;          // (K,): the logit of a token's label, where that lies in this chunk
    const float* row_max;   // (K,): a token's largest logit
    const float* inverse;   // (K,): 1 / the sum of exp(logit - row_max)
    const float* scale;     // (K,)
    void* dbias;            // (V,) or null
};

// Where the real tokens of a (B, S) batch stand, at most 2^31 - 1 positions in all: what fastbert/packing.py's
// `batch_from_mask` says, without the host knowing how many they are.
struct PackMask {
    int mask_bytes;        // of a value: 1, 4 or 8
    int64_t B, S;
    const void* mask;      // (B, S), contiguous integers: 1 at a real token, 0 at a pad
    int32_t* cu_seqlens;   // (B + 1,)
    int64_t* indices;      // (B * S,): the position of each packed token, then -1
    int64_t* places;       // (B * S,): the packed row of each position, -1 at a pad
    int32_t* bad;          // (1,): whether a value is neither 0 nor 1; it counts as a pad
    int64_t* workspace;    // (pack_mask_workspace(B * S),)
};

// A mask on the host, at most 2^31 - 1 positions. Its values are compared as bits, whatever their type.
struct ReadMask {
    int mask_bytes;        // of a value: 1, 2, 4 or 8
    uint64_t one;          // the bits of 1
    uint64_t magnitude;    // the bits that are 0 in a zero: a float's sign is none of them
    int64_t B, S;
    const void* mask;      // (B, S), contiguous: 1 at a real token, 0 at a pad
    int32_t* cu_seqlens;   // (B + 1,)
    int64_t* indices;      // (B * S,): the position of each packed token, then whatever
};

struct MaskSummary {
    int64_t tokens, longest;
    bool leading_pads;     // a row begins with a pad and has tokens
    bool bad;              // a value is neither 0 nor 1; it counts as a pad
};

// y[m] = x[index[m]], rows of bytes; zeros where the index is not one of x's rows.
struct TakeRows {
    int64_t M, rows, row_bytes;
    const void* x;         // (rows, row_bytes)
    const int64_t* index;  // (M,)
    void* y;               // (M, row_bytes), contiguous
    int64_t stride_x;      // bytes
};

// ---- CPU ----

const char* isa_name(Isa isa);

// The instruction sets this processor and this build have, best first; `portable` is always the last.
std::vector<Isa> supported_isas();

// Names of the processor features the choice rests on, those present only.
std::vector<const char*> cpu_features();

// Thrown by an op that was told to stop, whose outputs are then written in part.
struct Stopped {};

// An op that lasts calls `stop` on the thread that called the op, between two tasks and at most every 50 ms; true ends
// the op. `stop` throws nothing. It may call ops, which do not ask in turn.
void set_stop(bool (*stop)());

// dtype f32 or bf16; `isa` must be one of supported_isas(). At most `threads` threads.
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, int threads);

int64_t packed_weight_bytes(DType dtype, Precision precision, int64_t N, int64_t K, Isa isa);
void pack_weight_cpu(const PackWeight& op, Isa isa, int threads);
void linear_cpu(const Linear& op, Isa isa, int threads);
void attention_cpu(const Attention& op, Isa isa, int threads);
int64_t encoder_workspace_bytes(const Encoder& op, Isa isa, int threads);
void encoder_cpu(const Encoder& op, Isa isa, int threads);

// Memory that others may write to, and its checksum when it was last read.
struct Chunk {
    const void* memory;
    int64_t bytes;
    uint64_t checksum;
};
// Fills in the checksums; and the first chunk whose checksum is another one now, -1 where none is.
void checksum_cpu(Chunk* chunks, int64_t count, int threads);
int64_t first_changed_cpu(const Chunk* chunks, int64_t count, int threads);

MaskSummary read_mask_cpu(const ReadMask& op);
// The least and the greatest of n > 0 integers of 4 or 8 bytes.
std::pair<int64_t, int64_t> bounds_cpu(int bytes, int64_t n, const void* x);

// Both throw std::invalid_argument for an id outside its table, before anything is read or written.
void embed_layer_norm_cpu(const EmbedLayerNorm& op, Isa isa, int threads);
void embed_layer_norm_bwd_cpu(const EmbedLayerNormBwd& op, Isa isa, int threads);

int64_t cross_entropy_blocks(int64_t V);
// Writes partial and picked. A chunk in the middle of a vocabulary is whole blocks.
void cross_entropy_statistics_cpu(const CrossEntropy& op, Isa isa, int threads);
// Out of the partial results of all blocks, (blocks, 2, K): each token's largest logit, and the sum of exp(logit - that).
// The logarithm of the sum is not added to the maximum: next to a large one it would lose its digits.
void cross_entropy_combine_cpu(const float* partial, int64_t blocks, int64_t K, float* row_max, float* total, Isa isa,
                               int threads);
// logits = scale (softmax - onehot), in place; dbias is their sum over K.
void cross_entropy_bwd_cpu(const CrossEntropy& op, Isa isa, int threads);

// What the machine can reach at most, measured on all `threads`: FLOP/s of a loop that multiplies registers only,
// or bytes/s read from main memory. 0 where the instruction set has no instruction for it.
enum class PeakKind : int { f32 = 0, bf16 = 1, int8 = 2, read = 3 };
double peak_cpu(PeakKind kind, Isa isa, int threads);

// ---- CUDA: declared always, defined where the build found nvcc (FASTBERT_HAS_CUDA) ----

// Pointers on `device`; `stream` is a cudaStream_t. Launches and returns at once: 0, or the code of a cudaError_t.
int64_t pack_mask_workspace(int64_t positions);
int pack_mask_cuda(const PackMask& op, int device, void* stream);
int gather_rows_cuda(const TakeRows& op, int device, void* stream);

const char* cuda_error_string(int code);

}  // namespace fastbert
