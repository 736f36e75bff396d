// A team of threads that runs parallel loops. Included by sources for the base instruction set only.
//
// A team is one parallel region of OpenMP, for any number of loops. A region per loop would have to wake its threads
// wherever OpenMP lets them sleep in between, as libgomp does once a process has more threads than cores.
//
// The end of a loop waits for its tasks, not for threads. A thread that lost its core to another process between two
// tasks may find the others several loops ahead, and catches up. So work to be done once must be a task too. Code
// between two loops may run on one thread while others are in later loops: it must not write to memory they share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__)
#include <sched.h>

#include <chrono>
#endif

#include "kernels.h"
#include "stop.h"

namespace fastbert {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `threads` to use for `tasks` tasks with `elements` elements in total: waking a thread costs some
// microseconds, the time of about 16 thousand elements.
inline int worth(int threads, int64_t tasks, int64_t elements) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, tasks, elements / 16384 + 1})));
}

class Team {
public:
    // Calls body(team) on `threads` threads, or as many as OpenMP gives; returns when all have returned. Throws Stopped
    // if `stop` ended the op: tasks that had begun are finished then, the others skipped.
    template <typename Body>
    static void run(int threads, const Body& body) {
        Shared shared;
#ifdef _OPENMP
        if (threads > 1) {
#pragma omp parallel num_threads(threads)
            {
                Team team(shared, omp_get_thread_num(), omp_get_num_threads());
                team.spread();
                body(team);
            }
            if (shared.stopped.load(std::memory_order_relaxed)) throw Stopped();
            return;
        }
#endif
        Team alone(shared, 0, 1);
        body(alone);
        if (shared.stopped.load(std::memory_order_relaxed)) throw Stopped();
    }

    // Runs a single loop.
    template <typename Task>
    static void share(int threads, int64_t tasks, const Task& task) {
        run(threads, [&](Team& team) { team.each(tasks, task); });
    }

    int number() const { return number_; }  // of this thread
    int size() const { return size_; }

    // Runs task(i) for each i < tasks, scheduled dynamically. Every thread of the team must make the same calls in the
    // same order; a call returns when all its tasks are done.
    template <typename Task>
    void each(int64_t tasks, const Task& task) {
        if (size_ == 1) {
            for (int64_t i = 0; i < tasks && !stopped(); ++i) {
                task(i);
                look();
            }
            return;
        }
        int64_t mine = 0;
        for (int64_t i; (i = ticket(tasks)) < tasks; ++mine) {
            if (!stopped()) task(i);
            look();
        }
        if (mine) shared_.done.fetch_add(mine, std::memory_order_acq_rel);
        expected_ += tasks;
        wait();
        int64_t now = shared_.next.load(std::memory_order_relaxed);
        while (now >> LOOP == loop_ && !shared_.next.compare_exchange_weak(now, (loop_ + 1) << LOOP)) {}
        ++loop_;
    }

private:
    static constexpr int LOOP = 40;  // bits of the task's number; the loop's number is above them

    struct Shared {
        alignas(64) std::atomic<int64_t> next{0};  // the current loop and its next task
        alignas(64) std::atomic<int64_t> done{0};  // finished tasks, over all loops
        alignas(64) std::atomic<uint64_t> cores[16] = {};  // a bit per core with a started thread
        std::atomic<bool> stopped{false};
    };

    // The next task of this thread's loop, or `tasks` if none is left or the others are in a later loop.
    int64_t ticket(int64_t tasks) {
        int64_t now = shared_.next.load(std::memory_order_relaxed);
        while (now - (loop_ << LOOP) < tasks && now >> LOOP == loop_)
            if (shared_.next.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) return now - (loop_ << LOOP);
        return tasks;
    }

    Team(Shared& shared, int number, int size)
        : shared_(shared), number_(number), size_(size), next_look_(number ? NEVER : first_look()) {}

    bool stopped() const { return shared_.stopped.load(std::memory_order_relaxed); }

    // Calls `stop` when it is due. Only thread 0, the calling one, does so.
    void look() {
        if (next_look_ == NEVER || coarse_now() < next_look_ || stopped()) return;
        if (stop_asked(next_look_)) shared_.stopped.store(true, std::memory_order_relaxed);
    }

    // Linux may leave two threads on one core for most of a second while another core is idle, since neither ever
    // sleeps. If another team thread started on this core, sleep 1 ns: the scheduler then wakes us on an idle core.
    void spread() {
#if defined(__linux__)
        static const int cores = static_cast<int>(std::thread::hardware_concurrency());
        const int core = sched_getcpu();
        if (size_ > cores || core < 0 || core >= 16 * 64) return;
        const uint64_t bit = uint64_t{1} << core % 64;
        if (shared_.cores[core / 64].fetch_or(bit, std::memory_order_relaxed) & bit)
            std::this_thread::sleep_for(std::chrono::nanoseconds(1));
#endif
    }

    // Spins for a microsecond, then yields the core: a thread that we wait for may need it.
    void wait() {
        constexpr int SPINS = 64;
        for (int spins = 0; shared_.done.load(std::memory_order_acquire) < expected_; ++spins) {
            if (spins < SPINS) {
                relax();
            } else {
                look();
                std::this_thread::yield();
            }
        }
    }

    static void relax() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    Shared& shared_;
    int number_, size_;
    int64_t loop_ = 0, expected_ = 0;  // finished loops, and their tasks
    int64_t next_look_;
};

// The ops as loops of an existing team. If `linear` prepares its rows, their memory must have been placed.
void linear_cpu(const Linear& op, Isa isa, Team& team);
void attention_cpu(const Attention& op, Isa isa, Team& team);
void rotary_cpu(const Rotary& op, Isa isa, Team& team);
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, Team& team);

}  // namespace fastbert
