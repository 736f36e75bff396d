// exp and the activations on one Vec, for any instruction set: only arithmetic, shifts and comparisons of vector types.
// Polynomials are Chebyshev fits, made for fp32; errors are measured over all of their range.
#pragma once

#include "vec.h"

namespace fastbert::FASTBERT_ISA {

using Ints = int32_t __attribute__((vector_size(sizeof(Vec))));

// 2^x = p(f) 2^n, x = n + f with n whole and f in [-0.5, 0.5], for x <= 127; 0 below -126.5 or -126. NaN stays NaN.
#if defined(__AVX512F__)
template <typename Polynomial>
static inline Vec power(Vec x, const Polynomial& p) {
    const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, p(sub(x, n)), n);
}
#else
template <typename Polynomial>
static inline Vec power(Vec x, const Polynomial& p) {
    const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    x = max(x, set(-127.0f));
    const Vec shifted = add(x, magic);
    const Ints n = (Ints)shifted - (Ints)magic;  // -127 makes the exponent 0
    return mul(p(sub(x, sub(shifted, magic))), (Vec)((n + 127) << 23));
}
#endif

// 2^x, relative error 9e-8.
static inline Vec exp2(Vec x) {
    return power(x, [](Vec f) {
        Vec p = set(1.5469732e-4f);
        p = fma(p, f, set(1.3400433e-3f));
        p = fma(p, f, set(9.6180253e-3f));
        p = fma(p, f, set(5.5503272e-2f));
        p = fma(p, f, set(2.4022651e-1f));
        p = fma(p, f, set(6.9314718e-1f));
        return fma(p, f, set(1.0f));
    });
}

// The same with a relative error of 8e-5, for results that are rounded to bf16 (2e-3).
static inline Vec exp2_bf16(Vec x) {
    return power(x, [](Vec f) {
        Vec p = set(5.5171435e-2f);
        p = fma(p, f, set(2.4261081e-1f));
        p = fma(p, f, set(6.9326099e-1f));
        return fma(p, f, set(9.9992809e-1f));
    });
}

static inline Vec exp(Vec x) { return exp2(mul(min(x, set(88.0f)), set(1.4426950408889634f))); }

static inline Vec sigmoid(Vec x) { return set(1.0f) / add(set(1.0f), exp(sub(set(0.0f), x))); }

// 1 - Phi(c), Phi the normal distribution, for c in [0, 6]: 2^-q(c), q a polynomial, its even powers and its odd ones apart:
// neither waits for the other.
static inline Vec normal_tail(Vec c) {
    const Vec square = mul(c, c);
    Vec even = set(2.4108629e-10f), odd = set(-1.0699088e-8f);
    even = fma(even, square, set(2.1513347e-7f));
    odd = fma(odd, square, set(-2.585263e-6f));
    even = fma(even, square, set(2.0480009e-5f));
    odd = fma(odd, square, set(-1.089833e-4f));
    even = fma(even, square, set(3.490295e-4f));
    odd = fma(odd, square, set(-9.0000023e-5f));
    even = fma(even, square, set(-6.8799085e-3f));
    odd = fma(odd, square, set(5.2415788e-2f));
    even = fma(even, square, set(4.5922467e-1f));
    odd = fma(odd, square, set(1.1511041f));
    even = fma(even, square, set(1.0f));
    return exp2(sub(set(0.0f), fma(odd, c, even)));
}

// x Phi(x). Absolute error 4e-8 times max(1, |x|), as that of x erf(x).
static inline Vec gelu(Vec x) {
    const Vec a = x < set(0.0f) ? sub(set(0.0f), x) : x;
    const Vec tail = a > set(6.0f) ? set(0.0f) : mul(x, normal_tail(min(a, set(6.0f))));
    return x < set(0.0f) ? tail : sub(x, tail);
}

// The same for results that are rounded to bf16, with Phi(x) = 1 / (1 + 2^(-x p(x^2))): relative error 9e-4 down to -4.5,
// absolute 3e-8 below. The polynomial is taken in three pairs, which do not wait for each other.
static inline Vec gelu_bf16(Vec x) {
    x = max(x, set(-16.0f));  // gelu(-16) is 0, and infinity times 0 would not be
    const Vec u = min(mul(x, x), set(30.25f)), square = mul(u, u);
    const Vec low = fma(set(1.07376259e-1f), u, set(2.30011666f));
    const Vec middle = fma(set(-2.53373872e-5f), u, set(-9.80970056e-4f));
    const Vec high = fma(set(-1.88860044e-8f), u, set(1.42339832e-6f));
    const Vec p = fma(fma(high, square, middle), square, low);
    const Vec odds = exp2_bf16(mul(p, sub(set(0.0f), x)));  // up to 2^76
#if defined(__AVX512F__)
    return mul(x, _mm512_rcp14_ps(add(set(1.0f), odds)));
#else
    return x / add(set(1.0f), odds);
#endif
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
