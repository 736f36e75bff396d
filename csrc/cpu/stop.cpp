// The stop function, and how often it is called. Compiled for the base instruction set.
#include "stop.h"

#include <algorithm>
#include <atomic>

#include "fastbert.h"

namespace fastbert {
namespace {

constexpr int64_t PERIOD = 50'000'000, LONGEST = 1'000'000'000;  // nanoseconds

std::atomic<bool (*)()> stop_function{nullptr};
thread_local bool asking = false;

}  // namespace

void set_stop(bool (*stop)()) { stop_function = stop; }

int64_t first_look() { return asking || !stop_function.load(std::memory_order_relaxed) ? NEVER : coarse_now() + PERIOD; }

bool stop_asked(int64_t& next) {
    const int64_t before = coarse_now();
    asking = true;
    const bool stop = stop_function.load()();
    asking = false;
    // The call may wait for another thread to release the GIL, so it is limited to a fiftieth of the time.
    const int64_t now = coarse_now();
    next = now + std::min(std::max(PERIOD, 50 * (now - before)), LONGEST);
    return stop;
}

int nesting() { return asking; }

}  // namespace fastbert
