// Dropout without a stored mask: whether an element stays is a function of the seed, its row and its column, so the
// backward asks again, and neither threads nor the instruction set change the answer.
#pragma once

#include "vec_math.h"

namespace fastbert::FASTBERT_ISA {

using Uints = uint32_t __attribute__((vector_size(sizeof(Vec))));

// What a kept element is multiplied by, and the bound (of 2^24) below which one is dropped.
struct Dropout {
    Vec scale;
    Ints bound;
    bool active;

    explicit Dropout(float p)
        : scale(set(1.0f / (1.0f - p))), bound(Ints{} + static_cast<int32_t>(p * 16777216.0f)), active(p > 0.0f) {}
};

// One row of the generator: 64 bits that depend on seed and row (splitmix64, Steele et al., 2014).
struct DropoutRow {
    uint32_t low, high;

    DropoutRow(uint64_t seed, int64_t row) {
        uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        low = static_cast<uint32_t>(z);
        high = static_cast<uint32_t>(z >> 32);
    }

    // 24 random bits for each of the columns from n on: Wellons' lowbias32, with the other half of the row's key
    // between its rounds, since two rows' columns may run through the same counters.
    Ints bits(int64_t n) const {
        Uints x;
        for (int i = 0; i < WIDTH; ++i) x[i] = static_cast<uint32_t>(i);
        x += low + static_cast<uint32_t>(n);
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= (x >> 15) ^ high;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        return (Ints)(x >> 8);
    }

    Vec drop(const Dropout& dropout, Vec v, int64_t n) const {
        return (Vec)((Ints)mul(v, dropout.scale) & (Ints)(bits(n) >= dropout.bound));
    }
};

}  // namespace fastbert::FASTBERT_ISA
