// Asks for large pages. Compiled for the base instruction set.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "fastbert.h"

namespace fastbert {

void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may be refused
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace fastbert
