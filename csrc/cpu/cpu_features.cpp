// What the processor can do, and the table of kernels for it. Compiled for the base instruction set.
// __builtin_cpu_supports asks cpuid and xgetbv, so a feature the operating system does not save is absent.
#include "kernels.h"

namespace fastbert {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512_bf16: return "avx512_bf16";
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
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512_bf16);
    if (avx512) found.push_back(Isa::avx512);
    if (avx2) found.push_back(Isa::avx2);
#endif
    found.push_back(Isa::portable);
    return found;
}

const CpuKernels& cpu_kernels(Isa isa) {
#define FASTBERT_KERNELS(isa) {isa::add_layer_norm_kernels, isa::linear_kernels, isa::attention_kernels, isa::peak_kernels}
    static const CpuKernels tables[] = {
#ifdef FASTBERT_X86
        FASTBERT_KERNELS(avx512_bf16), FASTBERT_KERNELS(avx512), FASTBERT_KERNELS(avx2),
#else
        FASTBERT_KERNELS(portable), FASTBERT_KERNELS(portable), FASTBERT_KERNELS(portable),
#endif
        FASTBERT_KERNELS(portable),
    };
#undef FASTBERT_KERNELS
    return tables[static_cast<int>(isa)];
}

}  // namespace fastbert
