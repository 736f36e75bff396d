// The part of libgomp that the extension uses, on plain threads, for the build under ThreadSanitizer: libgomp itself
// synchronises by system calls that ThreadSanitizer does not see, and every parallel region would be reported. A team is
// started and joined for each region, slow and plain to see. What is missing here, tests/sanitize.py finds.
#include <thread>
#include <vector>

namespace {

thread_local int size = 1, number = 0;

}  // namespace

// GCC's own names, see libgomp/libgomp_g.h.
extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return size; }

void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned) {
    const int outer_size = size, outer_number = number, asked = threads ? static_cast<int>(threads) : 1;
    const auto member = [fn, data, asked](int i) {
        size = asked;
        number = i;
        fn(data);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < asked; ++i) others.emplace_back(member, i);
    member(0);
    for (auto& other : others) other.join();
    size = outer_size;
    number = outer_number;
}

}  // extern "C"
