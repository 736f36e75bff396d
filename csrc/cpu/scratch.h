// Memory for one task of one thread. For files of the base instruction set only: it is an inline function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastbert {

// At least `bytes`, aligned to 64; grown once a thread and kept: the next layer, and the next call, find it warm.
inline void* thread_scratch(int64_t bytes) {
    static thread_local std::unique_ptr<std::byte[]> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset(new std::byte[bytes + 64]);
        size = bytes;
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
}

}  // namespace fastbert
