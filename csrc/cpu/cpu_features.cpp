// Detects the processor's features and returns its kernels. Compiled for the base instruction set.
// __builtin_cpu_supports reads cpuid and xgetbv, so a feature that the operating system does not save is absent.
#include "kernels.h"

#ifdef FASTBERT_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(FASTBERT_ARM)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace fastbert {

const char* isa_name(Isa isa) {
    static const char* const names[ISAS] = {"amx",       "avx512_bf16", "avx512_vnni", "avx512",  "avx2",
                                             "neon_bf16", "neon_dot",    "neon",        "portable",
#ifdef FASTBERT_AMX_EMULATION
                                             "amx_emulated",
#endif
    };
    return names[static_cast<int>(isa)];
}

#ifdef FASTBERT_X86
namespace {

// True if AMX tiles for bf16 and bytes are usable: the processor has them, the operating system saves them, and this
// process may use them. Linux grants the last on request, once, before the first thread uses a tile.
bool amx_usable() {
#if defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, ALL = BF16 | TILE | INT8, OSXSAVE = 1u << 27;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned TILE_STATE = 3u << 17;
    if ((low & TILE_STATE) != TILE_STATE) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

bool has_amx() {
    static const bool answer = amx_usable();
    return answer;
}

}  // namespace
#elif defined(FASTBERT_ARM)
namespace {

// Products of bytes (FEAT_DotProd) and of bf16 (FEAT_BF16); every 64-bit ARM has NEON.
#if defined(__linux__)
bool has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }    // HWCAP_ASIMDDP
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }  // HWCAP2_BF16
#elif defined(__APPLE__)
bool has(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return has("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dot() { return false; }
bool has_bf16() { return false; }
#endif

}  // namespace
#endif

std::vector<const char*> cpu_features() {
    std::vector<const char*> found;
#ifdef FASTBERT_ARM
    found.push_back("neon");
    if (has_dot()) found.push_back("dotprod");
    if (has_bf16()) found.push_back("bf16");
#endif
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
    if (has_amx()) found.push_back("amx");
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
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (bf16 && has_amx()) found.push_back(Isa::amx);
    if (bf16) found.push_back(Isa::avx512_bf16);
    if (vnni) found.push_back(Isa::avx512_vnni);
    if (avx512) found.push_back(Isa::avx512);
    if (avx2) found.push_back(Isa::avx2);
    found.push_back(Isa::portable);
#ifdef FASTBERT_AMX_EMULATION
    if (bf16 && !has_amx()) found.push_back(Isa::amx_emulated);
#endif
#else
#ifdef FASTBERT_ARM
    if (has_dot() && has_bf16()) found.push_back(Isa::neon_bf16);
    if (has_dot()) found.push_back(Isa::neon_dot);
    found.push_back(Isa::neon);
#endif
    found.push_back(Isa::portable);
#endif
    return found;
}

const CpuKernels& cpu_kernels(Isa isa) {
#define FASTBERT_KERNELS(isa)                                                                              \
    case Isa::isa: {                                                                                       \
        static const CpuKernels table = {                                                                  \
            isa::add_layer_norm_kernels,           isa::linear_kernels,           isa::attention_kernels,  \
            isa::embed_layer_norm_kernels,         isa::cross_entropy_kernels,    isa::peak_kernels,       \
            isa::add_layer_norm_fwd_train_kernels, isa::linear_fwd_train_kernels,                          \
            isa::attention_fwd_train_kernels,      isa::rotary_kernels};                                   \
        return table;                                                                                      \
    }
#ifdef FASTBERT_AMX_EMULATION
    if (isa == Isa::amx_emulated) emulate_amx(), isa = Isa::amx;
#endif
    switch (isa) {
#ifdef FASTBERT_X86
        FASTBERT_KERNELS(amx)
        FASTBERT_KERNELS(avx512_bf16)
        FASTBERT_KERNELS(avx512_vnni)
        FASTBERT_KERNELS(avx512)
        FASTBERT_KERNELS(avx2)
#endif
#ifdef FASTBERT_ARM
        FASTBERT_KERNELS(neon_bf16)
        FASTBERT_KERNELS(neon_dot)
        FASTBERT_KERNELS(neon)
#endif
        FASTBERT_KERNELS(portable)
        default: return cpu_kernels(Isa::portable);  // no instruction set of this build
    }
#undef FASTBERT_KERNELS
}

}  // namespace fastbert
