// The part of libgomp that the extension uses, on plain threads, for the build under ThreadSanitizer: libgomp itself
// synchronises by system calls that ThreadSanitizer does not see, and every parallel loop would be reported. A team is
// started and joined for each region, slow and plain to see. What is missing here fails at link time.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
    long next, end, step, chunk;
};

struct Team {
    int size;
    std::mutex mutex;
    std::condition_variable changed;
    int waiting = 0, generation = 0;
    std::vector<Loop> loops;  // those that any thread of the team has come to so far, in their order
    int singles = 0;          // how many `single` blocks have been entered

    explicit Team(int size) : size(size) {}

    void barrier() {
        std::unique_lock<std::mutex> lock(mutex);
        const int mine = generation;
        if (++waiting == size) {
            waiting = 0;
            ++generation;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return generation != mine; });
        }
    }
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local int loops_begun = 0, singles_met = 0;

void run(void (*fn)(void*), void* data, unsigned threads, const Loop* loop) {
    Team mine(std::max(1, static_cast<int>(threads)));
    if (loop) mine.loops.push_back(*loop);
    Team* const outer = team;
    const int outer_number = number, outer_loops = loops_begun, outer_singles = singles_met;
    const auto member = [&mine, fn, data, loop](int i) {
        team = &mine;
        number = i;
        loops_begun = loop ? 1 : 0;
        singles_met = 0;
        fn(data);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < mine.size; ++i) others.emplace_back(member, i);
    member(0);
    for (auto& other : others) other.join();
    team = outer;
    number = outer_number;
    loops_begun = outer_loops;
    singles_met = outer_singles;
}

bool next_chunk(long* begin, long* end) {
    if (!team) return false;
    const std::lock_guard<std::mutex> lock(team->mutex);
    Loop& loop = team->loops[loops_begun - 1];
    if (loop.next >= loop.end) return false;
    *begin = loop.next;
    *end = loop.next = std::min(loop.end, loop.next + loop.step * loop.chunk);
    return true;
}

}  // namespace

// GCC's own names, see libgomp/libgomp_g.h. Loops that count down do not occur.
extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_in_parallel() { return team && team->size > 1; }

void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned) { run(fn, data, threads, nullptr); }

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*fn)(void*), void* data, unsigned threads, long begin, long end,
                                             long step, long chunk, unsigned) {
    const Loop loop{begin, end, step, chunk};
    run(fn, data, threads, &loop);
}
void GOMP_parallel_loop_dynamic(void (*fn)(void*), void* data, unsigned threads, long begin, long end, long step,
                                long chunk, unsigned flags) {
    GOMP_parallel_loop_nonmonotonic_dynamic(fn, data, threads, begin, end, step, chunk, flags);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
    {
        const std::lock_guard<std::mutex> lock(team->mutex);
        if (static_cast<int>(team->loops.size()) == loops_begun) team->loops.push_back({begin, end, step, chunk});
        ++loops_begun;
    }
    return next_chunk(first, last);
}
bool GOMP_loop_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
    return GOMP_loop_nonmonotonic_dynamic_start(begin, end, step, chunk, first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return next_chunk(first, last); }
bool GOMP_loop_dynamic_next(long* first, long* last) { return next_chunk(first, last); }

void GOMP_barrier() {
    if (team) team->barrier();
}
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

bool GOMP_single_start() {
    if (!team) return true;
    const std::lock_guard<std::mutex> lock(team->mutex);
    if (team->singles == singles_met++) return ++team->singles, true;
    return false;
}

static std::mutex critical;
void GOMP_critical_start() { critical.lock(); }
void GOMP_critical_end() { critical.unlock(); }

}  // extern "C"
