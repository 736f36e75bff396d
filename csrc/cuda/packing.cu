// Packing without the host: pack_mask locates the real tokens, gather_rows copies rows by index.
//
// pack_mask is one prefix sum over the B * S positions. A warp ballots which of 32 neighbouring positions are real: the
// set bits below a lane are its rank. There are three launches: blocks count a tile each, one block scans the counts,
// blocks write. One launch does it all where the positions fit a single tile. Real position number r goes to
// indices[r], and -1 for pad number p to indices[T + p]: each element is written once, in coalesced stores, and nothing
// must be zeroed before. Per position, the mask is read twice (once with one tile) and 16 bytes are written.
//
// gather_rows moves 2 * row_bytes per row and is memory-bound: it uses 16-byte loads where addresses allow it.
#include <cuda_runtime.h>

#include <cstdint>

#include "fastbert.h"

namespace fastbert {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARP = 32, WARPS = 32, THREADS = WARPS * WARP;
constexpr int ROUNDS = 8;  // loads that a lane has in flight
constexpr int64_t TILE = THREADS * ROUNDS;

__device__ int lane() { return threadIdx.x % WARP; }
__device__ int warp() { return threadIdx.x / WARP; }

// The sum of v over this lane and those below it.
__device__ int64_t warp_inclusive(int64_t v) {
    for (int step = 1; step < WARP; step *= 2) {
        const int64_t below = __shfl_up_sync(ALL, v, step);
        if (lane() >= step) v += below;
    }
    return v;
}

// Sums a number of each warp: over the warps below this one, and in `total` over all.
__device__ int64_t warps_below(int64_t v, int64_t& total) {
    __shared__ int64_t scratch[WARPS];
    __syncthreads();  // the previous call has read its scratch
    if (lane() == 0) scratch[warp()] = v;
    __syncthreads();
    const int64_t sums = warp_inclusive(scratch[lane()]);
    total = __shfl_sync(ALL, sums, WARPS - 1);
    return __shfl_sync(ALL, sums, warp()) - v;
}

// A warp's share of its tile: for each round, one bit for each of 32 positions, set if it is real.
struct Bits {
    unsigned real[ROUNDS];
    int count = 0;
    bool bad = false;
};

__device__ int64_t position_of(int round) {
    return blockIdx.x * TILE + (warp() * ROUNDS + round) * WARP + lane();
}

template <typename M>
__device__ Bits read_bits(const void* mask, int64_t positions) {
    M value[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int64_t i = position_of(round);
        value[round] = i < positions ? static_cast<const M*>(mask)[i] : M(0);
    }
    Bits bits;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        bits.real[round] = __ballot_sync(ALL, value[round] == M(1));
        bits.count += __popc(bits.real[round]);
        bits.bad |= value[round] != M(0) && value[round] != M(1);
    }
    return bits;
}

// workspace[tile] = the tile's number of real tokens, with all bits inverted if the tile holds a bad value.
template <typename M>
__global__ void __launch_bounds__(THREADS) count_kernel(PackMask op) {
    const Bits bits = read_bits<M>(op.mask, op.B * op.S);
    int64_t total;
    warps_below(bits.count, total);
    const bool bad = __syncthreads_or(bits.bad);
    if (threadIdx.x == 0) op.workspace[blockIdx.x] = bad ? ~total : total;
}

// Exclusive scan: turns the counts into the number of real tokens before each tile, then appends their total.
__global__ void __launch_bounds__(THREADS) scan_kernel(PackMask op, int64_t tiles) {
    int64_t before = 0;
    bool bad = false;
    for (int64_t first = 0; first < tiles; first += THREADS) {
        const int64_t tile = first + threadIdx.x;
        int64_t count = tile < tiles ? op.workspace[tile] : 0;
        bad |= count < 0;
        count = count < 0 ? ~count : count;
        const int64_t inclusive = warp_inclusive(count);
        int64_t total;
        const int64_t below = warps_below(__shfl_sync(ALL, inclusive, WARP - 1), total);
        if (tile < tiles) op.workspace[tile] = before + below + inclusive - count;
        before += total;
    }
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
        op.workspace[tiles] = before;
        *op.bad = bad;
    }
}

template <typename M, bool ONE_TILE>
__global__ void __launch_bounds__(THREADS) write_kernel(PackMask op, int64_t tiles) {
    const int64_t positions = op.B * op.S;
    const Bits bits = read_bits<M>(op.mask, positions);
    int64_t here;
    int64_t rank = warps_below(bits.count, here);  // of the warp's first position in the round
    int64_t tokens = here;
    if constexpr (ONE_TILE) {
        const bool bad = __syncthreads_or(bits.bad);
        if (threadIdx.x == 0) *op.bad = bad;
    } else {
        rank += op.workspace[blockIdx.x];
        tokens = op.workspace[tiles];
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int64_t i = position_of(round);
        if (i < positions) {
            const int64_t before = rank + __popc(bits.real[round] & ((1u << lane()) - 1));
            const bool real = bits.real[round] >> lane() & 1;
            op.places[i] = real ? before : -1;
            op.indices[real ? before : tokens + i - before] = real ? i : -1;
            // 32 bits hold both, and divide three times as fast
            const auto row = static_cast<uint32_t>(i) / static_cast<uint32_t>(op.S);
            if (row * static_cast<uint32_t>(op.S) == i) op.cu_seqlens[row] = static_cast<int32_t>(before);
        }
        rank += __popc(bits.real[round]);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) op.cu_seqlens[op.B] = static_cast<int32_t>(tokens);
}

template <typename M>
void launch_pack(const PackMask& op, cudaStream_t stream) {
    const int64_t tiles = (op.B * op.S + TILE - 1) / TILE;
    if (tiles == 1) {
        write_kernel<M, true><<<1, THREADS, 0, stream>>>(op, tiles);
        return;
    }
    const auto grid = static_cast<unsigned>(tiles);
    count_kernel<M><<<grid, THREADS, 0, stream>>>(op);
    scan_kernel<<<1, THREADS, 0, stream>>>(op, tiles);
    write_kernel<M, false><<<grid, THREADS, 0, stream>>>(op, tiles);
}

template <int BYTES>
struct alignas(BYTES) Piece {
    unsigned char byte[BYTES];
};

constexpr int ROW_THREADS = 256;

// A block is (pieces of a row, rows): consecutive threads move consecutive pieces, without a division.
template <int BYTES>
__global__ void __launch_bounds__(ROW_THREADS) gather_rows_kernel(TakeRows op) {
    using P = Piece<BYTES>;
    const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (m >= op.M) return;
    const int64_t pieces = op.row_bytes / BYTES, from = op.index[m];
    P* y = static_cast<P*>(op.y) + m * pieces;
    if (from >= 0 && from < op.rows) {
        const P* x = reinterpret_cast<const P*>(static_cast<const char*>(op.x) + from * op.stride_x);
#pragma unroll 4
        for (int64_t n = threadIdx.x; n < pieces; n += blockDim.x) y[n] = x[n];
    } else {
        for (int64_t n = threadIdx.x; n < pieces; n += blockDim.x) y[n] = P{};
    }
}

template <int BYTES>
void launch_take(const TakeRows& op, cudaStream_t stream) {
    const int64_t pieces = op.row_bytes / BYTES;
    unsigned x = 1;
    if (pieces >= WARP)  // whole warps per row
        x = static_cast<unsigned>(pieces < ROW_THREADS ? (pieces + WARP - 1) / WARP * WARP : ROW_THREADS);
    else  // a power of two, so that rows share a warp evenly
        while (x < pieces) x *= 2;
    const dim3 block(x, ROW_THREADS / x);
    const int64_t grid = (op.M + block.y - 1) / block.y;
    gather_rows_kernel<BYTES><<<static_cast<unsigned>(grid), block, 0, stream>>>(op);
}

bool fits(const TakeRows& op, int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(op.x) | reinterpret_cast<uintptr_t>(op.y);
    return address % bytes == 0 && op.row_bytes % bytes == 0 && op.stride_x % bytes == 0;
}

// Launches with `device` as the current device, then restores the previous one. Returns 0 or an error code.
template <typename Launch>
int on_device(int device, const Launch& launch) {
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    launch();
    error = cudaGetLastError();
    if (before != device) cudaSetDevice(before);
    return error;
}

}  // namespace

int64_t pack_mask_workspace(int64_t positions) { return (positions + TILE - 1) / TILE + 1; }

int pack_mask_cuda(const PackMask& op, int device, void* opaque) {
    const auto stream = static_cast<cudaStream_t>(opaque);
    if (op.S > 0 && op.B > INT32_MAX / op.S) return cudaErrorInvalidValue;
    cudaError_t cleared = cudaSuccess;
    const int error = on_device(device, [&] {
        if (op.B * op.S == 0) {
            cleared = cudaMemsetAsync(op.cu_seqlens, 0, (op.B + 1) * sizeof(int32_t), stream);
            if (cleared == cudaSuccess) cleared = cudaMemsetAsync(op.bad, 0, sizeof(int32_t), stream);
        } else if (op.mask_bytes == 1) {
            launch_pack<uint8_t>(op, stream);
        } else if (op.mask_bytes == 4) {
            launch_pack<int32_t>(op, stream);
        } else {
            launch_pack<int64_t>(op, stream);
        }
    });
    return error ? error : cleared;
}

int gather_rows_cuda(const TakeRows& op, int device, void* opaque) {
    const auto stream = static_cast<cudaStream_t>(opaque);
    if (op.M == 0 || op.row_bytes == 0) return cudaSuccess;
    if (op.M > INT32_MAX) return cudaErrorInvalidValue;  // the limit of a grid
    return on_device(device, [&] {
        if (fits(op, 16)) launch_take<16>(op, stream);
        else if (fits(op, 8)) launch_take<8>(op, stream);
        else if (fits(op, 4)) launch_take<4>(op, stream);
        else if (fits(op, 2)) launch_take<2>(op, stream);
        else launch_take<1>(op, stream);
    });
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace fastbert
