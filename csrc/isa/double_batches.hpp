// Float64 sets of up to a chunk that are read in place, in batches (long rows of RMS norm one by one): the long chains
// of dependent operations that a statistic is (lane_statistics.hpp) run side by side, and what is read twice is still
// in a near cache.
#pragma once

#include "isa/batches.hpp"
#include "isa/lane_statistics.hpp"

namespace fastnorm {
namespace {

// Values of the sets of a batch, in one run each or in several (batch norm 14 x 14: 168 us with the larger number, 142
// with this; fewer long rows leave lanes of the statistics empty).
constexpr int64_t kRowsElements = 4096, kPlanesElements = 3072;

// Some sets, their sums, and what normalises them.
struct DoubleBatch {
  int64_t first = 0, count = 0;
  double two_parts = 0;      // as in Statistic
  bool plain = false;        // has no set a scale, or parameters that are not for one step?
  int64_t param[kMostSets];  // of a set's first weight and bias
  Pack<double> sum_lanes[kMostSets], squares_lanes[kMostSets];
  alignas(64) double pivot[kMostSets], sum[kMostSets], lost_sum[kMostSets], squares[kMostSets], lost_squares[kMostSets];
  double mean[kMostSets], mean_lo[kMostSets], var[kMostSets], rstd[kMostSets], rstd_lo[kMostSets];
  double near[kMostSets], fine[kMostSets], scale[kMostSets];
  double from[kMostSets], rest[kMostSets], rest_lo[kMostSets];  // SplitMean
  double weight[kMostSets], bias[kMostSets];                    // of sets of one of each for all values
  double factor[kMostSets], factor_lo[kMostSets], offset[kMostSets];

  void put(int64_t lane, const PackPair& lanes) {
    sum_lanes[lane] = lanes.first;
    squares_lanes[lane] = lanes.second;
  }
  void put(int64_t lane, const Pack<double>& squares) { squares_lanes[lane] = squares; }
  FASTNORM_INLINE Statistic statistic(int64_t lane) const {
    return {mean[lane], mean_lo[lane], rstd[lane], scale[lane], var[lane] > 0 ? 1.0 : 0.0, rstd_lo[lane], two_parts};
  }
  [[gnu::noinline]] void split_means(int64_t lanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const SplitMean split = SplitMean::of(statistic(lane));
      from[lane] = split.pivot;
      rest[lane] = split.rest;
      rest_lo[lane] = split.rest_lo;
      const TwoTerm by = split_factor(rstd[lane], rstd_lo[lane], weight[lane]);
      factor[lane] = by.hi;
      factor_lo[lane] = by.lo;
      offset[lane] = split.offset(by.hi, by.lo, bias[lane]);
    }
  }
};

// Normalise for sets that need no scale.
template <bool kCentred, class Weight, class Bias>
struct DoubleFormula {
  Pack<double> pivot, factor, factor_lo, offset;
  Weight weight;
  Bias bias;

  DoubleFormula(const DoubleBatch& batch, int64_t lane, Weight w, Bias b)
      : pivot(batch.from[lane]),
        factor(batch.factor[lane]),
        factor_lo(batch.factor_lo[lane]),
        offset(batch.offset[lane]),
        weight(w),
        bias(b) {}
  DoubleFormula(const SplitMean& mean, const TwoTerm& by, double shift, Weight w, Bias b)
      : pivot(mean.pivot),
        factor(by.hi),
        factor_lo(by.lo),
        offset(mean.offset(by.hi, by.lo, shift)),
        weight(w),
        bias(b) {}

  template <class At>
  FASTNORM_INLINE Pack<double> operator()(At at, const double* x) const {
    const Pack<double> v = at.template load<double>(x);
    return plus(at, times(at, kCentred ? one_step(v - pivot, factor, factor_lo, offset) : v * factor, weight), bias);
  }
};

class DoubleBatches {
 public:
  DoubleBatches(const Plan& plan, const NormArgs<double>& args, int64_t run)
      : plan_(plan),
        args_(args),
        run_(run),
        lines_(plan.elements / run),
        distance_(reading_ahead<double>(plan, plan.x, plan.whole.inner_size())),
        whole_lines_(in_whole_lines(plan, args.weight || args.bias)),
        one_run_(plan.whole.rank == 0 || (plan.whole.rank == 1 && plan.whole.stride[0] == sizeof(double))) {}

  // Can the sets be read in place? A weight per value wants all values in one run.
  static bool suit(const Plan& plan, int64_t run) {
    return run > 0 && moment_chunks(plan) == 1 && plan.x.segment.rank < 2 && plan.y.segment.rank < 2 &&
           (plan.family == Family::channel || run == plan.elements);
  }

  void forward(int64_t begin, int64_t end) const {
    args_.centred ? forward<true>(begin, end) : forward<false>(begin, end);
  }

 private:
  // Adds up a set that is one run, leaf by leaf.
  template <bool kCentred>
  class Coming {
   public:
    Coming(const double* x, int64_t n, int64_t distance) : x_(x), left_(n), distance_(distance) {}

    FASTNORM_INLINE void add_leaf() {
      if (left_ == 0) return;
      const int64_t n = left_ < kLeaf ? left_ : kLeaf;
      tree_.add_leaf(x_, n, distance_);
      x_ += n;
      left_ -= n;
    }
    FASTNORM_INLINE auto total() {
      while (left_ > 0) add_leaf();
      return tree_.total();
    }

   private:
    const double* x_;
    int64_t left_, distance_;
    DeviationTree<kCentred, AboutZero> tree_;
  };

  template <bool kCentred>
  void forward(int64_t begin, int64_t end) const {
    if (!kCentred && run_ >= kLongSquares && !args_.past_cache && !args_.bias) {
      if (args_.weight) return rows_one_by_one(begin, end, [&](int64_t p) { return Each<double>{args_.weight + p}; });
      return rows_one_by_one(begin, end, [](int64_t) { return None{}; });
    }
    for_batches<DoubleBatch>(
        plan_, one_run_ ? kRowsElements : kPlanesElements, begin, end,
        [&](DoubleBatch& batch) { measure<kCentred>(batch); }, [&](DoubleBatch& batch) { finish(batch); },
        [&](const DoubleBatch& now, DoubleBatch& next) {
          if (now.plain) return with_parameters<kCentred>(now, next);
          for (int64_t lane = 0; lane < now.count; ++lane) normalise_units(now.first + lane, now.statistic(lane));
          measure<kCentred>(next);
        });
  }

  [[gnu::noinline]] void normalise_units(int64_t set, const Statistic& s) const {
    for (int64_t unit = 0; unit < units_per_set(plan_); ++unit) normalise_unit(plan_, args_, run_, set, unit, s);
  }

  // Rows of RMS norm, each written between the leaves of the next (512 x 768: 95 us to 79). Statistics with a mean take
  // too long for this.
  template <class WeightOf>
  [[gnu::noinline]] FASTNORM_LOOPS void rows_one_by_one(int64_t begin, int64_t end, const WeightOf& weight_of) const {
    Offsets xs(plan_.x.set, begin), ys(plan_.y.set, begin), params(plan_.set_param, begin);
    const auto next_x = [&] { return reinterpret_cast<const double*>(plan_.x.data + xs.next()); };
    const double* x = next_x();
    Pack<double> squares = Coming<false>(x, run_, distance_).total();
    for (int64_t set = begin; set < end; ++set) {
      const double* const coming_x = set + 1 < end ? next_x() : nullptr;
      double* const y = reinterpret_cast<double*>(plan_.y.data + ys.next());
      const auto weight = weight_of(params.next());
      const Statistic s = finish_row(set, fold_exactly(squares));
      Coming<false> coming(coming_x, coming_x ? run_ : 0, distance_);
      if (s.scale == 1) {
        const DoubleFormula<false, std::decay_t<decltype(weight)>, None> formula(SplitMean{}, TwoTerm{s.rstd, 0},
                                                                                 kNoBias, weight, None{});
        write_run_between<false>(
            y, run_, [&](auto at) { return formula(at, x); }, whole_lines_, [&] { coming.add_leaf(); });
      } else {
        normalise_units(set, s);
      }
      squares = coming.total();
      x = coming_x;
    }
  }

  [[gnu::noinline]] Statistic finish_row(int64_t set, const TwoTerm& squares) const {
    Moments moments;
    moments.count = static_cast<double>(run_);
    moments.m2.hi = squares.hi, moments.m2.lo = squares.lo;
    return finish_set(plan_, args_, set, moments);
  }

  const double* run_of(int64_t set) const {
    return reinterpret_cast<const double*>(plan_.x.data + plan_.x.set.offset(set));
  }

  // ---- statistics

  template <bool kCentred>
  FASTNORM_LOOPS void measure(DoubleBatch& batch) const {
    for (int64_t lane = 0; lane < batch.count; ++lane) measure<kCentred>(batch, lane);
  }
  template <bool kCentred>
  FASTNORM_LOOPS void measure(DoubleBatch& batch, int64_t lane) const {
    const int64_t set = batch.first + lane;
    DeviationTree<kCentred, AboutZero> tree;
    if (one_run_) {
      tree.add_run(run_of(set), plan_.set_size(), distance_);
    } else {
      for_set_runs(plan_, set, 0, [&](const double* x, int64_t n) { tree.add_run(x, n, distance_); });
    }
    batch.put(lane, tree.total());
  }

  // What measure_chunk and finish_set do, for all sets of a batch.
  void finish(DoubleBatch& batch) const {
    const int64_t lanes = (batch.count + kStatisticLanes - 1) / kStatisticLanes * kStatisticLanes;
    for (int64_t lane = batch.count; lane < lanes; ++lane) batch.put(lane, PackPair{1.0, 1.0});
    for (int64_t lane = 0; lane < lanes; lane += kStatisticLanes) {
      if (args_.centred) {
        fold_eight_exactly(batch.sum_lanes + lane, batch.sum + lane, batch.lost_sum + lane);
      }
      fold_eight_exactly(batch.squares_lanes + lane, batch.squares + lane, batch.lost_squares + lane);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      batch.pivot[lane] = 0;
      batch.scale[lane] = batch.weight[lane] = 1;
      batch.bias[lane] = kNoBias;
      if (!args_.centred) batch.sum[lane] = batch.lost_sum[lane] = 0;
    }
    finish_lanes(batch, 0, lanes);
    if (args_.centred && !all_ones(batch.near, batch.count)) {
      for (int64_t lane = 0; lane < lanes; lane += kStatisticLanes) measure_about_means(batch, lane);
    }
    batch.plain = true;
    batch.two_parts = args_.centred ? 1 : 0;
    store_numbers(plan_, batch, batch.mean, args_.mean);
    store_numbers(plan_, batch, batch.mean_lo, args_.mean_lo);
    store_numbers(plan_, batch, batch.var, args_.var);
    store_numbers(plan_, batch, batch.rstd, args_.rstd);
    store_numbers(plan_, batch, batch.rstd_lo, args_.rstd_lo);
    find_parameters(plan_, batch);
    if (!all_ones(batch.near, batch.count) || !all_ones(batch.fine, batch.count)) {
      for (int64_t lane = 0; lane < batch.count; ++lane) {
        if (batch.near[lane] * batch.fine[lane] == 0) measure_alone(batch, lane);
      }
    }
    if (plan_.family == Family::channel) take_parameters(batch);
    if (batch.plain) batch.split_means(lanes);
  }

  void finish_lanes(DoubleBatch& batch, int64_t first, int64_t lanes) const {
    const double count = static_cast<double>(plan_.set_size());
    fastnorm::finish_lanes({batch.pivot + first, batch.sum + first, batch.lost_sum + first, batch.squares + first,
                            batch.lost_squares + first},
                           {batch.mean + first, batch.mean_lo + first, batch.var + first, batch.rstd + first,
                            batch.rstd_lo + first, batch.near + first, batch.fine + first},
                           lanes, count, args_.eps, kMostSquaresOfSet);
  }

  static bool all_ones(const double* ones_and_zeros, int64_t count) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += ones_and_zeros[i];
    return sum == static_cast<double>(count);
  }

  // The second reading of those of eight sets that want one.
  void measure_about_means(DoubleBatch& batch, int64_t first) const {
    bool any = false;
    for (int64_t lane = first; lane < first + kStatisticLanes && lane < batch.count; ++lane) {
      if (batch.near[lane] != 0) continue;
      Sum sum, squares;
      batch.pivot[lane] = short_mean_of(batch.mean[lane], batch.var[lane]);
      chunk_deviations<true>(plan_, batch.first + lane, 0, About(batch.pivot[lane]), sum, squares);
      batch.sum[lane] = sum.hi, batch.lost_sum[lane] = sum.lo;
      batch.squares[lane] = squares.hi, batch.lost_squares[lane] = squares.lo;
      any = true;
    }
    if (any) finish_lanes(batch, first, kStatisticLanes);
  }

  // By blocks, or with a scale.
  [[gnu::noinline]] void measure_alone(DoubleBatch& batch, int64_t lane) const {
    const int64_t set = batch.first + lane;
    Moments moments = measure_chunk(plan_, set, 0, args_.centred);
    const Statistic s = finish_set(plan_, args_, set, moments);
    batch.mean[lane] = s.mean, batch.mean_lo[lane] = s.mean_lo;
    batch.rstd[lane] = s.rstd, batch.rstd_lo[lane] = s.rstd_lo;
    batch.scale[lane] = s.scale;
    batch.var[lane] = moments.m2.value() / moments.count;
    batch.plain = batch.plain && s.scale == 1;
  }

  // Sets whose parameters do not go into the one step are normalised one by one.
  void take_parameters(DoubleBatch& batch) const {
    if (!(args_.weight || args_.bias)) return;
    for (int64_t lane = 0; lane < batch.count; ++lane) {
      const int64_t param = batch.param[lane];
      if (plan_.segments == 1) {
        batch.weight[lane] = weight(param);
        batch.bias[lane] = bias(param);
      }
      for (int64_t segment = 0; segment < plan_.segments; ++segment) {
        const bool plain = as_one_step(batch.rstd[lane], weight(param + segment), bias(param + segment));
        batch.plain = batch.plain && plain;
      }
    }
  }
  double weight(int64_t param) const { return args_.weight ? args_.weight[param] : 1; }
  double bias(int64_t param) const { return args_.bias ? args_.bias[param] : kNoBias; }

  // ---- results

  template <bool kCentred>
  void with_parameters(const DoubleBatch& now, DoubleBatch& next) const {
    const double *w = args_.weight, *b = args_.bias;
    const auto none = [](int64_t) { return None{}; };
    const auto weights = [w](int64_t param) { return Each<double>{w + param}; };
    const auto biases = [b](int64_t param) { return Each<double>{b + param}; };
    if (plan_.family == Family::channel) {
      normalise<kCentred>(now, next, none, none);
    } else if (w && b) {
      normalise<kCentred>(now, next, weights, biases);
    } else if (w) {
      normalise<kCentred>(now, next, weights, none);
    } else if (b) {
      normalise<kCentred>(now, next, none, biases);
    } else {
      normalise<kCentred>(now, next, none, none);
    }
  }

  // Normalises one batch and measures the next: in the same loops where sets are short, or where results are stored
  // past the cache and arithmetic hides what memory takes; else one after the other (layer norm 512 x 768: 115 us to
  // 103).
  template <bool kCentred, class WeightOf, class BiasOf>
  void normalise(const DoubleBatch& now, DoubleBatch& next, const WeightOf& weight_of, const BiasOf& bias_of) const {
    if (one_run_ && plan_.segments == 1 && lines_ == 1) {
      normalise_runs<kCentred>(now, next, weight_of, bias_of);
    } else {
      normalise_segments<kCentred>(now, next, weight_of, bias_of);
    }
  }

  template <bool kCentred, class WeightOf, class BiasOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_runs(const DoubleBatch& now, DoubleBatch& next,
                                                       const WeightOf& weight_of, const BiasOf& bias_of) const {
    const int64_t n = run_;
    const bool past_cache = args_.past_cache, in_turn = n > kLeaf && !past_cache;
    Offsets x_offsets(plan_.x.set, now.first), y_offsets(plan_.y.set, now.first);
    Offsets coming_offsets(plan_.x.set, next.first);
    for (int64_t lane = 0; lane < now.count; ++lane) {
      const int64_t param = now.param[lane];
      const auto w = weight_of(param);
      const auto b = bias_of(param);
      const DoubleFormula<kCentred, decltype(w), decltype(b)> formula(now, lane, w, b);
      const double* const x = reinterpret_cast<const double*>(plan_.x.data + x_offsets.next());
      double* const y = reinterpret_cast<double*>(plan_.y.data + y_offsets.next());
      const double* const coming_x = reinterpret_cast<const double*>(plan_.x.data + coming_offsets.next());
      if (past_cache && lane < next.count) {
        Coming<kCentred> coming(coming_x, n, distance_);
        write_line(x, y, formula, [&] { coming.add_leaf(); });
        next.put(lane, coming.total());
      } else {
        if (!past_cache && !in_turn && lane < next.count) {
          next.put(lane, DeviationTree<kCentred, AboutZero>().leaf(coming_x, n));
        }
        write_line(x, y, formula, [] {});
      }
    }
    if (in_turn) measure<kCentred>(next);
  }

  template <bool kCentred, class WeightOf, class BiasOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_segments(const DoubleBatch& now, DoubleBatch& next,
                                                           const WeightOf& weight_of, const BiasOf& bias_of) const {
    for (int64_t lane = 0; lane < now.count; ++lane) {
      if (one_run_ && args_.past_cache && lane < next.count) {
        Coming<kCentred> coming(run_of(next.first + lane), plan_.set_size(), distance_);
        normalise_set<kCentred>(now, lane, weight_of, bias_of, [&] { coming.add_leaf(); });
        next.put(lane, coming.total());
      } else {
        normalise_set<kCentred>(now, lane, weight_of, bias_of, [] {});
      }
    }
    if (!(one_run_ && args_.past_cache)) measure<kCentred>(next);
  }

  // Past the cache, between() comes before every kLeaf values.
  template <bool kCentred, class WeightOf, class BiasOf, class Between>
  FASTNORM_INLINE void normalise_set(const DoubleBatch& now, int64_t lane, const WeightOf& weight_of,
                                     const BiasOf& bias_of, const Between& between) const {
    const SplitMean mean{now.from[lane], now.rest[lane], now.rest_lo[lane]};
    const int64_t set = now.first + lane;
    const SegmentLines<double> from(plan_.x, set, run_), to(plan_.y, set, run_);
    const bool by_segment = plan_.family == Family::channel;
    const char* x_segment = from.base;
    char* y_segment = to.base;
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      const int64_t param = now.param[lane] + segment;
      const auto w = weight_of(param);
      const auto b = bias_of(param);
      const TwoTerm factor = split_factor(now.rstd[lane], now.rstd_lo[lane], by_segment ? weight(param) : 1);
      const DoubleFormula<kCentred, decltype(w), decltype(b)> formula(mean, factor, by_segment ? bias(param) : kNoBias,
                                                                      w, b);
      const char* x_line = x_segment;
      char* y_line = y_segment;
      for (int64_t line = 0; line < lines_; ++line) {
        write_line(reinterpret_cast<const double*>(x_line), reinterpret_cast<double*>(y_line), formula, between);
        x_line += from.line_step;
        y_line += to.line_step;
      }
      x_segment += from.segment_step;
      y_segment += to.segment_step;
    }
  }

  template <class Formula, class Between>
  FASTNORM_INLINE void write_line(const double* x, double* y, const Formula& formula, const Between& between) const {
    const auto result = [&](auto at) { return formula(at, x); };
    if (!args_.past_cache) return write_run<false>(y, run_, result, whole_lines_);
    write_run_between<true>(y, run_, result, true, between);
  }

  const Plan& plan_;
  const NormArgs<double>& args_;
  const int64_t run_, lines_;
  const int64_t distance_;
  const bool whole_lines_;  // of the cache are written
  const bool one_run_;
};

}  // namespace
}  // namespace fastnorm
