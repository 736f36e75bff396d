// Checksums of memory, by which a plan detects writes to weights that bypass the version counter.
//
// Per word h = (h ^ word) * odd in one of eight lanes. For a given old h, distinct words give distinct h: a change of a
// single word is always detected. Eight lanes hide the multiply's latency: 8 bytes per cycle, faster than memory.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "team.h"

namespace fastbert {
namespace {

constexpr uint64_t FACTOR = 0x9E3779B97F4A7C15u;  // odd: multiplying by it is one to one

uint64_t checksum(const char* bytes, int64_t size) {
    constexpr int LANES = 8;
    uint64_t lanes[LANES] = {1, 2, 3, 4, 5, 6, 7, 8};
    int64_t at = 0;
    for (; at + 8 * LANES <= size; at += 8 * LANES)
        for (int lane = 0; lane < LANES; ++lane) {
            uint64_t word;
            std::memcpy(&word, bytes + at + 8 * lane, sizeof word);
            lanes[lane] = (lanes[lane] ^ word) * FACTOR;
        }
    for (; at < size; at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, bytes + at, static_cast<size_t>(std::min<int64_t>(8, size - at)));
        lanes[0] = (lanes[0] ^ word) * FACTOR;
    }
    uint64_t sum = static_cast<uint64_t>(size);
    for (const uint64_t lane : lanes) sum = ((sum ^ lane) * FACTOR) ^ (sum >> 29);
    return sum;
}

// Starts to load the first lines of a chunk, which the processor cannot foresee.
void prefetch_start(const Chunk& chunk) {
    for (int64_t at = 0; at < std::min<int64_t>(chunk.bytes, 1024); at += 64)
        __builtin_prefetch(static_cast<const char*>(chunk.memory) + at);
}

int64_t total_bytes(const Chunk* chunks, int64_t count) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) bytes += chunks[i].bytes;
    return bytes;
}

}  // namespace

void checksum_cpu(Chunk* chunks, int64_t count, int threads) {
    threads = worth(threads, count, total_bytes(chunks, count) / 4);
    Team::share(threads, count, [&](int64_t i) {
        chunks[i].checksum = checksum(static_cast<const char*>(chunks[i].memory), chunks[i].bytes);
    });
}

bool changed_cpu(const Chunk* chunks, int64_t always, int64_t begin, int64_t end, int threads) {
    std::atomic<bool> changed{false};
    const int64_t count = always + end - begin;
    constexpr int64_t GROUP = 8;  // chunks per task: biases are short
    const auto chunk = [&](int64_t i) -> const Chunk& { return chunks[i < always ? i : begin + i - always]; };
    threads = worth(threads, count, (total_bytes(chunks, always) + total_bytes(chunks + begin, end - begin)) / 4);
    Team::share(threads, divide_up(count, GROUP), [&](int64_t task) {
        for (int64_t i = task * GROUP; i < std::min(count, (task + 1) * GROUP); ++i) {
            if (i + 1 < count) prefetch_start(chunk(i + 1));
            const Chunk& now = chunk(i);
            if (checksum(static_cast<const char*>(now.memory), now.bytes) != now.checksum) changed = true;
        }
    });
    return changed;
}

}  // namespace fastbert
