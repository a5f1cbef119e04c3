// The formulas on one contiguous run of values, a pack at a time.
//
//   xhat = (x * scale - mean) * rstd
//   y    = xhat * weight + bias
//   dx   = rstd * (dy * weight - a - xhat * b),   a = mean(dy * weight), b = mean(dy * weight * xhat) over the set
//
// C is what a formula computes in. Statistics are always double; with them, data can be normalised in their own type
// within the contract: x - mean is split into x - pivot and what the pivot leaves of the mean, which becomes part of
// the offset in (x - pivot) * rstd + offset. Float32 sets whose statistics say that float32 might overflow or underflow
// are computed in double (`fits`), and rounded at the end.
//
// x may be y, and dy may be dx: every value is read before its place is written.
#pragma once

#include "isa/moments.hpp"

namespace fastnorm {
namespace {

// Parameters of a run: one value for all of it (Same), one per value (Each), or none.
struct None {};

template <class C>
struct Same {
  Pack<C> value;
  Same() = default;
  explicit Same(double v) : value(static_cast<C>(v)) {}
};

template <class T>
struct Each {
  const T* values;
};

template <class C, class At>
FASTNORM_INLINE Pack<C> times(At, const Pack<C>& v, None) {
  return v;
}
template <class C, class At>
FASTNORM_INLINE Pack<C> times(At, const Pack<C>& v, const Same<C>& weight) {
  return v * weight.value;
}
template <class C, class At, class T>
FASTNORM_INLINE Pack<C> times(At at, const Pack<C>& v, Each<T> weight) {
  return v * at.template load<C>(weight.values);
}
template <class C, class At>
FASTNORM_INLINE Pack<C> plus(At, const Pack<C>& v, None) {
  return v;
}
template <class C, class At>
FASTNORM_INLINE Pack<C> plus(At, const Pack<C>& v, const Same<C>& bias) {
  return v + bias.value;
}
template <class C, class At, class T>
FASTNORM_INLINE Pack<C> plus(At at, const Pack<C>& v, Each<T> bias) {
  return v + at.template load<C>(bias.values);
}

// The parameters at one place, for runs that lie alike.
template <class At>
FASTNORM_INLINE None held(At, None) {
  return {};
}
template <class At, class T>
FASTNORM_INLINE Same<T> held(At at, Each<T> parameters) {
  Same<T> here;
  here.value = at.template load<T>(parameters.values);
  return here;
}

// Far enough from overflow and underflow that products of a few such numbers are too. (A zero is exact, but says
// nothing of what it is compared with.)
constexpr double kLeastModerate = 0x1p-40, kMostModerate = 0x1p40;
FASTNORM_INLINE bool moderate(double v) {
  return static_cast<bool>((std::fabs(v) > kLeastModerate) & (std::fabs(v) < kMostModerate));
}
FASTNORM_INLINE bool zero_or_moderate(double v) { return static_cast<bool>((v == 0) | moderate(v)); }

// Can float32 data with these statistics be normalised in float32?
constexpr double kMostMean = 0x1p100;
inline bool fits(const Statistic& s) { return moderate(s.rstd) && std::fabs(s.mean) < kMostMean; }

// v - mean - mean_lo in float64, rounded once: a second rounding is more than float64 results can bear. Where mean_lo
// is 0 there is but one anyway (and infinities may pass).
template <class V>  // double or a pack of them
FASTNORM_INLINE V less_mean(const V& v, const V& mean, const V& mean_lo) {
  const V d = v - mean, part = d - v;
  return d + (((v - (d - part)) - (mean + part)) - mean_lo);
}

// Runs from this length on are written in whole lines of the cache, where no loop of known length writes them: two
// lines for a pack take twice as long.
constexpr int64_t kAlignedRun = 4 * kPack;

// Are float64 results written in whole lines, if they go into the cache? Not where parameters are read along with rows
// that lie differently: those are read from where lines begin instead (AlignedParameters).
inline bool in_whole_lines(const Plan& plan, bool params) {
  if (plan.family == Family::channel || !params) return true;
  const Walk& rows = plan.y.set;
  return plan.elements >= kAlignedRun && rows.rank == 1 && rows.stride[0] % kLineBytes == 0;
}

// Runs of at least one pack and of no more than some, for which there are loops of known length: kPacks packs and one
// that ends with the run. Of four packs the parameters may stay in registers; loops that write one run after the other
// gain from more (group norm of 14 x 14: 10 % of its time), those that have much else to do do not (batch norm of 17 x
// 13 8 % longer, its backward 6).
constexpr int kShortPacks = 4;
constexpr int kAnyRun = -1;
inline bool is_short_run(int64_t n, int packs = kShortPacks) { return n >= kPack && n <= packs * kPack; }

// call(kPacks), a constant, of a run of n values; kAnyRun if it is no short one, or not to be taken for one.
template <int kMost = kShortPacks, class Call>
inline void with_short_run(bool allowed, int64_t n, const Call& call) {
  if (!allowed || !is_short_run(n, kMost)) return call(std::integral_constant<int, kAnyRun>{});
  with_constant<kMost>((n - 1) / kPack, call);
}

// result(i, place) of pack i of a short run, and of the last one, which is computed before anything is written.
template <int kPacks, class T, class Result>
FASTNORM_INLINE void write_short_run(T* p, int64_t n, const Result& result) {
  const Whole last{n - kPack};
  const auto tail = result(std::integral_constant<int, kPacks>{}, last);
  for_constants<kPacks>([&](auto i) {
    const Whole at{i * kPack};
    at.store(p, result(i, at));
  });
  last.store(p, tail);
}

// Stores formula(place) along a run of n results at p. One that goes into the cache begins and ends with whole packs,
// not with parts of them: some values are computed twice, from the operands as they were, should p be one. In
// whole lines of the cache, unless told to begin where the run does.
template <bool kPastCache, class T, class Formula>
FASTNORM_INLINE void write_run(T* p, int64_t n, const Formula& formula, bool whole_lines = true) {
  if constexpr (kPastCache)
    return for_aligned_packs(PastCacheToTheEnds{}, p, n, [&](auto at, auto out) { out.store(at, p, formula(at)); });
  if (n < kPack) return for_packs(n, [&](auto at) { at.store(p, formula(at)); });
  const int64_t begin = whole_lines && n >= kAlignedRun ? unaligned_values(p) : 0;
  const Whole first{0}, last{n - kPack};
  const auto tail = formula(last), head = begin > 0 ? formula(first) : tail;
  for (int64_t i = begin; i < last.start; i += kPack) Whole{i}.store(p, formula(Whole{i}));
  if (begin > 0) first.store(p, head);
  last.store(p, tail);
}

// The same with between() before every kLeaf results.
template <bool kPastCache, class T, class Formula, class Between>
FASTNORM_INLINE void write_run_between(T* p, int64_t n, const Formula& formula, bool whole_lines,
                                       const Between& between) {
  if (!kPastCache && n < kPack) return write_run<false>(p, n, formula);
  const bool aligned = kPastCache || (whole_lines && n >= kAlignedRun);
  const int64_t unaligned = aligned ? unaligned_values(p) : 0, begin = unaligned < n ? unaligned : n;
  const int64_t end = kPastCache ? begin + (n - begin) / kPack * kPack : n - kPack;
  const auto along = [&](const auto& store) {
    for (int64_t i = begin; i < end;) {
      between();
      for (const int64_t stop = end - i < kLeaf ? end : i + kLeaf; i < stop; i += kPack) store(Whole{i});
    }
  };
  if constexpr (kPastCache) {
    const auto store = [&](auto at) { PastCacheToTheEnds::store(at, p, formula(at)); };
    if (begin > 0) store(Partial{0, begin});
    along(store);
    if (end < n) store(Partial{end, n - end});
  } else {
    const Whole first{0}, last{end};
    const auto tail = formula(last), head = begin > 0 ? formula(first) : tail;
    along([&](Whole at) { at.store(p, formula(at)); });
    if (begin > 0) first.store(p, head);
    last.store(p, tail);
  }
}

// x - mean, in double.
template <class T>
class Centre {
 public:
  explicit Centre(const Statistic& s) : mean_(s.mean), mean_lo_(s.mean_lo), scale_(s.scale), exact_(s.mean_lo == 0) {}

  template <class At>
  FASTNORM_INLINE Pack<double> operator()(At at, const T* x) const {
    const Pack<double> v = at.template load<double>(x);
    if constexpr (!kMayOverflow<T>) return v - mean_;  // a double holds the mean of float32 data
    const Pack<double> scaled = v * scale_;
    return exact_ ? scaled - mean_ : less_mean(scaled, mean_, mean_lo_);
  }

 private:
  Pack<double> mean_, mean_lo_, scale_;
  bool exact_;
};

// Added to a number it leaves it as it is, be that -0.
constexpr double kNoBias = -0.0;

// Data are normalised as (x - pivot) * factor + offset, in their own type. For float32 the pivot is the float next to
// the mean, and the offset what that leaves of it: where that is more than a unit or two, the difference is exact.
struct FloatFactors {
  float pivot, factor, offset;

  // `shift`: a bias for all of the set, or kNoBias.
  FASTNORM_INLINE static FloatFactors of(double mean, double mean_lo, double factor, double shift) {
    const float pivot = static_cast<float>(mean);
    const double rest = (mean - static_cast<double>(pivot)) + mean_lo;
    return {pivot, static_cast<float>(factor), static_cast<float>(shift - rest * factor)};
  }
};

// For float64 the second step rounds once. The pivot is next to the mean (short_mean), or 0, from which nothing is
// lost, where the mean lies within a standard deviation of it, so that the offset is no larger than what it is added
// to.
struct SplitMean {
  double pivot, rest, rest_lo;

  // No branches: it is computed for several sets side by side.
  FASTNORM_INLINE static SplitMean of(const Statistic& s) {
    const double lo = std::fabs(s.mean_lo) * s.rstd < kNegligible ? 0 : s.mean_lo;
    const double distance = std::fabs(s.mean) * s.rstd;
    const double bounded = s.scale == 1 ? s.of_x : 0.0;  // nothing of x may overflow in a product
    const double near = distance <= 1 ? bounded : 0.0, next = short_mean(s.mean, s.rstd, s.of_x);
    const double pivot = near != 0 ? 0.0 : next;
    return {pivot, pivot == s.mean ? 0.0 : s.mean - pivot, lo};  // of a given mean that is infinite nothing is left
  }
  // (Two numbers: a TwoTerm that is handed on keeps loops over sets from being vectorised.)
  FASTNORM_INLINE double offset(double factor, double factor_lo, double shift) const {
    const TwoTerm product = two_product(rest, factor);
    return shift - (product.hi + (product.lo + (rest_lo * factor + rest * factor_lo)));
  }
};

// (rstd + rstd_lo) * weight.
FASTNORM_INLINE TwoTerm split_factor(double rstd, double rstd_lo, double weight) {
  const TwoTerm factor = two_product(rstd, weight);
  return {factor.hi, factor.lo + rstd_lo * weight};
}

// rstd * weight as one factor and the bias as a part of the offset save a rounding each, where they leave both in
// range.
FASTNORM_INLINE bool as_one_step(double rstd, double weight, double bias) {
  const double size = std::fabs(weight), factor = std::fabs(rstd * weight), shift = std::fabs(bias);
  const bool factor_fits = (size > 0x1p-300) & (size < 0x1p300) & (factor > 0x1p-900) & (factor < 0x1p900);
  const bool shift_fits = (shift > 0x1p-300) & (shift < 0x1p900);
  return ((weight == 0) | factor_fits) & ((bias == 0) | shift_fits);
}

// y = ((x - mean) * rstd * common + shift) * weight + bias: `common` is a weight for all values, or 1, and `shift` a
// bias for all of them, or kNoBias. Float32 data, in double.
template <class T, class C, class Weight, class Bias>
struct Normalise;

template <class Weight, class Bias>
struct Normalise<float, double, Weight, Bias> {
  Centre<float> centre;
  Pack<double> factor, shift;
  Weight weight;
  Bias bias;

  Normalise(const Statistic& s, double common, double more, Weight w, Bias b)
      : centre(s), factor(s.rstd * common), shift(more), weight(w), bias(b) {}

  template <class At>
  FASTNORM_INLINE Pack<double> operator()(At at, const float* x) const {
    return plus(at, times(at, centre(at, x) * factor + shift, weight), bias);
  }
};

// Float32 data, in float32; kCentred = false: with no mean.
template <bool kCentred, class Weight, class Bias>
struct FloatFormula {
  Pack<float> pivot, factor, offset;
  Weight weight;
  Bias bias;

  FloatFormula(const FloatFactors& f, Weight w, Bias b)
      : pivot(f.pivot), factor(f.factor), offset(f.offset), weight(w), bias(b) {}

  template <class At>
  FASTNORM_INLINE Pack<float> operator()(At at, const float* x) const {
    const Pack<float> v = at.template load<float>(x);
    return plus(at, times(at, kCentred ? (v - pivot) * factor + offset : v * factor, weight), bias);
  }
};

template <class Weight, class Bias>
struct Normalise<float, float, Weight, Bias> : FloatFormula<true, Weight, Bias> {
  Normalise(const Statistic& s, double common, double shift, Weight w, Bias b)
      : FloatFormula<true, Weight, Bias>(FloatFactors::of(s.mean, s.mean_lo, s.rstd * common, shift), w, b) {}
};

// d * (factor + factor_lo) + offset of float64 numbers, rounded once but for the offset: what d * factor_lo is rounded
// by is nothing.
FASTNORM_INLINE Pack<double> one_step(const Pack<double>& d, const Pack<double>& factor, const Pack<double>& factor_lo,
                                      const Pack<double>& offset) {
  return multiply_add(d, factor, d * factor_lo + offset);
}

// Float64 data, with a scale.
template <class Weight, class Bias>
struct Normalise<double, double, Weight, Bias> {
  Pack<double> scale, pivot, factor, factor_lo, offset;
  bool two_parts;
  Weight weight;
  Bias bias;

  Normalise(const Statistic& s, double common, double shift, Weight w, Bias b)
      : Normalise(s, SplitMean::of(s), split_factor(s.rstd, s.rstd_lo, common), shift, w, b) {}
  Normalise(const Statistic& s, const SplitMean& mean, const TwoTerm& by, double shift, Weight w, Bias b)
      : scale(s.scale),
        pivot(mean.pivot),
        factor(by.hi),
        factor_lo(by.lo),
        offset(mean.offset(by.hi, by.lo, shift)),
        two_parts(s.two_parts != 0),
        weight(w),
        bias(b) {}

  template <class At>
  FASTNORM_INLINE Pack<double> operator()(At at, const double* x) const {
    const Pack<double> d = at.template load<double>(x) * scale - pivot;
    const Pack<double> xhat = two_parts ? one_step(d, factor, factor_lo, offset) : multiply_add(d, factor, offset);
    return plus(at, times(at, xhat, weight), bias);
  }
};

// What the backward sums up: of g = dy * weight and of g * xhat, in double, which holds the products of float32 data.
template <class T, class At, class Weight>
FASTNORM_INLINE PackPair gradient_terms(At at, const T* x, const T* dy, const Centre<T>& centre,
                                        const Pack<double>& rstd, Weight weight) {
  const Pack<double> g = times(at, at.template load<double>(dy), weight);
  return {g, g * (centre(at, x) * rstd)};
}

// What the mean of g * xhat is to be taken for where rstd counts twice, in it and in an xhat it is multiplied with, and
// was rounded both times.
inline double both_parts(double mean_g_xhat, const Statistic& s) {
  return s.rstd_lo == 0 ? mean_g_xhat : mean_g_xhat + mean_g_xhat * (2 * s.rstd_lo / s.rstd);
}

// dx from x, dy and the two means.
template <class T, class C, class Weight>
struct InputGradient {
  Centre<T> centre;
  Pack<C> rstd, a, b, scale;
  Weight weight;

  InputGradient(const Statistic& s, double mean_g, double mean_g_xhat, Weight w)
      : centre(s),
        rstd(static_cast<C>(s.rstd)),
        a(static_cast<C>(mean_g)),
        b(static_cast<C>(both_parts(mean_g_xhat, s))),
        scale(static_cast<C>(s.scale)),
        weight(w) {}

  template <class At>
  FASTNORM_INLINE Pack<C> operator()(At at, const T* x, const T* dy) const {
    const Pack<C> dx = rstd * ((times(at, at.template load<C>(dy), weight) - a) - centre(at, x) * rstd * b);
    if constexpr (kMayOverflow<T>) return dx * scale;
    return dx;
  }
};

// x - mean in two parts, (x - value) + off. No float32 is nearer to the mean than the one next to it, so that neither
// part is larger than twice what they stand for.
template <class T>
struct Pivot {
  T value;
  double off;

  FASTNORM_INLINE static T next_to(double mean, double rstd, double of_x) {
    return kMayOverflow<T> ? static_cast<T>(short_mean(mean, rstd, of_x)) : static_cast<T>(mean);
  }
  static Pivot of(const Statistic& s) {
    const T value = next_to(s.mean, s.rstd, s.of_x);
    return {value, (static_cast<double>(value) - s.mean) - s.mean_lo};
  }
};

// What dx is made of about a pivot: b * rstd as one number saves a rounding, and what the pivot leaves of the mean is a
// part of a.
template <class T>
struct GradientFactors {
  T pivot, rstd, a, b;

  static GradientFactors of(const Pivot<T>& pivot, double rstd, double mean_g, double mean_g_xhat) {
    const double b = mean_g_xhat * rstd;
    return {pivot.value, static_cast<T>(rstd), static_cast<T>(mean_g + pivot.off * b), static_cast<T>(b)};
  }
};

template <class T, class Weight>
struct PivotGradient {
  Pack<T> pivot, rstd, a, b;
  Weight weight;

  PivotGradient(const GradientFactors<T>& factors, Weight w)
      : pivot(factors.pivot), rstd(factors.rstd), a(factors.a), b(factors.b), weight(w) {}
  PivotGradient(const Statistic& s, double mean_g, double mean_g_xhat, Weight w)
      : PivotGradient(GradientFactors<T>::of(Pivot<T>::of(s), s.rstd, mean_g, mean_g_xhat), w) {}

  template <class At>
  FASTNORM_INLINE Pack<T> operator()(At at, const T* x, const T* dy) const {
    const Pack<T> g = times(at, at.template load<T>(dy), weight);
    return rstd * ((g - a) - (at.template load<T>(x) - pivot) * b);
  }
};

template <class Weight>
struct InputGradient<float, float, Weight> : PivotGradient<float, Weight> {
  using PivotGradient<float, Weight>::PivotGradient;
};

// Through given statistics nothing but the scale comes back (and an infinite x leaves no trace).
template <class T, class Weight>
FASTNORM_LOOPS inline void input_gradient_constant(const T* dy, T* dx, int64_t n, const Statistic& s, Weight weight) {
  const Pack<double> rstd(s.rstd), scale(s.scale);
  for_packs(n, [&](auto at) {
    const Pack<double> scaled = rstd * times(at, at.template load<double>(dy), weight);
    at.store(dx, kMayOverflow<T> ? scaled * scale : scaled);
  });
}

// Lanes of a pack of a line of `width`, one value at a time: result[lane] = value(lane) where wrong(lane, number).
template <class T, class At, class Wrong, class Value>
[[gnu::noinline]] Pack<T> mend(At at, Pack<T> pack, int64_t width, const Wrong& wrong, const Value& value) {
  T lanes[kPack];
  std::memcpy(lanes, &pack, sizeof lanes);
  for (int64_t lane = 0; lane < kPack && at.start + lane < width; ++lane) {
    if (wrong(lane, lanes[lane])) lanes[lane] = value(lane);
  }
  std::memcpy(&pack, lanes, sizeof lanes);
  return pack;
}

// Results of float32 data, where they have overflowed on the way those of careful(), made in double.
template <bool kMends, class T, class Careful>
FASTNORM_INLINE Pack<T> mended(const Pack<T>& results, const Careful& careful) {
  if constexpr (kMends) {
    if (!all_finite(results)) {
      T others[kPack];
      Whole{0}.store(others, careful());
      const auto overflowed = [](int64_t, T number) { return !std::isfinite(number); };
      return mend(Whole{0}, results, kPack, overflowed, [&](int64_t lane) { return others[lane]; });
    }
  }
  return results;
}

// write(mends) writes results: first as if nothing would overflow, and where that was wrong once more; at once where
// results take the place of what they are made from. (Float64 is mended afterwards: bindings/wide_gradient.hpp.)
template <class T, class Write>
FASTNORM_INLINE void write_mending(bool in_place, const Write& write) {
  if constexpr (kMayOverflow<T>) {
    write(std::false_type{});
  } else {
    if (!in_place) {
      Overflow::clear();
      write(std::false_type{});
      if (!Overflow::any()) return;
    }
    write(std::true_type{});
  }
}

// The mean of |dy| decides whether dx of a row is computed in float32: added up in float32, for nothing but its size
// matters.
struct Size {
  Pack<float> sum = Pack<float>(0.0f);
  template <class At>
  FASTNORM_INLINE void add(At at, const float* dy) {
    sum += magnitude(at.template load<float>(dy));
  }
  template <class At>
  FASTNORM_INLINE void add(At, const double*) {}
  double total() const {
    float lanes[kPack];
    std::memcpy(lanes, &sum, sizeof lanes);
    return fold(Whole{0}.load<double>(lanes));
  }
};

}  // namespace
}  // namespace fastnorm
