// Chooses between products that give the same numbers to rounding, where the processor decides which is faster. Compiled
// for the base instruction set.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "linear.h"

#ifdef FASTBERT_X86
#include <cpuid.h>
#endif

namespace fastbert {
namespace {

// Processors on which products of pairs of bf16 and of fp32 were measured.
struct Measured {
    const char* vendor;
    unsigned family;
    bool pairs;  // are faster
};
constexpr Measured MEASURED[] = {
    {"AuthenticAMD", 26, true},  // EPYC, Zen 5, two cores, November 2026: pairs 1.0 TFLOP/s, fp32 0.51
};

#ifdef FASTBERT_X86
const Measured* measured() {
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return nullptr;
    char vendor[13] = {};
    const unsigned words[] = {b, d, c};
    std::copy_n(reinterpret_cast<const char*>(words), 12, vendor);
    if (!__get_cpuid(1, &a, &b, &c, &d)) return nullptr;
    const unsigned base = a >> 8 & 15, family = base == 15 ? base + (a >> 20 & 255) : base;
    for (const Measured& one : MEASURED)
        if (std::string(vendor) == one.vendor && family == one.family) return &one;
    return nullptr;
}
#else
const Measured* measured() { return nullptr; }
#endif

// Operations per second of a loop on registers, the best of some short timings.
double rate(double (*loop)(int64_t rounds)) {
    constexpr int64_t ROUNDS = 4096;  // some 20 us
    double best = 0;
    for (int timing = 0; timing < 12; ++timing) {
        const auto begin = std::chrono::steady_clock::now();
        const double done = loop(ROUNDS);
        best = std::max(best, done / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return best;
}

bool pairs_are_faster(Isa isa) {
    const char* forced = std::getenv("FASTBERT_BF16");
    const std::string name = forced ? forced : "";
    if (name == "pairs" || name == "wide") return name == "pairs";
    if (!name.empty()) throw std::invalid_argument("FASTBERT_BF16 is " + name + "; it must be pairs or wide");
    if (const Measured* known = measured()) return known->pairs;
    const PeakKernels& loops = cpu_kernels(isa).peak;
    return rate(loops.bf16) > 1.1 * rate(loops.f32);
}

}  // namespace

bool widens_bf16(Isa isa) {
    const LinearKernels& table = cpu_kernels(isa).linear;
    if (!table.wide) return table.widens_bf16;
    static const bool answer = !pairs_are_faster(isa);  // one instruction set of a processor has both
    return answer;
}

const LinearKernel& linear_kernel(DType dtype, Precision precision, Isa isa) {
    const LinearKernels& table = cpu_kernels(isa).linear;
    if (dtype == DType::bf16 && precision != Precision::int8 && table.wide && widens_bf16(isa)) return *table.wide;
    return table.kernels[dtype == DType::f32 ? 0 : 1][static_cast<int>(precision)];
}

}  // namespace fastbert
