// Words of 32 bits that run down the rows of a matrix, as operand B of a product requires (tile.h): one fp32, or two
// bf16 of neighbouring rows.
#pragma once

#include "dropout.h"
#include "rows.h"
#include "tile.h"

namespace fastbert::FASTBERT_ISA {

// The words of the first `lanes` columns; `second`: there is a row after the one at p.
static inline Words down(const float* p, int64_t, bool, int lanes) { return (Words)load_part(p, lanes); }
static inline Words down(const bf16* p, int64_t stride, bool second, int lanes) {
    const Words even = (Words)load_part(p, lanes) >> 16;
    return second ? even | (Words)load_part(p + stride, lanes) : even;
}

static inline void store_words(uint32_t* p, Words v) { store(reinterpret_cast<float*>(p), (Vec)v); }

// Packs word row k of a matrix of `rows` rows: TILE_N columns, the first n of which exist.
template <typename T>
static inline void pack_down_row(const T* src, int64_t stride, int64_t rows, int64_t n, int64_t k, uint32_t* out) {
    const T* row = src + k * PER_WORD<T> * stride;
    const bool second = (k + 1) * PER_WORD<T> <= rows;
    for (int v = 0; v < NV; ++v) {
        const int64_t rest = n - v * WIDTH;
        const int lanes = rest < WIDTH ? static_cast<int>(rest) : WIDTH;
        store_words(out + v * WIDTH, lanes > 0 ? down(row + v * WIDTH, stride, second, lanes) : fill(0));
    }
}

// Packs a panel of TILE_N columns, the first n of which exist.
template <typename T>
static inline void pack_down(const T* src, int64_t stride, int64_t rows, int64_t n, uint32_t* panel) {
    for (int64_t k = 0; k < words_of<T>(rows); ++k) pack_down_row(src, stride, rows, n, k, panel + k * TILE_N);
}

}  // namespace fastbert::FASTBERT_ISA
