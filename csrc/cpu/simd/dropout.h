// Dropout by a hash of seed, row and column: the backward recomputes the forward's mask, for any tiling and any number
// of threads.
//
// A row's key is 64 bits of splitmix64 (Steele et al., 2014). A column is hashed with the key's two halves by triple32
// (Wellons, 2018, "Prospecting for hash functions"); the second half enters after the first round. That is 13
// operations per vector.
#pragma once

#include "fastbert.h"
#include "vec_math.h"

namespace fastbert::FASTBERT_ISA {

using Words = uint32_t __attribute__((vector_size(sizeof(Vec))));

struct RowKey {
    uint32_t a, b;
};

static inline RowKey row_key(uint64_t seed, uint64_t row) {
    uint64_t z = seed + (row + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

static inline Words fill(uint32_t v) { return Words{} + v; }

static inline Words count_from(uint32_t first) {
    Words out = {};
    for (int i = 0; i < WIDTH; ++i) out[i] = static_cast<uint32_t>(i);
    return out + first;
}

// 32 random bits per lane. Keys and columns are both per lane, so rows may run along either side of a tile.
static inline Words random_bits(Words a, Words b, Words column) {
    Words x = column + a;
    x = (x ^ (x >> 17)) * 0xed5ad4bbu;
    x ^= b;
    x = (x ^ (x >> 11)) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    return x ^ (x >> 14);
}

// `scale` where an element stays, 0 where it is dropped.
static inline Vec keep_factor(const Dropout& dropout, Words a, Words b, Words column) {
    return random_bits(a, b, column) >= fill(dropout.threshold) ? set(dropout.scale) : set(0.0f);
}

// Applies dropout to one row.
struct Kept {
    const Dropout& dropout;
    Words a, b;

    Kept(const Dropout& dropout, int64_t row) : dropout(dropout) {
        const RowKey key = row_key(dropout.seed, static_cast<uint64_t>(row));
        a = fill(key.a);
        b = fill(key.b);
    }
    // `v` holds the columns from n on.
    Vec of(Vec v, int64_t n) const {
        return dropout.threshold ? mul(v, keep_factor(dropout, a, b, count_from(static_cast<uint32_t>(n)))) : v;
    }
};

}  // namespace fastbert::FASTBERT_ISA
