// The row kernels of one ARM instruction set as functions of an array of numbers and addresses, for tests that run them
// in an emulator. Linked without a C++ library: the kernels need none.
#include <cstddef>

#include "bwd.h"
#include "kernels.h"

using namespace fastbert;
namespace isa = fastbert::FASTBERT_ISA;

namespace {

// Reads the arguments of a call one after the other.
struct Arguments {
    const int64_t* next;
    int64_t number() { return *next++; }
    template <typename T = void>
    T* address() { return reinterpret_cast<T*>(*next++); }
    DType dtype() { return static_cast<DType>(*next++); }
    Activation activation() { return static_cast<Activation>(*next++); }
};

Dropout dropout_of(Arguments& a) {
    const auto seed = static_cast<uint64_t>(a.number());
    const auto threshold = static_cast<uint32_t>(a.number());
    return {seed, threshold, threshold ? 1.0f / (1.0f - static_cast<float>(threshold) / 4294967296.0f) : 1.0f};
}

constexpr float EPS = 1e-5f;

AddLayerNorm norm_of(Arguments& a) {
    AddLayerNorm op{};
    op.dtype = a.dtype(), op.M = a.number(), op.N = a.number(), op.eps = EPS;
    op.x = a.address(), op.residual = a.address(), op.weight = a.address(), op.bias = a.address(), op.y = a.address();
    op.stride_xm = op.stride_rm = op.stride_ym = op.N;
    return op;
}

Attention attention_of(Arguments& a) {
    Attention op{};
    op.dtype = a.dtype(), op.T = a.number(), op.H = a.number(), op.D = a.number(), op.B = 1;
    op.qkv = a.address(), op.y = a.address(), op.window = a.number();
    op.stride_3 = op.H * op.D, op.stride_t = 3 * op.stride_3, op.scale_log2 = 0.25f * 1.4426950408889634f;
    return op;
}

}  // namespace

extern "C" {

// The compiler calls these. The empty assembly keeps it from making a loop a call of the function that it is in.
void* memmove(void* to, const void* from, size_t n) {
    auto *t = static_cast<char*>(to);
    const auto* f = static_cast<const char*>(from);
    for (size_t i = 0; i < n; ++i) {
        const size_t at = t < f ? i : n - 1 - i;
        t[at] = f[at];
        asm volatile("" : : : "memory");
    }
    return to;
}
void* memcpy(void* to, const void* from, size_t n) { return memmove(to, from, n); }
void* memset(void* to, int value, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        static_cast<char*>(to)[i] = static_cast<char>(value);
        asm volatile("" : : : "memory");
    }
    return to;
}

void linear(const int64_t* arguments) {
    Arguments a{arguments};
    Linear op{};
    op.dtype = a.dtype(), op.precision = static_cast<Precision>(a.number()), op.activation = a.activation();
    op.M = a.number(), op.N = a.number(), op.K = a.number();
    op.x = a.address();
    const void *weight = a.address(), *bias = a.address();
    op.y = a.address();
    void* packed = a.address();
    op.packed = packed, op.prepared = a.address(), op.scales = a.address<float>();
    op.stride_xm = op.K, op.stride_ym = op.N;
    const LinearKernels& kernels = isa::linear_kernels;
    const LinearKernel& kernel = kernels.kernels[op.dtype == DType::f32 ? 0 : 1][static_cast<int>(op.precision)];
    const int64_t panels = (op.N + kernels.tile_n - 1) / kernels.tile_n;
    kernel.pack({op.dtype, op.N, op.K, weight, bias, packed, op.K, op.precision}, 0, panels);
    if (kernel.prepare) kernel.prepare(op, 0, op.M);
    kernel.run(op, 0, op.M, 0, panels);
}

int64_t packed_bytes(const int64_t* arguments) {
    Arguments a{arguments};
    const int64_t dtype = a.number(), precision = a.number(), N = a.number(), K = a.number();
    const LinearKernels& kernels = isa::linear_kernels;
    return (N + kernels.tile_n - 1) / kernels.tile_n * kernels.kernels[dtype][precision].panel_words(K) * 4;
}

void add_layer_norm(const int64_t* arguments) {
    Arguments a{arguments};
    const AddLayerNorm op = norm_of(a);
    (op.dtype == DType::f32 ? isa::add_layer_norm_kernels.f32 : isa::add_layer_norm_kernels.bf16)(op, 0, op.M);
}

// Forward and backward with dropout.
void add_layer_norm_train(const int64_t* arguments) {
    Arguments a{arguments};
    const AddLayerNorm op = norm_of(a);
    const Dropout dropout = dropout_of(a);
    float *mean = a.address<float>(), *rstd = a.address<float>(), *scratch = a.address<float>();
    AddLayerNormBwd back{op, dropout, mean, rstd, a.address(), a.address(), a.address(), nullptr, nullptr, a.address<float>(),
                         op.N};
    back.dweight = a.address(), back.dbias = a.address();
    const bool wide = op.dtype == DType::f32;
    const AddLayerNormBwdKernels& kernels = isa::add_layer_norm_fwd_train_kernels;
    (wide ? kernels.forward_f32 : kernels.forward_bf16)({op, dropout, mean, rstd}, 0, op.M, scratch);
    const int64_t blocks = (op.M + PARTIAL_ROWS - 1) / PARTIAL_ROWS;
    for (int64_t block = 0; block < blocks; ++block)
        (wide ? kernels.backward_f32 : kernels.backward_bf16)(back, block, scratch);
    const auto sum = wide ? isa::linear_fwd_train_kernels.sum_f32 : isa::linear_fwd_train_kernels.sum_bf16;
    sum(back.partials, blocks, 2 * op.N, op.N, back.dweight);
    sum(back.partials + op.N, blocks, 2 * op.N, op.N, back.dbias);
}

void attention(const int64_t* arguments) {
    Arguments a{arguments};
    const Attention op = attention_of(a);
    void* memory = a.address();
    const auto run = op.dtype == DType::f32 ? isa::attention_kernels.f32 : isa::attention_kernels.bf16;
    for (int64_t head = 0; head < op.H; ++head) run(op, {0, op.T, 0, op.T, head}, memory);
}

// Forward and backward with dropout.
void attention_train(const int64_t* arguments) {
    Arguments a{arguments};
    const Attention op = attention_of(a);
    const Dropout dropout = dropout_of(a);
    float* row_max = a.address<float>();
    const void* dy = a.address();
    void *dqkv = a.address(), *memory = a.address();
    const bool wide = op.dtype == DType::f32;
    const AttentionBwdKernels& kernels = isa::attention_fwd_train_kernels;
    for (int64_t head = 0; head < op.H; ++head)
        (wide ? kernels.forward_f32 : kernels.forward_bf16)({op, dropout, op.T, row_max}, 0, op.T, head, memory);
    for (int64_t head = 0; head < op.H; ++head)
        (wide ? kernels.backward_f32 : kernels.backward_bf16)({op, dropout, op.T, row_max, dy, dqkv}, 0, op.T, head, memory);
}

void embed_layer_norm(const int64_t* arguments) {
    Arguments a{arguments};
    EmbedLayerNorm op{};
    op.dtype = a.dtype(), op.M = a.number(), op.N = a.number(), op.eps = EPS;
    for (EmbedTable* table : {&op.word, &op.token_type, &op.position})
        table->rows = a.address(), table->ids = a.address<const int64_t>(), table->count = a.number(), table->stride = op.N;
    op.weight = a.address(), op.bias = a.address(), op.y = a.address();
    op.dropout = dropout_of(a);
    float* sums = a.address<float>();
    (op.dtype == DType::f32 ? isa::embed_layer_norm_kernels.f32 : isa::embed_layer_norm_kernels.bf16)(op, 0, op.M, sums);
}

void rotary(const int64_t* arguments) {
    Arguments a{arguments};
    Rotary op{};
    op.dtype = a.dtype(), op.T = a.number(), op.H = a.number(), op.G = a.number(), op.D = a.number();
    op.x = a.address(), op.y = a.address(), op.table = a.address<const float>();
    op.positions = a.address<const int64_t>(), op.backward = a.number();
    (op.dtype == DType::f32 ? isa::rotary_kernels.f32 : isa::rotary_kernels.bf16)(op, 0, op.T);
}

// The weight's gradient: the product of two transposes.
void linear_dweight(const int64_t* arguments) {
    Arguments a{arguments};
    LinearDweight op{};
    op.dtype = a.dtype(), op.N = a.number(), op.K = a.number(), op.tokens = a.number();
    const void *dzt = a.address(), *x = a.address();
    void* packed = a.address();
    op.dzt = dzt, op.packed = packed, op.dweight = a.address(), op.sums = a.address<float>();
    op.stride_dzt = op.tokens, op.first = op.last = true;
    const bool wide = op.dtype == DType::f32;
    const LinearBwdKernels& kernels = isa::linear_fwd_train_kernels;
    (wide ? kernels.pack_f32 : kernels.pack_bf16)({op.dtype, op.K, op.tokens, x, packed, op.tokens, op.K}, 0, op.tokens);
    const int64_t panels = (op.K + kernels.tile_n - 1) / kernels.tile_n;
    (wide ? kernels.gradient_f32 : kernels.gradient_bf16)(op, 0, op.N, 0, panels);
}

void activate(const int64_t* arguments) {
    Arguments a{arguments};
    Activate op{};
    op.dtype = a.dtype(), op.n = a.number(), op.x = a.address(), op.y = a.address(), op.activation = a.activation();
    (op.dtype == DType::f32 ? isa::linear_fwd_train_kernels.activate_f32 : isa::linear_fwd_train_kernels.activate_bf16)(
        op, 0, op.n);
}

// The gradient of an activation, dz.
void activation_bwd(const int64_t* arguments) {
    Arguments a{arguments};
    ActivationBwd op{};
    op.dtype = a.dtype(), op.M = a.number(), op.N = a.number(), op.dy = a.address(), op.saved = a.address();
    op.dz = a.address(), op.activation = a.activation();
    op.stride_dym = op.stride_sm = op.stride_dz = op.N;
    const LinearBwdKernels& kernels = isa::linear_fwd_train_kernels;
    const int64_t strips = (op.N + kernels.strip_columns - 1) / kernels.strip_columns;
    for (int64_t block = 0; block < (op.M + PARTIAL_ROWS - 1) / PARTIAL_ROWS; ++block)
        for (int64_t strip = 0; strip < strips; ++strip)
            (op.dtype == DType::f32 ? kernels.backward_f32 : kernels.backward_bf16)(op, block, strip);
}

// Each token's largest logit, and the sum of exp(logit - largest), over one block of the vocabulary.
void cross_entropy(const int64_t* arguments) {
    Arguments a{arguments};
    CrossEntropy op{};
    op.dtype = a.dtype(), op.V = a.number(), op.K = a.number();
    op.logits = a.address(), op.bias = a.address(), op.labels = a.address<const int32_t>();
    float *top = a.address<float>(), *total = a.address<float>();
    const CrossEntropyKernels& kernels = isa::cross_entropy_kernels;
    (op.dtype == DType::f32 ? kernels.statistics_f32 : kernels.statistics_bf16)(op, 0, op.V, top, total);
}

}  // extern "C"
