// exp and the activations on one Vec, by operators of vector types where the instruction set has no better instruction.
// Polynomials are Chebyshev fits, made for fp32; errors are measured over their whole range.
#pragma once

#include "fastbert.h"
#include "vec.h"

namespace fastbert::FASTBERT_ISA {

using Ints = int32_t __attribute__((vector_size(sizeof(Vec))));

// 1.5 * 2^23: adding it to x, |x| < 2^22, leaves round(x), ties to even, in the low bits of the sum.
constexpr float ROUNDING = 12582912.0f;

// 2^x = p(f) 2^n, x = n + f, n an integer, f in [-0.5, 0.5], for x <= 127; 0 below -126 (AVX-512) or -126.5. NaN
// stays NaN.
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
    const Vec rounding = set(ROUNDING);
    x = max(x, set(-127.0f));
    const Vec shifted = add(x, rounding);
    const Ints n = (Ints)shifted - (Ints)rounding;  // -127 makes the exponent 0
    return mul(p(sub(x, sub(shifted, rounding))), (Vec)((n + 127) << 23));
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

// 1 - Phi(c), Phi the normal distribution, for c in [0, 6]: 2^-q(c) with q a polynomial. Its even and odd powers are
// summed separately, so that neither waits for the other.
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

// x Phi(x). Absolute error 4e-8 times max(1, |x|) before the result is rounded, relative error 3e-6 down to -4.
#if defined(__AVX512F__)
// t (1 - Phi(t)) for t = 0.4 (i + f), f from -0.5 to 0.5: the coefficients of 1, f ... f^5 for each i. Zero beyond 5.8.
alignas(64) constexpr float GELU_TAIL[6][16] = {
    {0, 0.137831286f, 0.169484332f, 0.138083622f, 0.087678872f, 0.0455002636f, 0.0196740814f, 0.00715436228f,
     0.00219884072f, 0.000572791148f, 0.000126685263f, 2.3815348e-05f, 3.80802953e-06f, 5.18164427e-07f, 6.00214349e-08f, 0},
    {0.200000003f, 0.0789080858f, -0.00795913022f, -0.0471814387f, -0.0490696207f, -0.0340927243f, -0.0182197355f, -0.00784325227f,
     -0.00277677691f, -0.000817495165f, -0.000201459916f, -4.17338015e-05f, -7.28839586e-06f, -1.07524806e-06f, -1.34206147e-07f, 0},
    {-0.0638305172f, -0.0542086139f, -0.0315189175f, -0.00870050862f, 0.00496871118f, 0.00863861665f, 0.00673655886f, 0.00369828823f,
     0.00157163909f, 0.000536499836f, 0.000149868589f, 3.46289562e-05f, 6.66374945e-06f, 1.0728977e-06f, 1.45007192e-07f, 0},
    {-3.91215644e-06f, 0.00603347272f, 0.00830581039f, 0.00636310037f, 0.00272613741f, 9.9569661e-08f, -0.00100900407f, -0.000907841953f,
     -0.000507815508f, -0.000210539292f, -6.85193663e-05f, -1.79787567e-05f, -3.86061947e-06f, -6.84781014e-07f, -1.00963661e-07f, 0},
    {0.00172413373f, 0.00113336626f, -1.66420105e-05f, -0.000819450186f, -0.000865774928f, -0.000461389165f, -7.8102159e-05f, 8.73557219e-05f,
     9.40313475e-05f, 5.31954975e-05f, 2.13544517e-05f, 6.59162606e-06f, 1.62005415e-06f, 3.23055701e-07f, 5.28752402e-08f, 0},
    {-5.05145654e-05f, -0.000202335534f, -0.000223038369f, -8.4277417e-05f, 5.34377905e-05f, 9.1347516e-05f, 5.58433967e-05f, 1.30900989e-05f,
     -6.46150238e-06f, -8.11167683e-06f, -4.49046547e-06f, -1.70169346e-06f, -4.8765736e-07f, -1.10121746e-07f, -2.00269525e-08f, 0},
};

// max(x, 0) - t (1 - Phi(t)), t = |x|: a polynomial with coefficients looked up by shuffles, which products do not use.
static inline Vec gelu(Vec x) {
    const Vec rounding = set(ROUNDING);  // leaves i in the low bits
    const Vec t = min((Vec)((Ints)x & 0x7fffffff), set(6.0f));
    const Vec shifted = fma(t, set(2.5f), rounding), f = fma(t, set(2.5f), sub(rounding, shifted));
    const auto coefficient = [&](int power) { return _mm512_permutexvar_ps((__m512i)shifted, load(GELU_TAIL[power])); };
    Vec tail = coefficient(5);
    for (int power = 4; power >= 0; --power) tail = fma(tail, f, coefficient(power));
    return sub(max(x, set(0.0f)), tail);
}
#else
static inline Vec gelu(Vec x) {
    const Vec a = x < set(0.0f) ? sub(set(0.0f), x) : x;
    const Vec tail = a > set(6.0f) ? set(0.0f) : mul(x, normal_tail(min(a, set(6.0f))));
    return x < set(0.0f) ? tail : sub(x, tail);
}
#endif

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

// Calls f with an activation's function, so that the choice is made outside of loops.
template <typename F>
static inline void with_activation(Activation activation, const F& f) {
    switch (activation) {
        case Activation::gelu: return f([](Vec z) { return gelu(z); });
        case Activation::gelu_tanh: return f([](Vec z) { return gelu_tanh(z); });
        case Activation::relu: return f([](Vec z) { return max(z, set(0.0f)); });
        case Activation::silu: return f([](Vec z) { return silu(z); });
        case Activation::tanh: return f([](Vec z) { return tanh(z); });
        case Activation::none: break;
    }
    f([](Vec z) { return z; });
}

}  // namespace fastbert::FASTBERT_ISA
