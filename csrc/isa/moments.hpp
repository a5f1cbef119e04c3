// Count, mean and sum of squared deviations, exact enough for any offset and any magnitude:
// a provisional mean, then deviations from it with their own sum as the correction (so nothing cancels), and Chan,
// Golub and LeVeque's formula to merge blocks. The mean is carried as mean + mean_lo: for float64 data with mean / std
// near 2^53 a float64 mean alone would be off by a standard deviation.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa/lane_sum.hpp"
#include "norm_kernels.hpp"

namespace fastnorm {
namespace {

// Float32 data can neither overflow nor underflow in double; float64 data can.
template <class T>
constexpr bool kMayOverflow = sizeof(T) == sizeof(double);

// A running sum of block sums, with the rounding errors kept.
struct Sum {
  double hi = 0, lo = 0;
  void add(double value) {
    const TwoTerm s = two_sum(hi, value);
    hi = s.hi;
    lo += s.lo;
  }
  void add(const Sum& other) {
    add(other.hi);
    lo += other.lo;
  }
  // What an infinite sum has lost is NaN, and means nothing.
  double value() const { return std::fabs(hi) < HUGE_VAL ? hi + lo : hi; }
};
inline Sum sum_of(const TwoTerm& both) { return {both.hi, both.lo}; }

struct Moments {
  double count = 0;
  double mean = 0, mean_lo = 0;
  Sum m2;

  // Chan's formula. `exact`: products and differences to twice the precision, which results in float64 need.
  template <bool exact>
  void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const TwoTerm apart = two_sum(other.mean, -mean);
    const TwoTerm delta = two_sum(apart.hi, apart.lo + (other.mean_lo - mean_lo));
    TwoTerm share = {other.count / total, 0};
    TwoTerm shift = {(delta.hi + delta.lo) * share.hi, 0};
    m2.add(other.m2);
    if (exact) {
      // Blocks of a trend differ by whole standard deviations: shift and delta^2 are then no small corrections.
      const TwoTerm back = two_product(share.hi, total);
      share.lo = ((other.count - back.hi) - back.lo) / total;
      shift = two_product(delta.hi, share.hi);
      shift.lo += delta.hi * share.lo + delta.lo * share.hi;
      const TwoTerm square = two_product(delta.hi, shift.hi);
      const TwoTerm between = two_product(square.hi, count);
      m2.add(between.hi);
      m2.lo += between.lo + (square.lo + delta.hi * shift.lo + delta.lo * shift.hi) * count;
    } else {
      m2.add(delta.hi * shift.hi * count);
    }
    const TwoTerm sum = two_sum(mean, shift.hi);
    const TwoTerm normal = two_sum(sum.hi, sum.lo + (shift.lo + mean_lo));
    mean = normal.hi;
    mean_lo = normal.lo;
    count = total;
  }
};

// Moments from the sums of d and d * d, d = x - pivot. The pivot need not be the mean, only near it: products and
// differences to twice the precision lose nothing where the data lie closer to each other than to the pivot, and leave
// 0 where they are all the same.
inline Moments moments_about(double pivot, double count, const Sum& sums, const Sum& squares) {
  const TwoTerm sum = two_sum(sums.hi, sums.lo);
  const double correction = sum.hi / count, share = 1 / count;
  const TwoTerm whole = two_product(correction, count);
  const double correction_lo = (((sum.hi - whole.hi) - whole.lo) + sum.lo) * share;
  const TwoTerm mean = two_sum(pivot, correction);
  const TwoTerm product = two_product(sum.hi, correction), m2 = two_sum(squares.hi, -product.hi);
  Moments moments;
  moments.count = count;
  moments.mean = mean.hi;
  moments.mean_lo = mean.lo + correction_lo;
  if (m2.hi <= 0) return moments;  // NaN goes on
  moments.m2.hi = m2.hi;
  moments.m2.lo = m2.lo + (squares.lo - (product.lo + (sum.hi * correction_lo + sum.lo * correction)));
  return moments;
}

// Values of x at a place, in double, times `scale` (a power of two; 1 unless the plain values overflow or underflow).
template <class T, class At>
FASTNORM_INLINE Pack<double> wide(At at, const T* x, const Pack<double>& scale) {
  const Pack<double> values = at.template load<double>(x);
  return kMayOverflow<T> ? values * scale : values;
}

// d and d * d of values about a pivot, and what rounding took from the two.
FASTNORM_INLINE PackPair deviations(const Pack<double>& values, const Pack<double>& pivot) {
  const Pack<double> d = values - pivot;
  return {d, d * d};
}
FASTNORM_INLINE PackPair lost_deviations(const Pack<double>& values, const Pack<double>& pivot) {
  const Pack<double> d = values - pivot, part = d - values;
  const Pack<double> lost = (values - (d - part)) - (pivot + part), square = d * d;
  return {lost, lost_in_product(d, d, square) + (d + d) * lost};
}

// Roundings of many terms cancel each other; those of a few float64 terms have to be kept.
constexpr int64_t kFewTerms = 64;
template <class T>
inline bool few_terms(int64_t count) {
  return kMayOverflow<T> && count <= kFewTerms;
}

// Is a pivot so near the mean that sums about it are as good as about the mean itself? What rounding takes from the
// squares counts squares / m2 times in rstd, and the mean is off by as much of the distance as its sum is. So it
// depends on the sums: those of sets in runs keep what is lost between their leaves. (At 2, sets of two values, half of
// them 0, were off by 6 u. Of 6e7 sets made to be hard 10 were off by more than 4 u at 1.8, 3 at 1.7 and one at 1.6;
// rows of 30 half a standard deviation from zero take 6 % longer each time.)
constexpr double kMostSquares = 1.5, kMostSquaresOfSet = 1.7;
// Squares that vanish say nothing of that, and a constant set wants every digit of its mean.
constexpr double kLeastSquares = 0x1p-960;
inline bool near_mean(const Moments& moments, const Sum& sum, const Sum& squares) {
  const bool told = squares.hi >= kLeastSquares || sum.hi + sum.lo == 0;
  return told && moments.m2.value() * kMostSquaresOfSet >= squares.hi;
}

// Moments of n contiguous values times `scale`.
template <class T>
inline Moments block_moments(const T* x, int64_t n, double scale) {
  const double count = static_cast<double>(n);
  const Pack<double> scales(scale);
  const double pivot = sum(n, [&](auto at) { return wide(at, x, scales); }) / count;
  const Pack<double> pivots(pivot);
  const Pair sums = sum(n, [&](auto at) { return deviations(wide(at, x, scales), pivots); });
  Pair lost{0, 0};
  if (few_terms<T>(n)) lost = sum(n, [&](auto at) { return lost_deviations(wide(at, x, scales), pivots); });
  return moments_about(pivot, count, {sums.first, lost.first}, {sums.second, lost.second});
}

// The same around zero, for RMS norm.
template <class T>
inline Moments block_squares(const T* x, int64_t n, double scale) {
  const Pack<double> scales(scale);
  Moments moments;
  moments.count = static_cast<double>(n);
  moments.m2.hi = sum(n, [&](auto at) {
    const Pack<double> v = wide(at, x, scales);
    return v * v;
  });
  return moments;
}

// The short way for float32 data: sums of x and x * x in double, from one reading. Each square is exact, and what the
// additions lose is far below a float32's last digit as long as the mean is not many thousand standard deviations from
// zero; `moments_of` says whether that was so.
template <bool centred = true>
struct PlainSums {
  Pack<double> sum = Pack<double>(0.0), squares = Pack<double>(0.0);

  template <class At>
  FASTNORM_INLINE void add(At at, const float* x) {
    const Pack<double> v = at.template load<double>(x);
    if constexpr (centred) sum += v;
    squares = add_exact_product(v, v, squares);
  }
};

struct PlainTotals {
  double sum = 0, squares = 0;
  double additions = 0;  // in the longest chain

  void add(const PlainSums<>& sums, int64_t packs) {
    sum += fold(sums.sum);
    squares += fold(sums.squares);
    additions += static_cast<double>(packs);
  }
  void add(const PlainTotals& other) {
    sum += other.sum;
    squares += other.squares;
    additions += other.additions;
  }
};

// False where the sums may have lost too much: m2 is wrong by at most additions * 2^-53 * squares, and an eighth of a
// float32 unit of rstd is 2^-26 of m2. Never true for a constant set (but zeros), whose m2 has to be exactly 0.
constexpr double kPlainMargin = 0x1p27;

inline bool moments_of(const PlainTotals& totals, double count, bool centred, Moments& moments) {
  moments = Moments{};
  moments.count = count;
  if (!centred) {
    moments.m2.hi = totals.squares;
    return totals.squares < HUGE_VAL;
  }
  moments.mean = totals.sum / count;
  moments.m2.hi = totals.squares - totals.sum * moments.mean;
  return moments.m2.hi * kPlainMargin >= totals.squares * (totals.additions + kPack);
}

// What turns x into xhat: ((x * scale - mean) - mean_lo) * rstd.
struct Statistic {
  double mean = 0, mean_lo = 0, rstd = 0;
  double scale = 1;  // a power of two other than 1 only where x - mean could overflow
  // 1 if x gave these numbers and is not constant; 0 if the caller gave them: then x may be anything.
  double of_x = 0;
  double rstd_lo = 0;  // rstd + rstd_lo: to twice the precision, where float64 data gave it
  // 1 if rstd_lo counts: not in RMS norm, whose results have fewer roundings, nor through given statistics, where x may
  // be infinite and make NaN of it.
  double two_parts = 0;

  double true_rstd() const { return rstd * scale; }  // may overflow where rstd * (something small) * scale does not
};

// 1 / sqrt(m2 / count + eps), for float64 data to twice the precision: what a result would lose by the rounding of rstd
// alone is a quarter of what it may. A set that is constant under eps = 0 gets 0, so that its xhat is 0 like that of
// any constant set.
template <class T>
inline TwoTerm reciprocal_std(const Sum& m2, double count, double eps) {
  const double total = m2.value();
  if (!kMayOverflow<T>) {
    const double var = total * (1 / count) + eps;
    return {var == 0 ? 0 : 1 / std::sqrt(var), 0};
  }
  const double quotient = total / count;
  const TwoTerm var = two_sum(quotient, eps);
  if (var.hi == 0) return {0, 0};
  const double rstd = 1 / std::sqrt(var.hi);
  if (var.hi > 0x1p-900 && var.hi < 0x1p900) {
    const TwoTerm product = two_product(quotient, count);
    const double total_lo = (m2.hi - total) + m2.lo;
    const double var_lo = var.lo + (((total - product.hi) - product.lo) + total_lo) * (1 / count);
    const TwoTerm square = two_product(rstd, rstd);
    const TwoTerm one = two_product(var.hi, square.hi);
    const double residual = ((1 - one.hi) - one.lo) - (var.hi * square.lo + var_lo * square.hi);
    return two_sum(rstd, 0.5 * rstd * residual);
  }
  return {rstd, 0};
}

template <class T>
inline bool needs_scale(const Moments& moments, double eps) {
  if (!kMayOverflow<T>) return false;
  const double m2 = moments.m2.value();
  return !(m2 < 0x1p1000) || !(std::fabs(moments.mean) < 0x1p1000) || (m2 < 0x1p-900 * moments.count && eps < 0x1p-900);
}

// The low part of the mean costs time; it is left out where it is worth less than an eighth of a unit.
constexpr double kNegligible = 0x1p-56;
inline void drop_negligible(Statistic& s) {
  if (std::fabs(s.mean_lo) * s.rstd < kNegligible) s.mean_lo = 0;
}

// A float64 number next to the mean that has few bits, down to 2^-26 of a standard deviation. What rounding takes from
// x - mean is the same for all x of a binade, and adds up; x - short_mean is exact but where x is nearer to 0 than to
// that, and what is left of the mean so small that nothing is lost with it. (Far from zero x - mean is exact, and this
// the mean or the number next to it.) Of a set that may be constant, `of_x` 0, it is the mean: x - mean is exactly 0
// there.
FASTNORM_INLINE double short_mean(double mean, double rstd, double of_x) {
  const double far = 0x1.8p26 / rstd, rounded = (mean + far) - far;
  return far < 0x1p900 * of_x ? rounded : mean;
}

// The same for sums about it. (Farther from zero than this x - mean is exact, of a constant set 0.)
inline double short_mean_of(double mean, double var) {
  return short_mean(mean, 1 / std::sqrt(var), var > 0x1p-40 * mean * mean ? 1.0 : 0.0);
}

// Statistic::of_x as far as rstd tells: 0 where eps hides the variance (or rstd * rstd overflows, where the mean does).
FASTNORM_INLINE double varies(double rstd, double eps) { return rstd * rstd * eps < 1 - 0x1p-40 ? 1.0 : 0.0; }

// Statistics of a set from its moments, which were taken of x * scale.
template <class T>
inline Statistic statistic_of(const Moments& moments, double eps, double scale, bool centred) {
  Statistic s;
  s.mean = moments.mean;
  s.mean_lo = moments.mean_lo;
  const TwoTerm rstd = reciprocal_std<T>(moments.m2, moments.count, eps * scale * scale);
  s.rstd = rstd.hi;
  s.rstd_lo = rstd.lo;
  s.two_parts = kMayOverflow<T> && centred ? 1 : 0;
  s.scale = scale;
  s.of_x = moments.m2.value() / moments.count > 0 ? 1 : 0;
  drop_negligible(s);
  return s;
}

// Is a kept rstd beyond what float64 holds to full precision? Then the set has to be measured again.
template <class T>
inline bool lost(double rstd) {
  return kMayOverflow<T> && (std::isinf(rstd) || (rstd > 0 && rstd < 0x1p-1022));
}

// Statistics of a set from what the caller keeps (a cache, running statistics).
template <class T>
inline Statistic statistic_from(double mean, double mean_lo, double rstd, double rstd_lo) {
  Statistic s{mean, mean_lo, rstd};
  s.rstd_lo = rstd_lo;
  if (kMayOverflow<T> && (std::fabs(mean) > 0x1p1000 || (rstd > 0 && rstd < 0x1p-1000))) {
    s.scale = 0x1p-64;
    s.mean *= s.scale;
    s.mean_lo *= s.scale;
    s.rstd /= s.scale;
    s.rstd_lo /= s.scale;
  }
  drop_negligible(s);
  return s;
}

template <class T>
inline void store_statistic(const NormArgs<T>& args, int64_t index, const Moments& moments, const Statistic& s) {
  if (args.mean) args.mean[index] = moments.mean / s.scale;
  if (args.mean_lo) args.mean_lo[index] = moments.mean_lo / s.scale;
  if (args.var) args.var[index] = moments.m2.value() / moments.count / s.scale / s.scale;
  if (args.rstd) args.rstd[index] = s.true_rstd();
  if (args.rstd_lo) args.rstd_lo[index] = s.rstd_lo * s.scale;
}

}  // namespace
}  // namespace fastnorm
