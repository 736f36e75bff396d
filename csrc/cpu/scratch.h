// Memory for what an op makes on its way. Included by sources for the base instruction set only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "stop.h"

namespace fastbert {

// At least `bytes`, aligned to 64, valid until the same thread asks again; `Tag` tells apart what is held at once. A thread
// keeps it, so that the next call finds it warm, unless it is large.
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

// Parts of one piece of memory, each aligned to 64: how large one is, and the next one.
template <typename T>
int64_t part_bytes(int64_t count) { return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64; }
template <typename T>
T* take_part(char*& memory, int64_t count) {
    T* part = reinterpret_cast<T*>(memory);
    memory += part_bytes<T>(count);
    return part;
}

}  // namespace fastbert
