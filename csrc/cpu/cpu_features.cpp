// What the processor can do, and the table of kernels for it. Compiled for the base instruction set.
// __builtin_cpu_supports asks cpuid and xgetbv, so a feature the operating system does not save is absent.
#include "kernels.h"

namespace fastbert {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::portable: break;
    }
    return "portable";
}

std::vector<const char*> cpu_features() {
    std::vector<const char*> found;
#ifdef FASTBERT_X86
    __builtin_cpu_init();
#define FASTBERT_FEATURE(name) \
    if (__builtin_cpu_supports(name)) found.push_back(name)
    FASTBERT_FEATURE("avx2");
    FASTBERT_FEATURE("fma");
    FASTBERT_FEATURE("avx512f");
    FASTBERT_FEATURE("avx512bw");
    FASTBERT_FEATURE("avx512dq");
    FASTBERT_FEATURE("avx512vl");
    FASTBERT_FEATURE("avx512vnni");
    FASTBERT_FEATURE("avx512bf16");
#undef FASTBERT_FEATURE
#endif
    return found;
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> found;
#ifdef FASTBERT_X86
    __builtin_cpu_init();
    // The features here are the -m flags of CMakeLists.txt.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(Isa::avx2);
#endif
    found.push_back(Isa::portable);
    return found;
}

const CpuKernels& cpu_kernels(Isa isa) {
#ifdef FASTBERT_X86
    if (isa == Isa::avx512) return avx512::kernels;
    if (isa == Isa::avx2) return avx2::kernels;
#endif
    (void)isa;
    return portable::kernels;
}

}  // namespace fastbert
