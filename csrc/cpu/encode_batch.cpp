// A whole model over a padded batch: packs the ids, embeds, runs the layers, puts the states back, pools. Each step is
// an op of its own elsewhere; one call costs a caller little more than its slowest step. Compiled for the base
// instruction set.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "team.h"

namespace fastbert {
namespace {

// The workspace of one call, for any number of tokens.
struct Memory {
    int64_t row;  // bytes of a state
    int64_t offsets, indices, ids, x, y, first, layers, total = 0;

    Memory(const BatchEncoder& model, int64_t B, int64_t S, Isa isa, int threads)
        : row(model.embed.N * (model.embed.dtype == DType::f32 ? 4 : 2)) {
        offsets = take((B + 1) * 4);
        indices = take(B * S * 8);
        ids = take(4 * B * S * 8);
        x = take(B * S * row);
        y = take(B * S * row);
        first = take(B * row);
        Encoder op = model.layers;
        op.T = B * S;
        layers = take(encoder_most_workspace_bytes(op, isa, threads));
    }

    int64_t take(int64_t bytes) {
        const int64_t at = total;
        total += divide_up(bytes, 64) * 64;
        return at;
    }
};

// Where the tokens are: those of row b are the packed rows offsets[b] to offsets[b + 1], at `indices` of the batch.
struct Tokens {
    int64_t count;
    const int32_t* offsets;
    const int64_t* indices;  // null without pads
};

// Reads the mask; false if the call is not taken.
bool find_tokens(const PaddedBatch& batch, int32_t* offsets, int64_t* indices, Tokens& tokens) {
    const int64_t B = batch.B, S = batch.S;
    tokens = {B * S, offsets, nullptr};
    if (!batch.mask.mask) {
        for (int64_t b = 0; b <= B; ++b) offsets[b] = static_cast<int32_t>(b * S);
        return true;
    }
    ReadMask mask = batch.mask;
    mask.B = B, mask.S = S, mask.cu_seqlens = offsets, mask.indices = indices;
    const MaskSummary found = read_mask_cpu(mask);
    if (found.bad || (found.leading_pads && batch.pad_id >= 0)) return false;
    tokens.count = found.tokens;
    if (found.tokens < B * S) tokens.indices = indices;
    return true;
}

bool within(const int64_t* ids, int64_t n, int64_t count) {
    if (!ids || !n) return true;
    const auto [low, high] = bounds_cpu(8, n, ids);
    return low >= 0 && high < count;
}

// True if every masked position of a row that has tokens holds `pad_id`.
bool only_pads_are_masked(const PaddedBatch& batch, const Tokens& tokens) {
    if (!tokens.indices || batch.pad_id < 0) return true;
    for (int64_t b = 0; b < batch.B; ++b) {
        int64_t t = tokens.offsets[b];
        const int64_t end = tokens.offsets[b + 1];
        if (t == end) continue;
        for (int64_t at = b * batch.S; at < (b + 1) * batch.S; ++at) {
            if (t < end && tokens.indices[t] == at) ++t;
            else if (batch.input_ids[at] != batch.pad_id) return false;
        }
    }
    return true;
}

// True if the tokens of each row stand side by side: their distances are those within the packed row.
bool without_gaps(const PaddedBatch& batch, const Tokens& tokens) {
    for (int64_t b = 0; tokens.indices && b < batch.B; ++b) {
        const int64_t first = tokens.offsets[b], end = tokens.offsets[b + 1];
        if (first < end && tokens.indices[end - 1] - tokens.indices[first] != end - 1 - first) return false;
    }
    return true;
}

// True if attention depends on the distance between two columns of the caller's batch.
bool knows_distances(const BatchEncoder& model, const PaddedBatch& batch) {
    bool windows = false;
    for (int64_t l = 0; l < model.layers.L; ++l) windows |= model.layers.layers[l].window >= 0;
    return windows || batch.distance_bias;
}

void unpack(const char* y, const Tokens& tokens, const PaddedBatch& batch, int64_t row, int threads) {
    threads = worth(threads, batch.B, batch.B * batch.S * row / 4);
    Team::share(threads, batch.B, [&](int64_t b) {
        char* out = static_cast<char*>(batch.states) + b * batch.S * row;
        int64_t t = tokens.offsets[b];
        const int64_t end = tokens.offsets[b + 1];
        for (int64_t at = b * batch.S; at < (b + 1) * batch.S; ++at, out += row) {
            if (t < end && tokens.indices[t] == at) std::memcpy(out, y + t++ * row, static_cast<size_t>(row));
            else std::memset(out, 0, static_cast<size_t>(row));
        }
    });
}

// tanh(W h + b) of each row's first token; zeros for a row without one.
void pool(const BatchEncoder& model, const char* y, const Tokens& tokens, const PaddedBatch& batch, int64_t row,
          char* first, Isa isa, int threads) {
    const int32_t* offsets = tokens.offsets;
    const auto size = static_cast<size_t>(row);
    const auto empty = [&](int64_t b) { return offsets[b] == offsets[b + 1]; };
    for (int64_t b = 0; b < batch.B; ++b)
        empty(b) ? std::memset(first + b * row, 0, size) : std::memcpy(first + b * row, y + offsets[b] * row, size);
    const int64_t E = model.embed.N;
    linear_cpu({model.embed.dtype, batch.B, E, E, first, model.pooler, batch.pooled, E, E, Activation::tanh,
                Precision::full, nullptr, nullptr},
               isa, threads);
    for (int64_t b = 0; b < batch.B; ++b)
        if (empty(b)) std::memset(static_cast<char*>(batch.pooled) + b * row, 0, size);
}

}  // namespace

int64_t encode_batch_workspace_bytes(const BatchEncoder& model, int64_t B, int64_t S, Isa isa, int threads) {
    return Memory(model, B, S, isa, threads).total;
}

bool encode_batch_cpu(const BatchEncoder& model, const PaddedBatch& batch, Isa isa, int threads) {
    const int64_t B = batch.B, S = batch.S;
    EmbedLayerNorm embed = model.embed;
    const int64_t places = model.places ? model.places : embed.position.count;
    if (!within(batch.input_ids, B * S, embed.word.count) ||
        !within(batch.token_type_ids, B * S, embed.token_type.count) ||
        !within(batch.position_ids, B * S, places) || (!batch.position_ids && S > places))
        return false;
    const Memory memory(model, B, S, isa, threads);
    char* const base = static_cast<char*>(batch.workspace);
    const auto numbers = [&](int64_t at) { return reinterpret_cast<int64_t*>(base + at); };
    Tokens tokens;
    if (!find_tokens(batch, reinterpret_cast<int32_t*>(base + memory.offsets), numbers(memory.indices), tokens) ||
        !only_pads_are_masked(batch, tokens) ||
        (batch.distance_bias && S > batch.reach) || (knows_distances(model, batch) && !without_gaps(batch, tokens)))
        return false;

    const int64_t T = tokens.count;
    int64_t *const ids = numbers(memory.ids), *const types = ids + T, *const positions = types + T, *const none = positions + T;
    for (int64_t t = 0; t < T; ++t) {
        const int64_t at = tokens.indices ? tokens.indices[t] : t;
        ids[t] = batch.input_ids[at];
        types[t] = batch.token_type_ids ? batch.token_type_ids[at] : 0;
        positions[t] = batch.position_ids ? batch.position_ids[at] : at % S;
        none[t] = 0;
    }
    embed.M = T;
    embed.word.ids = ids, embed.token_type.ids = types, embed.position.ids = model.places ? none : positions;
    embed.y = base + memory.x;
    embed_layer_norm_cpu(embed, isa, threads);

    char* const y = tokens.indices ? base + memory.y : static_cast<char*>(batch.states);
    Encoder layers = model.layers;
    layers.T = T, layers.B = B, layers.cu_seqlens = tokens.offsets;
    layers.distance_bias = batch.distance_bias, layers.reach = batch.reach;
    layers.positions = positions;
    layers.x = base + memory.x, layers.y = y, layers.workspace = base + memory.layers;
    encoder_cpu(layers, isa, threads);

    if (tokens.indices) unpack(y, tokens, batch, memory.row, threads);
    if (model.pooler) pool(model, y, tokens, batch, memory.row, base + memory.first, isa, threads);
    return true;
}

}  // namespace fastbert
