// Memory that a thread keeps from one call to the next, for the files compiled for the base instruction set (a row
// kernel gets pointers). Fresh memory would cost a page fault every 4 KB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

namespace fastbert {

class Workspace {
public:
    // Room for what `take` will ask for: the sum of `bytes_for` of each. One at a time on a thread.
    explicit Workspace(int64_t bytes) {
        if (kept().size < bytes) {
            kept().memory.reset();  // before, so that both never stand side by side
            kept().size = 0;
            kept().memory.reset(new std::byte[static_cast<size_t>(bytes + ALIGNMENT)]);
            kept().size = bytes;
        }
        const auto address = reinterpret_cast<uintptr_t>(kept().memory.get());
        next_ = kept().memory.get() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
#ifdef FASTBERT_POISON
        std::memset(next_, 0xff, static_cast<size_t>(bytes));  // NaN in fp32 and bf16, -1 in integers
#endif
    }
    ~Workspace() {
        if (kept().size > LARGEST_KEPT) {
            kept().memory.reset();
            kept().size = 0;
        }
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    template <typename T>
    T* take(int64_t count) {
        T* out = reinterpret_cast<T*>(next_);
        next_ += bytes_for<T>(count);
        return out;
    }
    template <typename T>
    static int64_t bytes_for(int64_t count) {
        return (count * static_cast<int64_t>(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

private:
    static constexpr int64_t ALIGNMENT = 64, LARGEST_KEPT = int64_t{64} << 20;
    struct Kept {
        std::unique_ptr<std::byte[]> memory;
        int64_t size = 0;
    };
    static Kept& kept() {
        static thread_local Kept memory;
        return memory;
    }
    std::byte* next_;
};

}  // namespace fastbert
