// Statistics of sets side by side, a lane for each: what moments_about and reciprocal_std do for one float64 set, a
// long chain of operations that wait for each other, with the same bits; and rstd of variances that were given.
#pragma once

#include "isa/moments.hpp"

namespace fastnorm {
namespace {

// See KernelTable. Quarters where the sum of two finite numbers overflows; elsewhere they would cost subnormal numbers
// their digits.
inline bool given_rstds(const double* var, int64_t count, double eps, double* rstd) {
  int64_t negative = 0;
#pragma omp simd reduction(| : negative)
  for (int64_t i = 0; i < count; ++i) {
    const double v = var[i], sum = v + eps, one = sum == HUGE_VAL ? 0.5 : 1;
    const double reciprocal = one / std::sqrt(sum == HUGE_VAL ? 0.25 * v + 0.25 * eps : sum);
    rstd[i] = sum == 0 ? 0 : reciprocal;
    negative |= v < 0 ? 1 : 0;
  }
  return negative == 0;
}

// Arrays of numbers per set.
struct LaneSums {  // of d and d * d, d = x - pivot, each as a sum and what rounding took from it
  const double *pivot, *sum, *lost_sum, *squares, *lost_squares;
};
struct LaneStatistics {
  double *mean, *mean_lo, *var, *rstd, *rstd_lo;
  // near: 1 where squares are at most `most` times m2 (near_mean). plain: 1 where no number needed a scale, or can have
  // lost digits for want of one; only there, and where near, is the rest of use.
  double *near, *plain;
};

[[gnu::noinline]] inline void finish_lanes(const LaneSums& sums, const LaneStatistics& to, int64_t lanes, double count,
                                           double eps, double most) {
  const double *const pivot = sums.pivot, *const sum_of = sums.sum, *const lost_sum = sums.lost_sum;
  const double *const squares = sums.squares, *const lost_squares = sums.lost_squares;
  double *const mean_to = to.mean, *const mean_lo = to.mean_lo, *const variance = to.var;
  double *const rstd_to = to.rstd, *const rstd_lo = to.rstd_lo, *const near = to.near, *const plain = to.plain;
  const double share = 1 / count, large_eps = eps >= 0x1p-900 ? 1 : 0;
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    const TwoTerm sum = two_sum(sum_of[i], lost_sum[i]);
    const double correction = sum.hi / count;
    const TwoTerm whole = two_product(correction, count);
    const double correction_lo = (((sum.hi - whole.hi) - whole.lo) + sum.lo) * share;
    const TwoTerm mean = two_sum(pivot[i], correction);
    const TwoTerm product = two_product(sum.hi, correction), rest = two_sum(squares[i], -product.hi);
    const double rest_lo = rest.lo + (lost_squares[i] - (product.lo + (sum.hi * correction_lo + sum.lo * correction)));
    const double m2 = rest.hi <= 0 ? 0 : rest.hi, m2_lo = rest.hi <= 0 ? 0 : rest_lo;
    const double total = m2 + m2_lo, quotient = total / count;
    const TwoTerm var = two_sum(quotient, eps);
    const double rstd = 1 / std::sqrt(var.hi);
    const TwoTerm back = two_product(quotient, count);
    const double total_lo = (m2 - total) + m2_lo;
    const double var_lo = var.lo + (((total - back.hi) - back.lo) + total_lo) * share;
    const TwoTerm square = two_product(rstd, rstd);
    const TwoTerm one = two_product(var.hi, square.hi);
    const double residual = ((1 - one.hi) - one.lo) - (var.hi * square.lo + var_lo * square.hi);
    mean_to[i] = mean.hi;
    mean_lo[i] = mean.lo + correction_lo;
    variance[i] = quotient;
    const TwoTerm better = two_sum(rstd, 0.5 * rstd * residual);
    rstd_to[i] = better.hi;
    rstd_lo[i] = better.lo;
    // Products of ones and zeros: compilers do not vectorise what is made of truth values.
    const double told = squares[i] >= kLeastSquares ? 1.0 : sum.hi == 0 ? 1.0 : 0.0;
    near[i] = (total * most >= squares[i] ? 1.0 : 0.0) * told;
    const double large_enough = total >= 0x1p-900 * count ? 1.0 : large_eps;
    const double bounded = (total < 0x1p1000 ? 1.0 : 0.0) * (std::fabs(mean.hi) < 0x1p1000 ? 1.0 : 0.0);
    const double in_range = (var.hi > 0x1p-900 ? 1.0 : 0.0) * (var.hi < 0x1p900 ? 1.0 : 0.0);
    plain[i] = large_enough * bounded * in_range;
  }
}

}  // namespace
}  // namespace fastnorm
