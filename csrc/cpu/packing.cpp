// Packing on the host: one pass over a mask computes all that a batch needs; one pass over ids, their bounds.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "fastbert.h"

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
            op.indices[found.tokens] = position++;  // overwritten by the next position unless this one is real
            found.tokens += real;
        }
        found.longest = std::max(found.longest, found.tokens - start);
        found.leading_pads |= pad_first && found.tokens > start;
        op.cu_seqlens[b + 1] = static_cast<int32_t>(found.tokens);
    }
    return found;
}

template <typename Id>
std::pair<int64_t, int64_t> bounds(int64_t n, const Id* x) {
    Id low = x[0], high = x[0];
    for (int64_t i = 1; i < n; ++i) {
        low = std::min(low, x[i]);
        high = std::max(high, x[i]);
    }
    return {low, high};
}

}  // namespace

std::pair<int64_t, int64_t> bounds_cpu(int bytes, int64_t n, const void* x) {
    if (n < 1) throw std::invalid_argument("nothing has no bounds");
    if (bytes == 4) return bounds(n, static_cast<const int32_t*>(x));
    if (bytes == 8) return bounds(n, static_cast<const int64_t*>(x));
    throw std::invalid_argument("ids are 4 or 8 bytes");
}

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
