// Loops over a row whose length need not be a multiple of WIDTH.
#pragma once

#include "vec_math.h"

namespace fastbert::FASTBERT_ISA {

template <typename T>
static inline Vec load_part(const T* p, int lanes) { return lanes == WIDTH ? load(p) : load_n(p, lanes); }
template <typename T>
static inline void store_part(T* p, Vec v, int lanes) {
    if (lanes == WIDTH) store(p, v);
    else store_n(p, v, lanes);
}

// Stores the lanes of `v` that exist at column n of a row of `columns`.
template <typename T>
static inline void store_within(T* row, int64_t n, int64_t columns, Vec v) {
    if (n < columns) store_part(row + n, v, columns - n < WIDTH ? static_cast<int>(columns - n) : WIDTH);
}

// The columns [begin, end) within `window` of the rows [m, m + rows), of L columns; all of them without a window.
struct Columns {
    int64_t begin, end;
    Columns(int64_t window, int64_t L, int64_t m, int64_t rows)
        : begin(window < 0 || m < window ? 0 : m - window),
          end(window < 0 || L - m - rows < window ? L : m + rows + window) {}
};

// Calls f(n, lanes) for each vector of [0, N).
template <typename F>
static inline void along(int64_t N, const F& f) {
    int64_t n = 0;
    for (; n + WIDTH <= N; n += WIDTH) f(n, WIDTH);
    if (n < N) f(n, static_cast<int>(N - n));
}

// Copies n numbers as fp32.
template <typename T>
static inline void widen(const T* from, int64_t n, float* to) {
    along(n, [&](int64_t i, int lanes) { store_part(to + i, load_part(from + i, lanes), lanes); });
}

// The largest of p[0, n), n > 0.
static inline float highest(const float* p, int64_t n) {
    float most = p[0];
    if (n < WIDTH) {
        for (int64_t i = 1; i < n; ++i) most = p[i] > most ? p[i] : most;
        return most;
    }
    Vec top = set(most), other = top;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        top = max(top, load(p + i));
        other = max(other, load(p + i + WIDTH));
    }
    if (i + WIDTH <= n) top = max(top, load(p + i));
    if (n % WIDTH) other = max(other, load(p + n - WIDTH));  // overlaps the last vector: faster than one by one
    return highest(max(top, other));
}

constexpr float LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;

// scores = scores * scale + bias, over [0, n).
static inline void scale_and_add(float* scores, int64_t n, float scale, const float* bias) {
    along(n, [&](int64_t i, int lanes) {
        store(scores + i, fma(load(scores + i), set(scale), load_part(bias + i, lanes)));
    });
}

// The sum of acc = f(acc, n, lanes) over [0, N), in two accumulators in the order of add_layer_norm_rows.cpp.
template <typename F>
static inline float sum_along(int64_t N, const F& f) {
    Vec a = set(0.0f), b = set(0.0f);
    int64_t n = 0;
    for (; n + 2 * WIDTH <= N; n += 2 * WIDTH) {
        a = f(a, n, WIDTH);
        b = f(b, n + WIDTH, WIDTH);
    }
    for (; n + WIDTH <= N; n += WIDTH) a = f(a, n, WIDTH);
    if (n < N) b = f(b, n, static_cast<int>(N - n));
    return sum(add(a, b));
}

// The variance, from the mean of squares about a rounded mean and the error `off` of that mean.
static inline float variance_about(float squares, float off) {
    const float variance = squares - off * off;
    return variance > 0.0f ? variance : 0.0f;
}

}  // namespace fastbert::FASTBERT_ISA
