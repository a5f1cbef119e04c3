// Statistics of float64 sets side by side: what moments_about and reciprocal_std do for one set, a long chain of
// operations that wait for each other, is done for a lane each, with the same bits.
#pragma once

#include "isa/moments.hpp"

namespace fastnorm {
namespace {

// Arrays of numbers per set.
struct LaneSums {  // of d and d * d, d = x - pivot, each as a sum and what rounding took from it
  const double *pivot, *sum, *lost_sum, *squares, *lost_squares;
};
struct LaneStatistics {
  double *mean, *mean_lo, *var, *rstd;
  // near: 1 where the pivot is so near the mean that the sums are as good as about the mean itself. plain: 1 where no
  // number needed a scale, or can have lost digits for want of one; only there, and where near, is the rest of use.
  double *near, *plain;
};

// How many times m2 the sum of squares about a pivot may be: what the squares lose counts that much more in rstd.
constexpr double kNearMean = 1.5;

[[gnu::noinline]] inline void finish_lanes(const LaneSums& sums, const LaneStatistics& to, int64_t lanes, double count,
                                           double eps) {
  const double share = 1 / count, least = eps >= 0x1p-900 ? 0 : 0x1p-900 * count;
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    const double sum = sums.sum[i] + sums.lost_sum[i], correction = sum / count;
    const TwoTerm whole = two_product(correction, count);
    const double correction_lo = ((sum - whole.hi) - whole.lo) * share;
    const TwoTerm mean = two_sum(sums.pivot[i], correction);
    const TwoTerm product = two_product(sum, correction), rest = two_sum(sums.squares[i], -product.hi);
    const double rest_lo = rest.lo + (sums.lost_squares[i] - (product.lo + sum * correction_lo));
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
    to.mean[i] = mean.hi;
    to.mean_lo[i] = mean.lo + correction_lo;
    to.var[i] = quotient;
    to.rstd[i] = rstd + 0.5 * rstd * residual;
    to.near[i] = total * kNearMean >= sums.squares[i] ? 1.0 : 0.0;
    // Below 2^900, the variance leaves its sum nothing to overflow; asked for once more, GCC does not vectorise the
    // loop.
    const bool unscaled = (std::fabs(mean.hi) < 0x1p1000) & (total >= least);
    to.plain[i] = unscaled & (var.hi > 0x1p-900) & (var.hi < 0x1p900) ? 1.0 : 0.0;
  }
}

}  // namespace
}  // namespace fastnorm
