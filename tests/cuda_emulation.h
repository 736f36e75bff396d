// As much of CUDA as csrc/cuda uses, on any processor: it runs the logic of the kernels where no GPU is, and measures
// nothing. Blocks go one after another, their threads as fibers that change over where they meet: a warp at a shuffle
// or a ballot, a block at __syncthreads. Threads that meet at different places, or not at all, end the program with a
// message. What a barrier should have kept apart shows as well: a warp goes on until it has to wait, and `order` says
// which one goes first. tests/native/test_cuda_sources.py rewrites what is no C++: <<<>>>.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK = 64 * 1024;
constexpr unsigned WARP = 32;

enum class Order { forward, backward, random };
inline Order order = Order::forward;

[[noreturn]] inline void fail(const char* what) {
    const unsigned thread = threadIdx.x + threadIdx.y * blockDim.x;
    std::fprintf(stderr, "cuda_emulation: block %u, thread %u: %s\n", blockIdx.x, thread, what);
    std::abort();
}

// Where threads meet: each brings a value; the last one lets all of them see what the others brought.
struct Meeting {
    const char* kind = nullptr;
    unsigned arrived = 0, round = 0;
    std::vector<uint64_t> brought, seen;
};

struct Fiber {
    ucontext_t context;
    dim3 index;
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline ucontext_t scheduler;
inline unsigned current;
inline Meeting block_meeting;
inline std::vector<Meeting> warp_meetings;
inline std::function<void()> kernel;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void body() {
    kernel();
    fibers[current].done = true;
    yield();
}

inline const std::vector<uint64_t>& meet(Meeting& at, const char* kind, unsigned members, unsigned member,
                                         uint64_t value) {
    if (at.arrived && std::strcmp(at.kind, kind)) fail("meets others that wait for something else");
    at.kind = kind;
    at.brought.resize(members);
    at.brought[member] = value;
    const unsigned round = at.round;
    if (++at.arrived == members) {
        at.seen = at.brought;
        at.arrived = 0;
        ++at.round;
    }
    while (at.round == round) yield();
    return at.seen;
}

inline const std::vector<uint64_t>& meet_block(const char* kind, uint64_t value = 0) {
    return meet(block_meeting, kind, static_cast<unsigned>(fibers.size()), current, value);
}

inline const std::vector<uint64_t>& meet_warp(unsigned mask, const char* kind, uint64_t value) {
    if (mask != 0xffffffffu) fail("only whole warps are emulated");
    return meet(warp_meetings[current / WARP], kind, WARP, current % WARP, value);
}

template <typename T>
uint64_t to_word(T v) {
    uint64_t word = 0;
    std::memcpy(&word, &v, sizeof v);
    return word;
}

template <typename T>
T from_word(uint64_t word) {
    T v;
    std::memcpy(&v, &word, sizeof v);
    return v;
}

// What `lane` of the warp has brought; a lane outside the warp is this one itself, as CUDA has it.
template <typename T>
T shuffle(unsigned mask, const char* kind, T v, unsigned lane) {
    const auto& seen = meet_warp(mask, kind, to_word(v));
    return lane < WARP ? from_word<T>(seen[lane]) : v;
}

// The numbers below `count` in `order`.
inline std::vector<unsigned> turns(unsigned count, std::mt19937& generator) {
    std::vector<unsigned> turns(count);
    for (unsigned i = 0; i < count; ++i) turns[i] = order == Order::backward ? count - 1 - i : i;
    if (order == Order::random) std::shuffle(turns.begin(), turns.end(), generator);
    return turns;
}

inline void run_block(unsigned threads, std::mt19937& generator) {
    block_meeting = {};
    warp_meetings.assign((threads + WARP - 1) / WARP, {});
    fibers.resize(threads);
    stacks.resize(threads * STACK);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        fiber.index = dim3(i % blockDim.x, i / blockDim.x);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, body, 0);
    }
    unsigned left = threads;
    const auto progress = [&] {
        unsigned rounds = block_meeting.round + threads - left;
        for (const auto& at : warp_meetings) rounds += at.round;
        return rounds;
    };
    const auto run_warp = [&](unsigned warp) {
        for (const unsigned turn : turns(std::min(WARP, threads - warp * WARP), generator)) {
            current = warp * WARP + turn;
            if (fibers[current].done) continue;
            threadIdx = fibers[current].index;
            swapcontext(&scheduler, &fibers[current].context);
            left -= fibers[current].done;
        }
    };
    while (left) {
        const unsigned before = progress();
        for (const unsigned warp : turns(static_cast<unsigned>(warp_meetings.size()), generator))
            for (unsigned last = ~0u; last != progress();) {
                last = progress();
                run_warp(warp);
            }
        if (progress() == before) fail("waits for threads that have gone on or ended");
    }
}

inline void launch(std::function<void()> body, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t) {
    const unsigned threads = block.x * block.y * block.z;
    if (!grid.x || grid.y * grid.z != 1 || !threads || threads > 1024 || block.z != 1 || shared_bytes)
        fail("a launch that no GPU takes");
    kernel = std::move(body);
    gridDim = grid;
    blockDim = block;
    std::mt19937 generator(0);
    for (const unsigned i : turns(grid.x, generator)) {
        blockIdx = dim3(i);
        run_block(threads, generator);
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet_block("__syncthreads"); }
inline int __syncthreads_or(int v) {
    const auto& all = emulation::meet_block("__syncthreads_or", v != 0);
    return std::any_of(all.begin(), all.end(), [](uint64_t word) { return word != 0; });
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __ballot_sync(unsigned mask, bool v) {
    const auto& all = emulation::meet_warp(mask, "__ballot_sync", v);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulation::WARP; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
    return bits;
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int lane) {
    return emulation::shuffle(mask, "__shfl_sync", v, static_cast<unsigned>(lane) % emulation::WARP);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
    return emulation::shuffle(mask, "__shfl_up_sync", v, emulation::current % emulation::WARP - by);
}
