// All layers of an encoder over packed tokens. Compiled for the base instruction set.
//
// Many tokens: a task takes a block of rows from the attention's output to the next layer's queries, keys and values,
// in buffers that stay in its core's cache; two barriers per layer. Few tokens: the ops run one after the other, each
// parallelised over columns too, so that one text uses all cores.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "team.h"

namespace fastbert {
namespace {

int64_t lines(int64_t bytes) { return (bytes + 63) / 64; }

// Sizes and workspace offsets of one call.
struct Plan {
    int64_t element, E, F, projected, tiles, tile_m, blocks;  // columns of qkv as the product has them
    int64_t rows, most_rows;                             // per block, or all rows if blocks is 0; the most per block
    int64_t wide_stride, narrow_stride;                  // in elements, of rows of F and of E
    int64_t qkv, context, narrow, wide, prepared, thread_bytes, total;
    int64_t states = 0;                                  // of the picked tokens

    Plan(const Encoder& op, Isa isa, int threads) : element(op.dtype == DType::f32 ? 4 : 2), E(op.E), F(0) {
        projected = E + 2 * (E / op.H) * op.G;
        for (int64_t l = 0; l < op.L; ++l) F = std::max(F, op.layers[l].F);
        const LinearKernel& kernel = linear_kernel(op.dtype, op.precision, isa);
        tile_m = kernel.tile_m;
        tiles = (op.T + tile_m - 1) / tile_m;
        // A core reads each weight once per block, so blocks are large; their number is a multiple of the threads.
        const int64_t block_tiles = std::max<int64_t>(1, kernel.block_rows / tile_m);
        most_rows = block_tiles * tile_m;
        blocks = (tiles + block_tiles - 1) / block_tiles;
        blocks = (blocks + threads - 1) / threads * threads;
        if (blocks > tiles || tiles < 2 * threads * std::max<int64_t>(1, LEAST_ROWS / tile_m)) blocks = 0;
        place(op, isa, blocks ? (tiles + blocks - 1) / blocks * tile_m : op.T, blocks ? threads : 1);
    }

    // Lays out the workspace for so many rows per block, and so many threads' buffers.
    void place(const Encoder& op, Isa isa, int64_t block_rows, int64_t buffers) {
        rows = block_rows;
        // A row stride of an odd number of cache lines: neighbouring rows fall into different sets of the cache.
        wide_stride = (lines(F * element) | 1) * 64 / element;
        narrow_stride = (lines(E * element) | 1) * 64 / element;

        const int64_t narrow_bytes = rows * narrow_stride * element;
        narrow = 0;
        wide = narrow + 2 * narrow_bytes;
        // With fewer heads of keys than of queries, it also holds a product of theirs until they are repeated.
        const int64_t grouped = op.G < op.H ? lines(rows * projected * element) * 64 : 0;
        prepared = wide + std::max(rows * wide_stride * element, grouped);
        thread_bytes = prepared + std::max(prepared_bytes(op.dtype, op.precision, rows, E, isa),
                                           prepared_bytes(op.dtype, op.precision, rows, F, isa));
        thread_bytes = lines(thread_bytes) * 64;
        qkv = thread_bytes * buffers;
        context = qkv + lines(op.T * 3 * E * element) * 64;
        total = context + lines(op.T * E * element) * 64;
    }

    // The plan of the picked tokens' rest, behind this one's workspace: buffers, contexts, states.
    Plan picked(const Encoder& op, Isa isa) const {
        Plan plan = *this;
        plan.place(op, isa, op.P, 1);
        const int64_t bytes = lines(op.P * E * element) * 64;
        plan.context = total + plan.thread_bytes;
        plan.states = plan.context + bytes;
        plan.total = plan.states + bytes;
        return plan;
    }

    static constexpr int64_t LEAST_ROWS = 48;
};

char* at(const void* base, int64_t elements, int64_t size) {
    return static_cast<char*>(const_cast<void*>(base)) + elements * size;
}

// The ops of one call, over rows [first, first + count) of the packed tokens, in one thread's buffers.
//
// Norms after: attention, out + x -> middle, up, down + middle -> y, which is the next layer's x.
// Norms before: middle = norm(x), attention, x += out, middle = norm(x), up, x += down; x is in y from layer 0 on. Each
// norm but the first is one op with the addition before it.
struct Block {
    const Encoder& op;
    const Plan& plan;
    char* memory;        // the thread's buffers
    int64_t first, count;

    void* qkv() const { return at(op.workspace, 0, 0) + plan.qkv + first * 3 * plan.E * plan.element; }
    void* context() const { return at(op.workspace, 0, 0) + plan.context + first * plan.E * plan.element; }
    void* middle() const { return memory + plan.narrow; }
    void* sums() const { return memory + plan.narrow + plan.rows * plan.narrow_stride * plan.element; }
    void* wide() const { return memory + plan.wide; }
    void* y() const { return at(op.y, first * plan.E, plan.element); }
    // The input of a layer: op.x of the first, then op.y, which each layer overwrites.
    const void* x(int64_t layer) const { return at(layer ? op.y : op.x, first * plan.E, plan.element); }
    // Whether the product of queries, keys and values goes to `wide`, to be repeated for all heads from there.
    bool repeats() const { return op.G < op.H; }
    bool has_input_norm(int64_t l) const { return op.pre_norm && op.layers[l].attention_norm_weight; }

    Linear linear(const void* packed, int64_t N, int64_t K, const void* x, int64_t stride_xm, void* y, int64_t stride_ym,
                  Activation activation = Activation::none, bool gated = false) const {
        Linear product = {op.dtype, count, N, K, x, packed, y, stride_xm, stride_ym, activation, op.precision, nullptr,
                          nullptr, gated};
        place_prepared(product, memory + plan.prepared);
        return product;
    }
    Linear project_qkv(int64_t l) const {
        const bool normed = has_input_norm(l);
        return linear(op.layers[l].qkv, plan.projected, plan.E, normed ? middle() : x(l),
                      normed ? plan.narrow_stride : plan.E, repeats() ? wide() : qkv(), plan.projected);
    }
    Rotary rotary(int64_t l) const {
        return {op.dtype, count, op.H, op.G, plan.E / op.H, repeats() ? wide() : qkv(), qkv(), op.layers[l].rotary,
                op.positions + first};
    }
    Linear attention_output(int64_t l) const {
        return linear(op.layers[l].out, plan.E, plan.E, context(), plan.E, sums(), plan.narrow_stride);
    }
    Linear up(int64_t l) const {
        const int64_t F = op.layers[l].F;
        return linear(op.layers[l].up, op.gated ? 2 * F : F, plan.E, middle(), plan.narrow_stride, wide(),
                      plan.wide_stride, op.activation, op.gated);
    }
    Linear down(int64_t l) const {
        return linear(op.layers[l].down, plan.E, op.layers[l].F, wide(), plan.wide_stride, sums(), plan.narrow_stride);
    }
    AddLayerNorm norm(const void* x, int64_t stride_xm, const void* residual, int64_t stride_rm, const void* weight,
                      const void* bias, void* y, int64_t stride_ym) const {
        return {op.dtype, count, plan.E, x, residual, weight, bias, y, stride_xm, stride_rm, stride_ym, op.eps, nullptr, 0,
                op.rms};
    }
    // The norm before layer l's attention: of x alone for the first layer, else with the addition of `sums`.
    AddLayerNorm input_norm(int64_t l) const {
        const EncoderLayer& w = op.layers[l];
        if (!l) return norm(x(0), plan.E, nullptr, 0, w.attention_norm_weight, w.attention_norm_bias, middle(), plan.narrow_stride);
        AddLayerNorm sum = norm(sums(), plan.narrow_stride, y(), plan.E, w.attention_norm_weight, w.attention_norm_bias,
                                middle(), plan.narrow_stride);
        sum.sum = y(), sum.stride_sm = plan.E;
        return sum;
    }
    // The norm between attention and feed-forward.
    AddLayerNorm middle_norm(int64_t l) const {
        const EncoderLayer& w = op.layers[l];
        const void *weight = op.pre_norm ? w.norm_weight : w.attention_norm_weight;
        const void *bias = op.pre_norm ? w.norm_bias : w.attention_norm_bias;
        AddLayerNorm sum = norm(sums(), plan.narrow_stride, x(l), plan.E, weight, bias, middle(), plan.narrow_stride);
        if (op.pre_norm) sum.sum = y(), sum.stride_sm = plan.E;
        return sum;
    }
    // The norm after layer l or, where norms stand before, after the last one.
    AddLayerNorm output_norm(int64_t l) const {
        const EncoderLayer& w = op.layers[l];
        if (op.pre_norm)
            return norm(sums(), plan.narrow_stride, y(), plan.E, op.final_weight, op.final_bias, y(), plan.E);
        return norm(sums(), plan.narrow_stride, middle(), plan.narrow_stride, w.norm_weight, w.norm_bias, y(), plan.E);
    }
    bool ends_with_norm(int64_t l) const { return !op.pre_norm || l + 1 == op.L; }
};

Attention attention_of(const Encoder& op, const Plan& plan, int64_t l) {
    const int64_t D = plan.E / op.H;
    const Block all{op, plan, static_cast<char*>(op.workspace), 0, op.T};
    return {op.dtype, op.T, op.B, op.H, D, all.qkv(), op.cu_seqlens, all.context(), 3 * plan.E, plan.E, op.scale_log2,
            op.distance_bias, op.reach, op.layers[l].window};
}

// A layer past its attention, op by op.
void finish_layer(const Block& all, int64_t l, Isa isa, Team& team) {
    linear_cpu(all.attention_output(l), isa, team);
    add_layer_norm_cpu(all.middle_norm(l), isa, team);
    linear_cpu(all.up(l), isa, team);
    linear_cpu(all.down(l), isa, team);
    if (all.ends_with_norm(l)) add_layer_norm_cpu(all.output_norm(l), isa, team);
}

// The last layer past its attention, of the picked tokens alone.
void finish_picked(const Encoder& whole, const Plan& whole_plan, Isa isa, Team& team) {
    const Plan plan = whole_plan.picked(whole, isa);
    Encoder op = whole;
    op.T = op.P, op.x = op.y;
    char* const workspace = static_cast<char*>(op.workspace);
    const Block from{whole, whole_plan, nullptr, 0, whole.T}, to{op, plan, workspace + whole_plan.total, 0, op.T};
    const int64_t last = op.L - 1, row = plan.E * plan.element;
    const auto copy = [&](void* y, int64_t i, const void* x, int64_t j) {
        std::memcpy(static_cast<char*>(y) + i * row, static_cast<const char*>(x) + j * row, row);
    };
    // By way of the workspace: y, which is to receive the states, may be what they are read from.
    team.each(op.P, [&](int64_t i) {
        copy(to.context(), i, from.context(), op.picked[i]);
        copy(workspace + plan.states, i, from.x(last), op.picked[i]);
    });
    team.each(op.P, [&](int64_t i) { copy(op.y, i, workspace + plan.states, i); });
    finish_layer(to, last, isa, team);
}

void run_in_blocks(const Encoder& op, const Plan& plan, Isa isa, Team& team) {
    const CpuKernels& kernels = cpu_kernels(isa);
    const LinearKernel& kernel = linear_kernel(op.dtype, op.precision, isa);
    const bool full = op.dtype == DType::f32;
    const auto norm = full ? kernels.add_layer_norm.f32 : kernels.add_layer_norm.bf16;
    const auto rotate = full ? kernels.rotary.f32 : kernels.rotary.bf16;
    const int64_t tile_n = kernels.linear.tile_n;
    const auto multiply = [&](const Linear& product) {
        if (kernel.prepare) kernel.prepare(product, 0, product.M);
        kernel.run(product, 0, product.M, 0, (product.N + tile_n - 1) / tile_n);
    };

    // Step -1 only projects layer 0's queries, keys and values.
    for (int64_t l = -1; l < op.L; ++l) {
        if (l >= 0) attention_cpu(attention_of(op, plan, l), isa, team);
        if (op.picked && l + 1 == op.L) return finish_picked(op, plan, isa, team);
        team.each(plan.blocks, [&](int64_t task) {
            const int64_t first = plan.tiles * task / plan.blocks * plan.tile_m;
            const int64_t end = std::min(op.T, plan.tiles * (task + 1) / plan.blocks * plan.tile_m);
            const Block block{op, plan, static_cast<char*>(op.workspace) + team.number() * plan.thread_bytes, first,
                              end - first};
            if (l >= 0) {
                multiply(block.attention_output(l));
                norm(block.middle_norm(l), 0, block.count);
                multiply(block.up(l));
                multiply(block.down(l));
                if (block.ends_with_norm(l)) norm(block.output_norm(l), 0, block.count);
            }
            if (l + 1 == op.L) return;
            if (block.has_input_norm(l + 1)) norm(block.input_norm(l + 1), 0, block.count);
            multiply(block.project_qkv(l + 1));
            if (op.layers[l + 1].rotary) rotate(block.rotary(l + 1), 0, block.count);
        });
    }
}

void run_op_by_op(const Encoder& op, const Plan& plan, Isa isa, Team& team) {
    const Block all{op, plan, static_cast<char*>(op.workspace), 0, op.T};
    for (int64_t l = 0; l < op.L; ++l) {
        if (all.has_input_norm(l)) add_layer_norm_cpu(all.input_norm(l), isa, team);
        linear_cpu(all.project_qkv(l), isa, team);
        if (op.layers[l].rotary) rotary_cpu(all.rotary(l), isa, team);
        attention_cpu(attention_of(op, plan, l), isa, team);
        if (op.picked && l + 1 == op.L) return finish_picked(op, plan, isa, team);
        finish_layer(all, l, isa, team);
    }
}

}  // namespace

int64_t encoder_workspace_bytes(const Encoder& op, Isa isa, int threads) {
    const Plan plan(op, isa, threads);
    return op.P ? plan.picked(op, isa).total : plan.total;
}

int64_t encoder_most_workspace_bytes(const Encoder& op, Isa isa, int threads) {
    Plan plan(op, isa, threads);
    int64_t most = plan.total;
    // Fewer tokens may run op by op, with all rows in one buffer, or in fewer but larger blocks. (A block has two tiles
    // or more, so that there are more tiles than blocks wherever there are enough tiles for blocks.)
    plan.place(op, isa, std::min(op.T, 2 * threads * std::max(plan.tile_m, Plan::LEAST_ROWS)), 1);
    most = std::max(most, plan.total);
    plan.place(op, isa, std::min(op.T, plan.most_rows), threads);
    return std::max(most, plan.total);
}

void encoder_cpu(const Encoder& op, Isa isa, int threads) {
    if (op.T == 0) return;
    const Plan plan(op, isa, threads);
    Team::run(threads, [&](Team& team) {
        if (plan.blocks) run_in_blocks(op, plan, isa, team);
        else run_op_by_op(op, plan, isa, team);
    });
}

}  // namespace fastbert
