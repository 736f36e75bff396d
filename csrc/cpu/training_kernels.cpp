// The table of training kernels of an instruction set. Compiled for the base instruction set.
#include "kernels.h"
#include "training_kernels.h"

namespace fastbert {

TrainingKernels training_kernels(Isa isa) {
#define FASTBERT_KERNELS(isa) \
    {isa::add_layer_norm_training_kernels, isa::linear_training_kernels, isa::attention_training_kernels}
    switch (with_kernels(isa)) {
#ifdef FASTBERT_X86
        case Isa::amx: return FASTBERT_KERNELS(amx);
        case Isa::avx512_bf16: return FASTBERT_KERNELS(avx512_bf16);
        case Isa::avx512_vnni: return FASTBERT_KERNELS(avx512_vnni);
        case Isa::avx512: return FASTBERT_KERNELS(avx512);
        case Isa::avx2: return FASTBERT_KERNELS(avx2);
#endif
        default: return FASTBERT_KERNELS(portable);
    }
#undef FASTBERT_KERNELS
}

}  // namespace fastbert
