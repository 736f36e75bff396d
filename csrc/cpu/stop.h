// Ending an op before it is done. Included by sources for the base instruction set only.
//
// The thread that called an op looks between two tasks whether PERIOD has passed, and then asks the function of
// `set_stop`. The function may run any code, Python's handlers of signals among it, which may call an op in turn: that
// one asks no one, and has scratch memory of its own (`nesting`).
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <time.h>
#else
#include <chrono>
#endif

namespace fastbert {

constexpr int64_t NEVER = INT64_MAX;

// Nanoseconds of a clock that is a few of them to read, and exact to some milliseconds where it can be so.
inline int64_t coarse_now() {
#if defined(__linux__)
    timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
#else
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

// When an op that begins now, on the thread that calls, asks for the first time; NEVER where there is no one to ask.
int64_t first_look();

// Whether the op is to stop; sets when it asks next.
bool stop_asked(int64_t& next);

// 1 in an op that is called while another one of this thread asks, 0 in all others.
int nesting();

}  // namespace fastbert
