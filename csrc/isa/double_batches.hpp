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
// The same where results and the next sets are asked for (kNearestCacheBytes): 4096 took 5 % more, 800 as well.
constexpr int64_t kAskedElements = 1600;

// As kLongSquares. (64 x 256: 4.6 us one by one, 3.8 in batches; 512 x 512: 56 and 67.)
constexpr int64_t kLongDoubleSquares = 512;

// As FloatFactors: (x - pivot) * (factor + factor_lo) + offset.
struct DoubleFactors {
  double pivot, factor, factor_lo, offset;
};

// Some sets, their sums, and what normalises them.
struct DoubleBatch : PlacedSets {
  double two_parts = 0;      // as in Statistic
  bool plain = false;        // has no set a scale, or parameters that are not for one step?
  int64_t param[kMostSets];  // of a set's first weight and bias
  HalfPack sum_lanes[kMostSets], squares_lanes[kMostSets];
  HalfPack lost_sum_lanes[kMostSets], lost_squares_lanes[kMostSets];  // of sets that are more than a leaf
  alignas(64) double pivot[kMostSets], sum[kMostSets], lost_sum[kMostSets], squares[kMostSets], lost_squares[kMostSets];
  double mean[kMostSets], mean_lo[kMostSets], var[kMostSets], rstd[kMostSets], rstd_lo[kMostSets];
  double near[kMostSets], fine[kMostSets], scale[kMostSets];
  double from[kMostSets], rest[kMostSets], rest_lo[kMostSets];  // SplitMean
  SetParameters weight{1}, bias{kNoBias};
  double factor[kMostSets], factor_lo[kMostSets], offset[kMostSets];

  template <bool kCentred>
  FASTNORM_INLINE void put(int64_t lane, const Deviations<kCentred, AboutZero>& of, bool one_leaf) {
    if (kCentred) sum_lanes[lane] = of.sum.sum;
    squares_lanes[lane] = of.squares.sum;
    if (one_leaf) return;
    if (kCentred) lost_sum_lanes[lane] = of.sum.lost;
    lost_squares_lanes[lane] = of.squares.lost;
  }
  FASTNORM_INLINE Statistic statistic(int64_t lane) const {
    return {mean[lane], mean_lo[lane], rstd[lane], scale[lane], var[lane] > 0 ? 1.0 : 0.0, rstd_lo[lane], two_parts};
  }
  FASTNORM_INLINE DoubleFactors factors(int64_t lane) const {
    return {from[lane], factor[lane], factor_lo[lane], offset[lane]};
  }
  [[gnu::noinline]] void split_means(int64_t lanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const SplitMean split = SplitMean::of(statistic(lane));
      from[lane] = split.pivot;
      rest[lane] = split.rest;
      rest_lo[lane] = split.rest_lo;
      const TwoTerm by = split_factor(rstd[lane], rstd_lo[lane], weight.of[lane]);
      factor[lane] = by.hi;
      factor_lo[lane] = by.lo;
      offset[lane] = split.offset(by.hi, by.lo, bias.of[lane]);
    }
  }
};

// Normalise for sets that need no scale.
template <bool kCentred, class Weight, class Bias>
struct DoubleFormula {
  Pack<double> pivot, factor, factor_lo, offset;
  Weight weight;
  Bias bias;

  DoubleFormula(const DoubleFactors& f, Weight w, Bias b)
      : pivot(f.pivot), factor(f.factor), factor_lo(f.factor_lo), offset(f.offset), weight(w), bias(b) {}

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
        distance_(asking_ahead(plan)),
        whole_lines_(in_whole_lines(plan, args.weight || args.bias)),
        one_run_(plan.whole.rank == 0 || (plan.whole.rank == 1 && plan.whole.stride[0] == sizeof(double))),
        x_run_(length_of_runs(plan)),
        one_leaf_(one_run_ && plan.set_size() <= kLeaf),
        asks_(plan.in_last_cache && one_leaf_ && lines_ == 1 && plan.segments == 1 && !args.past_cache),
        short_runs_(may_have_short_runs(plan, args)),
        ordinary_parameters_(has_ordinary_parameters(plan, args)) {}

  // Can the sets be read in place? A weight per value wants all values in one run.
  static bool suit(const Plan& plan, int64_t run) {
    return run > 0 && moment_chunks(plan) == 1 && plan.x.segment.rank < 2 && plan.y.segment.rank < 2 &&
           (plan.family == Family::channel || run == plan.elements);
  }

  void forward(int64_t begin, int64_t end) const {
    args_.centred ? forward<true>(begin, end) : forward<false>(begin, end);
  }

 private:
  // What sets in place are asked for ahead: a few lines, or the next of a set's short runs (batch norm 7 x 7, 14 x 14:
  // 1 to 3 % less time; a few lines, most of which are beyond the run, took 5 to 7 % more).
  static int64_t asking_ahead(const Plan& plan) {
    const int64_t distance = reading_ahead<double>(plan, plan.x, plan.whole.inner_size());
    if (distance != 0) return distance;
    const int64_t run_bytes = plan.whole.inner_size() * static_cast<int64_t>(sizeof(double));
    return plan.whole.rank > 1 && run_bytes < kNearAheadBytes ? plan.whole.stride[0] : kNearAheadBytes;
  }

  // Adds up a set that is one run, leaf by leaf.
  template <bool kCentred>
  class Coming {
   public:
    Coming(const double* x, int64_t n, int64_t distance) : x_(x), left_(n), distance_(distance) {}

    FASTNORM_INLINE void add_leaf() {
      if (left_ == 0) return;
      const int64_t n = left_ < kLeaf ? left_ : kLeaf;
      all_.add_leaf_asking(x_, n, distance_);
      x_ += n;
      left_ -= n;
    }
    FASTNORM_INLINE const Deviations<kCentred, AboutZero>& all() {
      while (left_ > 0) add_leaf();
      return all_;
    }

   private:
    const double* x_;
    int64_t left_, distance_;
    Deviations<kCentred, AboutZero> all_;
  };

  template <bool kCentred>
  void forward(int64_t begin, int64_t end) const {
    if (!kCentred && run_ >= kLongDoubleSquares && !args_.past_cache && !args_.bias) {
      if (args_.weight) return rows_one_by_one(begin, end, [&](int64_t p) { return Each<double>{args_.weight + p}; });
      return rows_one_by_one(begin, end, [](int64_t) { return None{}; });
    }
    const int64_t elements = one_run_ ? kRowsElements : kPlanesElements;
    for_batches<DoubleBatch>(
        plan_, asks_ ? kAskedElements : elements, begin, end, [&](DoubleBatch& batch) { measure<kCentred>(batch); },
        [&](DoubleBatch& batch) { finish(batch); },
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
    TwoTerm squares = Coming<false>(x, run_, distance_).all().squares.total();
    for (int64_t set = begin; set < end; ++set) {
      const double* const coming_x = set + 1 < end ? next_x() : nullptr;
      double* const y = reinterpret_cast<double*>(plan_.y.data + ys.next());
      const auto weight = weight_of(params.next());
      const Statistic s = finish_row(set, squares);
      Coming<false> coming(coming_x, coming_x ? run_ : 0, distance_);
      if (s.scale == 1) {
        const DoubleFormula<false, std::decay_t<decltype(weight)>, None> formula({0, s.rstd, 0, 0}, weight, None{});
        write_run_between<false>(
            y, run_, [&](auto at) { return formula(at, x); }, whole_lines_, [&] { coming.add_leaf(); });
      } else {
        normalise_units(set, s);
      }
      squares = coming.all().squares.total();
      x = coming_x;
    }
  }

  [[gnu::noinline]] Statistic finish_row(int64_t set, const TwoTerm& squares) const {
    Moments moments;
    moments.count = static_cast<double>(run_);
    moments.m2.hi = squares.hi, moments.m2.lo = squares.lo;
    return finish_set(plan_, args_, set, moments);
  }

  static int64_t length_of_runs(const Plan& plan) {
    const Walk& whole = plan.whole;
    if (!runs_in_place(plan)) return 0;
    return whole.rank == 0 ? 1 : whole.inner_size();
  }

  // ---- statistics

  template <bool kCentred>
  void measure(DoubleBatch& batch) const {
    if (x_run_ == 0) {
      for (int64_t lane = 0; lane < batch.count; ++lane) measure_pieces<kCentred>(batch, lane);
      return;
    }
    with_leaf_shape((x_run_ - 1) % kLeaf + 1, [&](auto packs, auto has_rest) {
      one_leaf_ ? measure_leaves<kCentred>(batch, packs, has_rest) : measure_runs<kCentred>(batch, packs, has_rest);
    });
  }
  template <bool kCentred>
  [[gnu::noinline]] FASTNORM_LOOPS void measure_pieces(DoubleBatch& batch, int64_t lane) const {
    const int64_t distance = reading_ahead<double>(plan_, plan_.x, plan_.whole.inner_size());
    Deviations<kCentred, AboutZero> all;
    for_set_runs(plan_, batch.first + lane, 0, [&](const double* x, int64_t n) { all.add_run(x, n, distance); });
    batch.put(lane, all, false);
  }
  // Sets that are a leaf each.
  template <bool kCentred, class Packs, class HasRest>
  [[gnu::noinline]] FASTNORM_LOOPS void measure_leaves(DoubleBatch& batch, Packs packs, HasRest has_rest) const {
    const int64_t rest = x_run_ % kPack, distance = distance_, count = batch.count;
    const bool asks = asks_;
    const SetPlaces::View xs = batch.x.view(), ys = batch.y.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      const double* const x = reinterpret_cast<const double*>(xs[lane]);
      Deviations<kCentred, AboutZero> all;
      ask_for<packs + has_rest>(x, asks ? bytes_between(x, ys[lane]) : distance);
      all.add_leaf(x, packs, has_rest, rest);
      batch.put(lane, all, true);
    }
  }
  template <bool kCentred, class Packs, class HasRest>
  [[gnu::noinline]] FASTNORM_LOOPS void measure_runs(DoubleBatch& batch, Packs packs, HasRest has_rest) const {
    const int64_t count = batch.count;
    const SetPlaces::View xs = batch.x.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      Deviations<kCentred, AboutZero> all;
      add_runs(all, xs[lane], packs, has_rest);
      batch.put(lane, all, false);
    }
  }
  // Those of a set that is runs of one length, each of whose last leaves is of a known shape.
  template <class All, class Packs, class HasRest>
  FASTNORM_INLINE void add_runs(All& all, const char* run, Packs packs, HasRest has_rest) const {
    const int64_t before_last = (x_run_ - 1) / kLeaf * kLeaf, rest = x_run_ % kPack, distance = distance_;
    const int64_t runs = plan_.set_size() / x_run_, step = runs > 1 ? plan_.whole.stride[0] : 0;
    for (int64_t i = 0; i < runs; ++i, run += step) {
      const double* x = reinterpret_cast<const double*>(run);
      for (const double* const last = x + before_last; x < last; x += kLeaf) all.add_leaf_asking(x, kLeaf, distance);
      ask_for<packs + has_rest>(x, distance);
      all.add_leaf(x, packs, has_rest, rest);
    }
  }

  // What measure_chunk and finish_set do, for all sets of a batch.
  void finish(DoubleBatch& batch) const {
    const int64_t lanes = (batch.count + kStatisticLanes - 1) / kStatisticLanes * kStatisticLanes;
    one_leaf_ ? fold<false>(batch, lanes) : fold<true>(batch, lanes);
    for (int64_t lane = 0; lane < lanes; ++lane) batch.pivot[lane] = 0, batch.scale[lane] = 1;
    for (int64_t lane = 0; !args_.centred && lane < lanes; ++lane) batch.sum[lane] = batch.lost_sum[lane] = 0;
    finish_lanes(batch, 0, lanes);
    if (args_.centred && !all_ones(batch.near, batch.count)) measure_about_means(batch);
    batch.plain = true;
    batch.two_parts = args_.centred ? 1 : 0;
    store_numbers(plan_, batch, batch.mean, args_.mean);
    store_numbers(plan_, batch, batch.mean_lo, args_.mean_lo);
    store_numbers(plan_, batch, batch.var, args_.var);
    store_numbers(plan_, batch, batch.rstd, args_.rstd);
    store_numbers(plan_, batch, batch.rstd_lo, args_.rstd_lo);
    load_parameters(plan_, args_, batch);
    if (!all_ones(batch.near, batch.count) || !all_ones(batch.fine, batch.count)) {
      for (int64_t lane = 0; lane < batch.count; ++lane) {
        if (batch.near[lane] * batch.fine[lane] == 0) measure_alone(batch, lane);
      }
    }
    if (plan_.family == Family::channel) judge_parameters(batch);
    if (batch.plain) batch.split_means(lanes);
  }

  template <bool kLost>
  void fold(DoubleBatch& batch, int64_t lanes) const {
    for (int64_t lane = batch.count; lane < lanes; ++lane) {  // those without a set get the sums of the first one
      if (args_.centred) batch.sum_lanes[lane] = batch.sum_lanes[0];
      batch.squares_lanes[lane] = batch.squares_lanes[0];
      if (kLost && args_.centred) batch.lost_sum_lanes[lane] = batch.lost_sum_lanes[0];
      if (kLost) batch.lost_squares_lanes[lane] = batch.lost_squares_lanes[0];
    }
    for (int64_t lane = 0; lane < lanes; lane += kStatisticLanes) {
      if (args_.centred) {
        fold_eight_exactly<kLost>(batch.sum_lanes + lane, batch.lost_sum_lanes + lane, batch.sum + lane,
                                  batch.lost_sum + lane);
      }
      fold_eight_exactly<kLost>(batch.squares_lanes + lane, batch.lost_squares_lanes + lane, batch.squares + lane,
                                batch.lost_squares + lane);
    }
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

  // The second reading of sets that want one.
  void measure_about_means(DoubleBatch& batch) const {
    if (x_run_ == 0) {
      return about_means(batch, [&](int64_t lane, Sum& sum, Sum& squares) {
        chunk_deviations<true>(plan_, batch.first + lane, 0, About(batch.pivot[lane]), sum, squares);
      });
    }
    with_leaf_shape((x_run_ - 1) % kLeaf + 1, [&](auto packs, auto has_rest) {
      about_means(batch, [&](int64_t lane, Sum& sum, Sum& squares) FASTNORM_LOOPS {
        Deviations<true, About> all(About(batch.pivot[lane]));
        add_runs(all, batch.x.view()[lane], packs, has_rest);
        sum = sum_of(all.sum.total());
        squares = sum_of(all.squares.total());
      });
    });
  }
  template <class Measure>
  [[gnu::noinline]] void about_means(DoubleBatch& batch, const Measure& measure) const {
    for (int64_t first = 0; first < batch.count; first += kStatisticLanes) {
      bool any = false;
      for (int64_t lane = first; lane < first + kStatisticLanes && lane < batch.count; ++lane) {
        if (batch.near[lane] != 0) continue;
        Sum sum, squares;
        batch.pivot[lane] = short_mean_of(batch.mean[lane], batch.var[lane]);
        measure(lane, sum, squares);
        batch.sum[lane] = sum.hi, batch.lost_sum[lane] = sum.lo;
        batch.squares[lane] = squares.hi, batch.lost_squares[lane] = squares.lo;
        any = true;
      }
      if (any) finish_lanes(batch, first, kStatisticLanes);
    }
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
  void judge_parameters(DoubleBatch& batch) const {
    if (!(args_.weight || args_.bias)) return;
    if (ordinary_parameters_ && all_ordinary(batch.rstd, batch.count, 0)) return;
    for (int64_t lane = 0; lane < batch.count; ++lane) {
      for (int64_t param = batch.param[lane]; param < batch.param[lane] + plan_.segments; ++param) {
        const bool plain = as_one_step(batch.rstd[lane], weight(param), bias(param));
        batch.plain = batch.plain && plain;
      }
    }
  }
  // Parameters that as_one_step asks nothing more of, whatever set they belong to, if its rstd is ordinary.
  static constexpr int64_t kMostParameters = 1024;
  static bool has_ordinary_parameters(const Plan& plan, const NormArgs<double>& args) {
    if (plan.family != Family::channel || plan.params > kMostParameters) return false;
    return (!args.weight || all_ordinary(args.weight, plan.params, 1)) &&
           (!args.bias || all_ordinary(args.bias, plan.params, 1));
  }
  static bool all_ordinary(const double* numbers, int64_t count, double zero) {  // zero: 1 if zeros are, else 0
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const double size = std::fabs(numbers[i]);
      sum += size == 0 ? zero : (size > 0x1p-300 ? 1.0 : 0.0) * (size < 0x1p300 ? 1.0 : 0.0);
    }
    return sum == static_cast<double>(count);
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
    const bool one_line = one_run_ && plan_.segments == 1 && lines_ == 1;
    if (kCentred && !one_line) {
      with_short_run<16>(short_runs_, run_, [&](auto packs) { normalise_planes<packs>(now, next); });
    } else if (plan_.family == Family::channel) {
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

  // Normalises one batch of sets of a line each and measures the next: in the same loops where results are stored past
  // the cache and arithmetic hides what memory takes; else one after the other (layer norm 512 x 768: 115 us to 103).
  template <bool kCentred, class WeightOf, class BiasOf>
  void normalise(const DoubleBatch& now, DoubleBatch& next, const WeightOf& weight_of, const BiasOf& bias_of) const {
    if (args_.past_cache) return normalise_past_cache<kCentred>(now, next, weight_of, bias_of);
    with_short_run(short_runs_, run_, [&](auto packs) {
      if constexpr (packs == kAnyRun) {
        normalise_runs<kCentred>(now, next, weight_of, bias_of);
      } else {
        normalise_short_runs<kCentred, packs>(now, next, weight_of(0), bias_of(0));
      }
      measure<kCentred>(next);
    });
  }

  // May the parameters of short runs stay in registers, being the same for all of them?
  static bool may_have_short_runs(const Plan& plan, const NormArgs<double>& args) {
    return (plan.family == Family::channel || plan.params == plan.params_per_set) && !args.past_cache;
  }
  template <bool kCentred, int kPacks, class Weight, class Bias>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_short_runs(const DoubleBatch& now, const DoubleBatch& next, Weight w,
                                                             Bias b) const {
    decltype(held(Whole{}, w)) weight[kPacks + 1];
    decltype(held(Whole{}, b)) bias[kPacks + 1];
    for_constants<kPacks + 1>([&](auto i) {
      const Whole at{i < kPacks ? i * kPack : run_ - kPack};
      weight[i] = held(at, w), bias[i] = held(at, b);
    });
    const int64_t n = run_, count = now.count;
    const int64_t asked = asks_ ? next.count : 0;
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      const double* const x = reinterpret_cast<const double*>(xs[lane]);
      if (lane < asked) ask_for<kPacks + 1>(reinterpret_cast<const double*>(next_xs[lane]), 0);
      const DoubleFormula<kCentred, None, None> xhat(now.factors(lane), None{}, None{});
      write_short_run<kPacks>(reinterpret_cast<double*>(ys[lane]), n,
                              [&](auto i, Whole at) { return plus(at, times(at, xhat(at, x), weight[i]), bias[i]); });
    }
  }

  // What a row needs is in variables of the function: what is reached through pointers would be read again for every
  // row, for all that a compiler knows of what results overwrite (rows of 96: 23.5 ns each to 20.5).
  template <bool kCentred, class WeightOf, class BiasOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_runs(const DoubleBatch& now, const DoubleBatch& next,
                                                       WeightOf weight_of, BiasOf bias_of) const {
    const int64_t n = run_, count = now.count, asked = asks_ ? next.count : 0;
    const bool whole_lines = whole_lines_;
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      const auto w = weight_of(now.param[lane]);
      const auto b = bias_of(now.param[lane]);
      const DoubleFormula<kCentred, decltype(w), decltype(b)> formula(now.factors(lane), w, b);
      const double* const x = reinterpret_cast<const double*>(xs[lane]);
      if (lane < asked) ask_for(reinterpret_cast<const double*>(next_xs[lane]), n, 0);
      write_run<false>(reinterpret_cast<double*>(ys[lane]), n, [&](auto at) { return formula(at, x); }, whole_lines);
    }
  }

  // Rows past the cache; between the pieces of each come the leaves of one of the next batch, as long as there are any.
  template <bool kCentred, class WeightOf, class BiasOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_past_cache(const DoubleBatch& now, DoubleBatch& next,
                                                             WeightOf weight_of, BiasOf bias_of) const {
    const int64_t n = run_, distance = distance_;
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    for (int64_t lane = 0; lane < now.count; ++lane) {
      const auto w = weight_of(now.param[lane]);
      const auto b = bias_of(now.param[lane]);
      const DoubleFormula<kCentred, decltype(w), decltype(b)> formula(now.factors(lane), w, b);
      const double* const x = reinterpret_cast<const double*>(xs[lane]);
      double* const y = reinterpret_cast<double*>(ys[lane]);
      const auto result = [&](auto at) { return formula(at, x); };
      if (lane < next.count) {
        Coming<kCentred> coming(reinterpret_cast<const double*>(next_xs[lane]), n, distance);
        write_run_between<true>(y, n, result, true, [&] { coming.add_leaf(); });
        next.put(lane, coming.all(), one_leaf_);
      } else {
        write_run<true>(y, n, result);
      }
    }
  }

  // Sets of several segments, which have parameters of their own, or of several lines: of Family::channel, for a row is
  // one run. kPacks: of short runs, or kAnyRun.
  template <int kPacks>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_planes(const DoubleBatch& now, DoubleBatch& next) const {
    const int64_t run = run_, lines = lines_, segments = plan_.segments;
    const bool past_cache = kPacks == kAnyRun && args_.past_cache, whole_lines = whole_lines_;
    const double* const weights = segments > 1 ? args_.weight : nullptr;  // of one segment they are in the factors
    const double* const biases = segments > 1 ? args_.bias : nullptr;
    const bool by_segment = weights || biases;
    const int64_t x_step = run_step<double>(plan_.x, run), y_step = run_step<double>(plan_.y, run);
    const int64_t x_segment_step = inner_stride(plan_.x.segment), y_segment_step = inner_stride(plan_.y.segment);
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    // Past the cache, between() comes before every kLeaf values.
    const auto write_set = [&](int64_t lane, const auto& between) FASTNORM_LOOPS {
      const char* x_segment = xs[lane];
      char* y_segment = ys[lane];
      DoubleFactors factors = now.factors(lane);
      const SplitMean mean{now.from[lane], now.rest[lane], now.rest_lo[lane]};
      const double rstd = now.rstd[lane], rstd_lo = now.rstd_lo[lane];
      int64_t param = now.param[lane];
      for (int64_t segment = 0; segment < segments; ++segment, ++param) {
        if (by_segment) {
          const TwoTerm by = split_factor(rstd, rstd_lo, weights ? weights[param] : 1);
          factors = {mean.pivot, by.hi, by.lo, mean.offset(by.hi, by.lo, biases ? biases[param] : kNoBias)};
        }
        const DoubleFormula<true, None, None> formula(factors, None{}, None{});
        const char* x_line = x_segment;
        char* y_line = y_segment;
        for (int64_t line = 0; line < lines; ++line, x_line += x_step, y_line += y_step) {
          const double* const x = reinterpret_cast<const double*>(x_line);
          double* const y = reinterpret_cast<double*>(y_line);
          const auto result = [&](auto at) { return formula(at, x); };
          if constexpr (kPacks != kAnyRun) {
            write_short_run<kPacks>(y, run, [&](int, Whole at) { return result(at); });
          } else if (past_cache) {
            write_run_between<true>(y, run, result, true, between);
          } else {
            write_run<false>(y, run, result, whole_lines);
          }
        }
        x_segment += x_segment_step;
        y_segment += y_segment_step;
      }
    };
    const bool measures = past_cache && one_run_;
    for (int64_t lane = 0; lane < now.count; ++lane) {
      if (measures && lane < next.count) {
        Coming<true> coming(reinterpret_cast<const double*>(next_xs[lane]), plan_.set_size(), distance_);
        write_set(lane, [&] { coming.add_leaf(); });
        next.put(lane, coming.all(), one_leaf_);
      } else {
        write_set(lane, [] {});
      }
    }
    if (!measures) measure<true>(next);
  }

  const Plan& plan_;
  const NormArgs<double>& args_;
  const int64_t run_, lines_;
  const int64_t distance_;
  const bool whole_lines_;  // of the cache are written
  const bool one_run_;
  const int64_t x_run_;  // values in each of the runs that a set of x is, all read where they are; 0: other sets
  const bool one_leaf_;
  const bool asks_;  // are results asked for while a set is measured, and the next sets while this one is normalised?
  const bool short_runs_, ordinary_parameters_;
};

}  // namespace
}  // namespace fastnorm
