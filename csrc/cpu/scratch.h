// Scratch memory for the intermediate results of an op. Included by sources for the base instruction set only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "stop.h"

namespace fastbert {

// At least `bytes`, aligned to 64, valid until the same thread calls again with the same `Tag`; buffers in use at once
// need different tags. A thread keeps its memory, still in cache, for the next call; memory above KEPT is freed when
// the next call needs no more than KEPT.
template <typename Tag>
void* scratch(size_t bytes) {
    constexpr size_t KEPT = 64 << 20;
    struct Memory {
        void* data = nullptr;
        size_t size = 0;
        ~Memory() { std::free(data); }
    };
    static thread_local Memory kept[2];
    Memory& memory = kept[nesting()];
    if (memory.size < bytes || (memory.size > KEPT && bytes <= KEPT)) {
        std::free(memory.data);
        memory.size = (bytes + 63) / 64 * 64;
        memory.data = std::aligned_alloc(64, memory.size);
        if (!memory.data) {
            memory.size = 0;
            throw std::bad_alloc();
        }
    }
#ifdef FASTBERT_POISON
    std::memset(memory.data, 0xff, bytes);  // NaN in fp32 and bf16, -1 in integers
#endif
    return memory.data;
}

// Divides a buffer into parts, each aligned to 64: the size of a part, and the next part.
template <typename T>
int64_t part_bytes(int64_t count) { return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64; }
template <typename T>
T* take_part(char*& memory, int64_t count) {
    T* part = reinterpret_cast<T*>(memory);
    memory += part_bytes<T>(count);
    return part;
}

}  // namespace fastbert
