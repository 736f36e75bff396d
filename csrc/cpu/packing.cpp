// Packing on the host: one pass over a mask says all that a batch needs to know of it.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../fastbert.h"

namespace fastbert {
namespace {

template <typename Bits>
MaskSummary read_rows(const ReadMask& op) {
    const auto* value = static_cast<const Bits*>(op.mask);
    const auto one = static_cast<Bits>(op.one), magnitude = static_cast<Bits>(op.magnitude);
    MaskSummary found = {0, 0, false, false};
    int64_t position = 0;
    op.cu_seqlens[0] = 0;
    for (int64_t b = 0; b < op.B; ++b) {
        const int64_t start = found.tokens;
        const bool pad_first = op.S && *value != one;
        for (int64_t s = 0; s < op.S; ++s, ++value) {
            const bool real = *value == one;
            found.bad |= !real && (*value & magnitude);
            op.indices[found.tokens] = position++;  // the next one's place until this one is known to be real
            found.tokens += real;
        }
        found.longest = std::max(found.longest, found.tokens - start);
        found.leading_pads |= pad_first && found.tokens > start;
        op.cu_seqlens[b + 1] = static_cast<int32_t>(found.tokens);
    }
    return found;
}

}  // namespace

MaskSummary read_mask_cpu(const ReadMask& op) {
    switch (op.mask_bytes) {
        case 1: return read_rows<uint8_t>(op);
        case 2: return read_rows<uint16_t>(op);
        case 4: return read_rows<uint32_t>(op);
        case 8: return read_rows<uint64_t>(op);
        default: throw std::invalid_argument("a mask's values are 1, 2, 4 or 8 bytes");
    }
}

}  // namespace fastbert
