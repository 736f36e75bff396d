// Times the loops of peak_rows.cpp on all threads at once. Compiled for the base instruction set.
#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace fastbert {
namespace {

constexpr double SECONDS = 0.005;  // per timing: long against the clock's step, short against a time slice
constexpr int TIMINGS = 20;
constexpr int COUNTED = 2;         // the third best counts: other processes make some too low, a clock jump one high

template <typename Body>
double seconds_of(const Body& body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The sum of each thread's rate while all of them run: a thread that loses a time slice does not lower the others'
// rates.
double multiply_peak(double (*loop)(int64_t rounds), int threads) {
    int64_t rounds = 1 << 10;
    while (std::min(seconds_of([&] { loop(rounds); }), seconds_of([&] { loop(rounds); })) < SECONDS) {
        rounds *= 2;
    }
    std::vector<double> reached(threads);
    Team::run(threads, [&](Team& team) {
        double rates[TIMINGS];
        for (double& rate : rates) {
            double done = 0;
            const double taken = seconds_of([&] { done = loop(rounds); });
            rate = done / taken;
        }
        std::sort(rates, rates + TIMINGS);
        reached[team.number()] = rates[TIMINGS - 1 - COUNTED];
    });
    return std::accumulate(reached.begin(), reached.end(), 0.0);
}

double read_peak(double (*read)(const float* memory, int64_t count), int threads) {
    constexpr int64_t COUNT = 128 << 20;  // 512 MiB of floats, past any cache
    const std::unique_ptr<float[]> memory(new float[COUNT]);
    const int64_t each = COUNT / threads / 1024 * 1024;
    double rates[TIMINGS];
    for (int timing = -1; timing < TIMINGS; ++timing) {
        std::vector<double> done(threads);
        const double taken = seconds_of([&] {
            Team::run(threads, [&](Team& team) {
                float* mine = memory.get() + team.number() * each;
                if (timing < 0) std::fill(mine, mine + each, 0.0f);  // first touched by the thread that reads it
                else done[team.number()] = read(mine, each);
            });
        });
        if (timing >= 0) rates[timing] = std::accumulate(done.begin(), done.end(), 0.0) / taken;
    }
    std::sort(rates, rates + TIMINGS);
    return rates[TIMINGS - 1 - COUNTED];
}

}  // namespace

double peak_cpu(PeakKind kind, Isa isa, int threads) {
    const PeakKernels& kernels = cpu_kernels(isa).peak;
    if (kind == PeakKind::read) return read_peak(kernels.read, threads);
    return multiply_peak(kind == PeakKind::f32 ? kernels.f32 : kind == PeakKind::bf16 ? kernels.bf16 : kernels.int8, threads);
}

}  // namespace fastbert
