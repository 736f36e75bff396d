// Ending an op before it is done. Included by sources for the base instruction set only.
//
// Between two tasks, the thread that called an op checks if PERIOD has passed, and if so calls the function of
// `set_stop`. The function may run any code, such as Python's signal handlers, which may call another op. That nested
// op does not call the function, and has scratch memory of its own (`nesting`).
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <time.h>
#else
#include <chrono>
#endif

namespace fastbert {

constexpr int64_t NEVER = INT64_MAX;

// Nanoseconds of a monotonic clock. On Linux, reading it takes a few nanoseconds, and it is exact to some milliseconds.
inline int64_t coarse_now() {
#if defined(__linux__)
    timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
#else
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

// Time of the first check of an op that the calling thread starts now; NEVER if nested or without a stop function.
int64_t first_look();

// Calls the stop function; true if the op must end. Sets `next` to the time of the next check.
bool stop_asked(int64_t& next);

// 1 in an op that the stop function of another op calls on this thread, else 0.
int nesting();

}  // namespace fastbert
