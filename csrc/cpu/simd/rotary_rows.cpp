// Rotary positions of queries and keys, in a range of tokens, and their gradient; compiled once per instruction set.
#include <cstring>

#include "kernels.h"
#include "rows.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// One head turned by the angles of `table`: D / 2 cosines, then as many sines; the other way if `back`. y may be x.
template <typename T>
static inline void turn(const T* x, T* y, const float* table, int64_t D, bool back) {
    const int64_t half = D / 2;
    along(half, [&](int64_t n, int lanes) {
        const Vec a = load_part(x + n, lanes), b = load_part(x + half + n, lanes);
        const Vec c = load_part(table + n, lanes), positive = load_part(table + half + n, lanes);
        const Vec s = back ? sub(set(0.0f), positive) : positive;
        store_part(y + n, sub(mul(a, c), mul(b, s)), lanes);
        store_part(y + half + n, fma(a, s, mul(b, c)), lanes);
    });
}

// The sum of the `count` heads from x on.
template <typename T>
static inline void sum_heads(const T* x, int64_t count, int64_t D, T* y) {
    along(D, [&](int64_t n, int lanes) {
        Vec sum = load_part(x + n, lanes);
        for (int64_t i = 1; i < count; ++i) sum = add(sum, load_part(x + i * D + n, lanes));
        store_part(y + n, sum, lanes);
    });
}

template <typename T>
void forward(const Rotary& op, int64_t begin, int64_t end) {
    const int64_t D = op.D, repeats = op.H / op.G;
    for (int64_t t = begin; t < end; ++t) {
        const T* q = static_cast<const T*>(op.x) + t * (op.H + 2 * op.G) * D;
        const T *k = q + op.H * D, *v = k + op.G * D;
        T* y = static_cast<T*>(op.y) + t * 3 * op.H * D;
        const float* table = op.table + op.positions[t] * D;
        for (int64_t h = 0; h < op.H; ++h) turn(q + h * D, y + h * D, table, D, false);
        for (int64_t h = 0; h < op.H; ++h) turn(k + h / repeats * D, y + (op.H + h) * D, table, D, false);
        for (int64_t h = 0; h < op.H && v != y + 2 * op.H * D; ++h)
            std::memcpy(y + (2 * op.H + h) * D, v + h / repeats * D, D * sizeof(T));
    }
}

template <typename T>
void backward(const Rotary& op, int64_t begin, int64_t end) {
    const int64_t D = op.D, repeats = op.H / op.G;
    for (int64_t t = begin; t < end; ++t) {
        const T* dy = static_cast<const T*>(op.x) + t * 3 * op.H * D;
        T* dq = static_cast<T*>(op.y) + t * (op.H + 2 * op.G) * D;
        T *dk = dq + op.H * D, *dv = dk + op.G * D;
        const float* table = op.table + op.positions[t] * D;
        for (int64_t h = 0; h < op.H; ++h) turn(dy + h * D, dq + h * D, table, D, true);
        for (int64_t g = 0; g < op.G; ++g) {  // one turn for the sum: the heads of a group share their angles
            sum_heads(dy + (op.H + g * repeats) * D, repeats, D, dk + g * D);
            turn(dk + g * D, dk + g * D, table, D, true);
            sum_heads(dy + (2 * op.H + g * repeats) * D, repeats, D, dv + g * D);
        }
    }
}

template <typename T>
void rotary(const Rotary& op, int64_t begin, int64_t end) {
    op.backward ? backward<T>(op, begin, end) : forward<T>(op, begin, end);
}

}  // namespace

const RotaryKernels rotary_kernels = {rotary<float>, rotary<bf16>};

}  // namespace fastbert::FASTBERT_ISA
