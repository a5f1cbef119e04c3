// The formulas on one contiguous run of values. All arithmetic is in double whatever T is; results are rounded once.
//
//   xhat = ((x * scale - mean) - mean_lo) * rstd
//   y    = xhat * weight + bias
//   dx   = rstd * (dy * weight - a - xhat * b),   a = mean(dy * weight), b = mean(dy * weight * xhat) over the set
//
// A weight is one number for the run (Same) or one per value (Each). x may be y, and dy may be dx: every value is read
// before its place is written.
#pragma once

#include "isa/moments.hpp"

namespace fastnorm {
namespace {

struct Same {
  double value;
  double operator()(int64_t) const { return value; }
};

template <class T>
struct Each {
  const T* values;
  double operator()(int64_t i) const { return static_cast<double>(values[i]); }
};

// x - mean. Float32 data needs neither the low part of the mean nor a scale.
template <class T>
struct Centre {
  double mean, mean_lo, scale;
  explicit Centre(const Statistic& s) : mean(s.mean), mean_lo(s.mean_lo), scale(s.scale) {}
  double operator()(T x) const {
    if (kMayOverflow<T>) return (static_cast<double>(x) * scale - mean) - mean_lo;
    return static_cast<double>(x) - mean;
  }
};

template <class T, class Weight, class Bias>
inline void normalise(const T* x, T* y, int64_t n, const Statistic& s, Weight weight, Bias bias) {
  const Centre<T> centre(s);
  const double rstd = s.rstd;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(centre(x[i]) * rstd * weight(i) + bias(i));
}

// {sum of g, sum of g * xhat}, g = dy * weight
template <class T, class Weight>
inline Pair gradient_sums(const T* x, const T* dy, int64_t n, const Statistic& s, Weight weight) {
  const Centre<T> centre(s);
  const double rstd = s.rstd;
  return sum_pairs(n, [=](int64_t i) {
    const double g = static_cast<double>(dy[i]) * weight(i);
    return Pair{g, g * (centre(x[i]) * rstd)};
  });
}

template <class T, class Weight>
inline void input_gradient(const T* x, const T* dy, T* dx, int64_t n, const Statistic& s, Weight weight, double a,
                           double b) {
  const Centre<T> centre(s);
  const double rstd = s.rstd, scale = s.scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double g = static_cast<double>(dy[i]) * weight(i);
    const double scaled = rstd * ((g - a) - centre(x[i]) * rstd * b);
    dx[i] = static_cast<T>(kMayOverflow<T> ? scaled * scale : scaled);
  }
}

// Through given statistics nothing but the scale comes back (and an infinite x leaves no trace).
template <class T, class Weight>
inline void input_gradient_constant(const T* dy, T* dx, int64_t n, const Statistic& s, Weight weight) {
  const double rstd = s.rstd, scale = s.scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double scaled = rstd * (static_cast<double>(dy[i]) * weight(i));
    dx[i] = static_cast<T>(kMayOverflow<T> ? scaled * scale : scaled);
  }
}

// dweight[i] += dy * xhat, dbias[i] += dy
template <class T>
inline void add_parameter_gradients(const T* x, const T* dy, int64_t n, const Statistic& s, double* dweight,
                                    double* dbias) {
  const Centre<T> centre(s);
  const double rstd = s.rstd;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double g = static_cast<double>(dy[i]);
    dweight[i] += g * (centre(x[i]) * rstd);
    dbias[i] += g;
  }
}

// The same for values whose parameters repeat every `period`: n values from parameter `phase` on. `totals` holds four
// rows of `stride` numbers: dweight, dbias, and what their sums have lost to rounding, for there may be millions of
// repetitions.
template <class T>
inline void add_repeated_gradients(const T* x, const T* dy, int64_t n, int64_t period, int64_t phase,
                                   const Statistic& s, double* totals, int64_t stride) {
  alignas(64) double rows[2][kBlock];
  // Short periods are added side by side, then folded in a tree.
  const int64_t width = period < kShortRun ? kShortRun / period * period : n;
  for (int64_t i = 0; i < width; ++i) rows[0][i] = rows[1][i] = 0;
  for (int64_t done = 0; done < n; done += width) {
    add_parameter_gradients(x + done, dy + done, n - done < width ? n - done : width, s, rows[0], rows[1]);
  }
  int64_t used = width;
  for (; used > period;) {
    const int64_t kept = (used / period + 1) / 2 * period;
    for (int64_t i = kept; i < used; ++i) {
      rows[0][i - kept] += rows[0][i];
      rows[1][i - kept] += rows[1][i];
    }
    used = kept;
  }
  for (int row = 0; row < 2; ++row) {
    double *hi = totals + row * stride + phase, *lo = hi + 2 * stride;
    for (int64_t i = 0; i < used; ++i) {
      const TwoTerm total = two_sum(hi[i], rows[row][i]);
      hi[i] = total.hi;
      lo[i] += total.lo;
    }
  }
}

}  // namespace
}  // namespace fastnorm
