// AMX tiles of 16 rows x 64 bytes, by inline assembly: the intrinsics of GCC 12 do not declare the memory they access,
// so the optimiser moves them past the code that prepares it. The compiler itself never uses tile registers. For a
// processor without AMX, tests/amx_emulation.cpp emulates these instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastbert::FASTBERT_ISA {

// While one exists, the thread's tiles are usable: eight of 16 rows x 64 bytes.
struct TilesInUse {
    TilesInUse() {
        alignas(64) uint8_t config[64] = {1};  // palette 1; the tiles' bytes per row from 16, rows from 48
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~TilesInUse() { asm volatile("tilerelease" ::: "memory"); }
};

template <int TILE>
static inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE>
static inline void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
// The same, without keeping the lines in L1: for an operand that is read once before others need their place there.
template <int TILE>
static inline void tile_stream(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static inline void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int C, int A, int B>
static inline void tile_dot(const uint16_t*) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B, typename Bytes>
static inline void tile_dot(const Bytes*) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Loads rows [0, rows) and words [0, words) at p into a tile, zeros beyond; a full 16 x 16 without a copy, past L1.
template <int TILE>
static inline void tile_load_edge(const uint32_t* p, int64_t stride, int rows, int64_t words) {
    if (rows >= 16 && words >= 16) return tile_stream<TILE>(p, stride * 4);
    alignas(64) uint32_t edge[16][16];
    const __mmask16 mask = words >= 16 ? 0xffff : static_cast<__mmask16>((1u << words) - 1u);
    for (int i = 0; i < 16; ++i)
        _mm512_store_si512(edge[i], i < rows ? _mm512_maskz_loadu_epi32(mask, p + i * stride) : _mm512_setzero_si512());
    tile_load<TILE>(edge, 64);
}

// out (32 x 32 words, rows `apart` words from each other) = A B for rows [0, m) of A, m <= 32, and one panel of B,
// zero-padded to a multiple of 16 words; if `more`, out += A B. Rows of `out` from m up to 16 or 32 are overwritten.
// `meanwhile()` is called after each step's tile instructions: work for other units while the tiles multiply.
template <typename T, typename Meanwhile>
static inline void amx_product(const uint32_t* a, int64_t lda, int m, const uint32_t* b, int64_t words, bool more,
                               uint32_t* out, int64_t apart, const Meanwhile& meanwhile) {
    constexpr const T* type = nullptr;
    constexpr int64_t ROW = 32 * 4;  // bytes of a row of a panel
    const uint32_t* below = a + 16 * lda;
    uint32_t* const out_below = out + 16 * apart;
    const bool two = m > 16;
    if (more) {
        tile_load<0>(out, apart * 4);
        tile_load<1>(out + 16, apart * 4);
        if (two) {
            tile_load<2>(out_below, apart * 4);
            tile_load<3>(out_below + 16, apart * 4);
        }
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t k = 0; k < words; k += 16) {
        tile_load_edge<4>(a + k, lda, m, words - k);
        tile_load<6>(b + k * 32, ROW);
        tile_load<7>(b + k * 32 + 16, ROW);
        tile_dot<0, 4, 6>(type);
        tile_dot<1, 4, 7>(type);
        if (two) {
            tile_load_edge<5>(below + k, lda, m - 16, words - k);
            tile_dot<2, 5, 6>(type);
            tile_dot<3, 5, 7>(type);
        }
        meanwhile();
    }
    tile_store<0>(out, apart * 4);
    tile_store<1>(out + 16, apart * 4);
    if (two) {
        tile_store<2>(out_below, apart * 4);
        tile_store<3>(out_below + 16, apart * 4);
    }
}

}  // namespace fastbert::FASTBERT_ISA
