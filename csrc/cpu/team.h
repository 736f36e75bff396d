// Threads that go through loops together. Included by sources for the base instruction set only.
//
// A team is one parallel region of OpenMP, however many loops there are in it. A region for each loop costs the wake of
// its threads wherever OpenMP lets them sleep in between, as libgomp does once a process has more threads than cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace fastbert {

// How many of the threads `tasks` of together so many elements are worth: to wake one costs some microseconds, the time of
// about 16 thousand elements.
inline int worth(int threads, int64_t tasks, int64_t elements) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, tasks, elements / 16384 + 1})));
}

class Team {
public:
    // Calls body(team) on so many threads, or as many as OpenMP gives; returns when all have.
    template <typename Body>
    static void run(int threads, const Body& body) {
        Shared shared;
#ifdef _OPENMP
        if (threads > 1) {
#pragma omp parallel num_threads(threads)
            {
                Team team(shared, omp_get_thread_num(), omp_get_num_threads());
                body(team);
            }
            return;
        }
#endif
        Team alone(shared, 0, 1);
        body(alone);
    }

    // One loop, and no more.
    template <typename Task>
    static void share(int threads, int64_t tasks, const Task& task) {
        run(threads, [&](Team& team) { team.each(tasks, task); });
    }

    int number() const { return number_; }  // of this thread
    int size() const { return size_; }

    // task(i) for each i < tasks, handed out as threads come. Every thread of the team calls it, in the same order of
    // calls, and returns when all tasks are done.
    template <typename Task>
    void each(int64_t tasks, const Task& task) {
        if (size_ == 1) {
            for (int64_t i = 0; i < tasks; ++i) task(i);
            return;
        }
        for (int64_t i; (i = shared_.next.fetch_add(1, std::memory_order_relaxed) - first_) < tasks;) task(i);
        first_ += tasks + size_;  // each thread asked once too often
        wait();
    }

private:
    struct Shared {
        alignas(64) std::atomic<int64_t> next{0};     // the number of the next task, through all loops
        alignas(64) std::atomic<int64_t> arrived{0};  // threads that came to the end of a loop, likewise
    };

    Team(Shared& shared, int number, int size) : shared_(shared), number_(number), size_(size) {}

    // Spins for a microsecond, then lets others have the core: one of them may be who is waited for.
    void wait() {
        constexpr int SPINS = 64;
        expected_ += size_;
        shared_.arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int spins = 0; shared_.arrived.load(std::memory_order_acquire) < expected_; ++spins) {
            if (spins < SPINS) relax();
            else std::this_thread::yield();
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
    int64_t first_ = 0, expected_ = 0;
};

// The ops as parts of what a team goes through. Where `linear` prepares its rows, its memory must have been placed.
void linear_cpu(const Linear& op, Isa isa, Team& team);
void attention_cpu(const Attention& op, Isa isa, Team& team);
void add_layer_norm_cpu(const AddLayerNorm& op, Isa isa, Team& team);

}  // namespace fastbert
