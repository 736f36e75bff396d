// exp and the activations on one Vec, for any instruction set: only arithmetic, shifts and comparisons of vector types.
// Polynomials are Chebyshev fits, made for fp32; errors are measured over all of their range.
#pragma once

#include "vec.h"

namespace fastbert::FASTBERT_ISA {

using Ints = int32_t __attribute__((vector_size(sizeof(Vec))));

// x = n + f with n whole and f in [-0.5, 0.5], for x in [-127, 127]: f, and 2^n.
struct Powers {
    Vec f, scale;
};
static inline Powers split_power(Vec x) {
    const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    const Vec shifted = add(x, magic);
    const Ints n = (Ints)shifted - (Ints)magic;  // -127 makes the exponent 0
    return {sub(x, sub(shifted, magic)), (Vec)((n + 127) << 23)};
}

// 2^x for x <= 127, relative error 9e-8; 0 below -126. NaN stays NaN.
static inline Vec exp2(Vec x) {
    const Powers power = split_power(max(x, set(-127.0f)));
    Vec p = set(1.5469732e-4f);
    p = fma(p, power.f, set(1.3400433e-3f));
    p = fma(p, power.f, set(9.6180253e-3f));
    p = fma(p, power.f, set(5.5503272e-2f));
    p = fma(p, power.f, set(2.4022651e-1f));
    p = fma(p, power.f, set(6.9314718e-1f));
    p = fma(p, power.f, set(1.0f));
    return mul(p, power.scale);
}

// The same with a relative error of 8e-5, for results that are rounded to bf16 (2e-3).
static inline Vec exp2_bf16(Vec x) {
    const Powers power = split_power(max(x, set(-127.0f)));
    Vec p = set(5.5171435e-2f);
    p = fma(p, power.f, set(2.4261081e-1f));
    p = fma(p, power.f, set(6.9326099e-1f));
    p = fma(p, power.f, set(9.9992809e-1f));
    return mul(p, power.scale);
}

static inline Vec exp(Vec x) { return exp2(mul(min(x, set(88.0f)), set(1.4426950408889634f))); }

static inline Vec sigmoid(Vec x) { return set(1.0f) / add(set(1.0f), exp(sub(set(0.0f), x))); }

// 1 - Phi(c), Phi the normal distribution, for c in [0, 6]: 2^-q(c), q a polynomial.
static inline Vec normal_tail(Vec c) {
    Vec q = set(2.4108629e-10f);
    q = fma(q, c, set(-1.0699088e-8f));
    q = fma(q, c, set(2.1513347e-7f));
    q = fma(q, c, set(-2.585263e-6f));
    q = fma(q, c, set(2.0480009e-5f));
    q = fma(q, c, set(-1.089833e-4f));
    q = fma(q, c, set(3.490295e-4f));
    q = fma(q, c, set(-9.0000023e-5f));
    q = fma(q, c, set(-6.8799085e-3f));
    q = fma(q, c, set(5.2415788e-2f));
    q = fma(q, c, set(4.5922467e-1f));
    q = fma(q, c, set(1.1511041f));
    q = fma(q, c, set(1.0f));
    return exp2(sub(set(0.0f), q));
}

// x Phi(x). Absolute error 4e-8 times max(1, |x|), as that of x erf(x).
static inline Vec gelu(Vec x) {
    const Vec a = x < set(0.0f) ? sub(set(0.0f), x) : x;
    const Vec tail = a > set(6.0f) ? set(0.0f) : mul(x, normal_tail(min(a, set(6.0f))));
    return x < set(0.0f) ? tail : sub(x, tail);
}

// The same for results that are rounded to bf16: absolute error 1.3e-4, relative 5e-4 in the tail.
static inline Vec gelu_bf16(Vec x) {
    const Vec a = x < set(0.0f) ? sub(set(0.0f), x) : x;
    const Vec c = min(a, set(6.0f));
    Vec q = set(2.0947284e-4f);
    q = fma(q, c, set(-4.5940253e-3f));
    q = fma(q, c, set(4.3575119e-2f));
    q = fma(q, c, set(4.7089424e-1f));
    q = fma(q, c, set(1.1463355f));
    q = fma(q, c, set(1.0f));
    const Vec tail = a > set(6.0f) ? set(0.0f) : mul(x, exp2_bf16(sub(set(0.0f), q)));
    return x < set(0.0f) ? tail : sub(x, tail);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline Vec gelu_tanh(Vec x) {
    const Vec cube = mul(mul(x, x), x);
    return mul(x, sigmoid(mul(set(1.5957691216057308f), fma(set(0.044715f), cube, x))));
}

static inline Vec silu(Vec x) { return mul(x, sigmoid(x)); }

// x + x^3 p(x^2) up to 0.625 (Moshier's Cephes), 1 - 2 / (1 + e^2x) beyond; relative error 2e-7.
static inline Vec tanh(Vec x) {
    const Vec square = mul(x, x);
    Vec p = set(-5.70498872745e-3f);
    p = fma(p, square, set(2.06390887954e-2f));
    p = fma(p, square, set(-5.37397155531e-2f));
    p = fma(p, square, set(1.33314422036e-1f));
    p = fma(p, square, set(-3.33332819422e-1f));
    const Vec near = fma(mul(p, square), x, x);
    const Vec far = sub(set(1.0f), set(2.0f) / add(set(1.0f), exp(add(x, x))));
    return square < set(0.390625f) ? near : far;
}

}  // namespace fastbert::FASTBERT_ISA
