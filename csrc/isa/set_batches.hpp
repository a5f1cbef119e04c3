// Float32 sets of one segment that are read in place, short ones in batches, long ones one by one; and sets of any size
// through given statistics.
#pragma once

#include <type_traits>

#include "isa/batches.hpp"

namespace fastnorm {
namespace {

// Values that a thread takes at a time where statistics are given.
constexpr int64_t kAppliedElements = 65536;

// Sets from this length on go one by one: what a set costs once then is hidden by the loop over its values, of which
// those that are normalised lie in the nearest cache (512 x 768: layer norm 55 us to 43, RMS norm 47 to 35). With few
// registers (AVX2) layer norm of rows of 768 takes 5 % more, of 1024 2 % less.
constexpr int64_t kLongSet = kManyRegisters ? 512 : 1024;

class SetBatches {
 public:
  SetBatches(const Plan& plan, const NormArgs<float>& args, int64_t run)
      : plan_(plan),
        args_(args),
        run_(run),
        lines_(plan.elements / run),
        additions_(lines_ * ((run + kPack - 1) / kPack)),
        distance_(reading_ahead<float>(plan, plan.x, run)),
        asks_(plan.in_last_cache && !args.past_cache && lines_ == 1 &&
              follow_each_other(plan.x, run * static_cast<int64_t>(sizeof(float))) &&
              follow_each_other(plan.y, run * static_cast<int64_t>(sizeof(float)))) {}

  // Can the sets be read in place? A weight per value wants all values in one run.
  static bool in_place(const Plan& plan, int64_t run) {
    return run > 0 && plan.segments == 1 && (plan.family == Family::channel || run == plan.elements);
  }
  static bool suit(const Plan& plan, int64_t run) { return in_place(plan, run) && fits_batch(plan); }

  // Sets [begin, end): batch by batch, or long ones one by one, each measured while the one before is normalised.
  void forward(int64_t begin, int64_t end) const {
    with_formula([&](const auto& formula_of) {
      constexpr bool centred = std::decay_t<decltype(formula_of)>::kCentred;
      if (one_by_one()) return forward_one_by_one<centred>(begin, end, formula_of);
      for_batches<Batch>(
          plan_, kBatchElements, begin, end, [&](Batch& batch) { measure<centred>(batch); },
          [&](Batch& batch) { finish_batch(plan_, args_, additions_, batch); },
          [&](const Batch& now, Batch& next) { normalise<centred>(now, next, formula_of); });
    });
  }

  // Are there pieces enough for all threads?
  bool apply_suits() const {
    const int64_t pieces = (plan_.sets / sets_applied() + 1) * (lines_ / lines_applied() + 1);
    return plan_.threads == 1 || pieces >= 2 * plan_.threads || units_per_set(plan_) == 1;
  }

  // All sets through given statistics. Channels take turns line by line: that is the order of memory.
  void apply() const {
    const int64_t size = sets_applied(), lines_at_once = lines_applied();
    const int64_t batches = (plan_.sets + size - 1) / size, parts = (lines_ + lines_at_once - 1) / lines_at_once;
    with_formula([&](const auto& formula_of) {
      parallel_for(plan_.threads, batches * parts, [&](int64_t i) {
        Batch batch;
        const int64_t first = i % batches * size;
        batch.place(plan_, first, plan_.sets - first < size ? plan_.sets - first : size);
        const int64_t line = i / batches * lines_at_once;
        const int64_t end = line + lines_at_once < lines_ ? line + lines_at_once : lines_;
        bool fit[kMostSets];
        take_given(batch, fit);
        for (int64_t lane = 0; lane < batch.count;) {
          int64_t last = lane;
          while (last < batch.count && fit[last]) ++last;
          if (last > lane) normalise_lines(batch, lane, last, line, end, formula_of);
          if (last < batch.count && line == 0) apply_carefully(batch.first + last);
          lane = last + 1;
        }
        if (args_.past_cache) finish_stores();
      });
    });
  }

 private:
  template <bool centred, class WeightOf, class BiasOf>
  struct Maker {
    static constexpr bool kCentred = centred;
    WeightOf weight_of;
    BiasOf bias_of;

    // `param`: the first of the set's parameters.
    auto operator()(const FloatFactors& factors, int64_t param) const {
      const auto w = weight_of(param);
      const auto b = bias_of(param);
      return FloatFormula<centred, decltype(w), decltype(b)>(factors, w, b);
    }
    auto operator()(const Batch& batch, int64_t lane) const { return (*this)(batch.factors(lane), batch.param[lane]); }
  };

  // call(formula_of), formula_of(batch, lane) or (factors, first parameter) giving what normalises a set.
  template <class Call>
  void with_formula(const Call& call) const {
    const auto make = [&](auto centred, auto weight_of, auto bias_of) {
      call(Maker<decltype(centred)::value, decltype(weight_of), decltype(bias_of)>{weight_of, bias_of});
    };
    const float *w = args_.weight, *b = args_.bias;
    const auto none = [](int64_t) { return None{}; };
    if (plan_.family == Family::channel) return make(std::true_type{}, none, none);
    const auto weights = [w](int64_t param) { return Each<float>{w + param}; };
    const auto biases = [b](int64_t param) { return Each<float>{b + param}; };
    const auto by_row = [&](auto centred) {
      if (w && b) return make(centred, weights, biases);
      if (w) return make(centred, weights, none);
      if (b) return make(centred, none, biases);
      return make(centred, none, none);
    };
    if (args_.centred) return by_row(std::true_type{});
    by_row(std::false_type{});
  }

  // What a thread takes at a time where statistics are given: sets, and lines of theirs.
  int64_t sets_applied() const {
    const int64_t runs = run_ < kAppliedElements ? kAppliedElements / run_ : 1;
    return runs < kMostSets ? runs : kMostSets;
  }
  int64_t lines_applied() const {
    const int64_t lines = kAppliedElements / (run_ * sets_applied());
    return lines > 1 ? lines : 1;
  }

  bool one_by_one() const {
    return lines_ == 1 && run_ >= (args_.centred ? kLongSet : kLongSquares) && distance_ == 0 && !args_.past_cache;
  }

  // Sets of one long line.
  template <bool centred, class FormulaOf>
  [[gnu::noinline]] FASTNORM_LOOPS void forward_one_by_one(int64_t begin, int64_t end,
                                                           const FormulaOf& formula_of) const {
    const int64_t run = run_;
    const bool asks = asks_, channels = plan_.family == Family::channel;
    const float *const weights = channels ? args_.weight : nullptr, *const biases = channels ? args_.bias : nullptr;
    const double count = static_cast<double>(run), share = 1 / count;
    const double additions = static_cast<double>(additions_ + kPack);
    Offsets xs(plan_.x.set, begin), ys(plan_.y.set, begin), stats(plan_.set_stat, begin),
        params(plan_.set_param, begin);
    const auto next_x = [&] { return reinterpret_cast<const float*>(plan_.x.data + xs.next()); };
    const float* x = next_x();
    PlainSums<centred> sums;
    add_line(x, sums);
    for (int64_t set = begin; set < end; ++set) {
      float* const y = reinterpret_cast<float*>(plan_.y.data + ys.next());
      const float* const coming = set + 1 < end ? next_x() : nullptr;
      const int64_t stat = stats.next(), param = params.next();
      const double sum = centred ? fold(sums.sum) : 0, squares = fold(sums.squares);
      const double weight = weights ? static_cast<double>(weights[param]) : 1;
      const double bias = biases ? static_cast<double>(biases[param]) : kNoBias;
      const SetNumbers numbers = SetNumbers::of<centred>(sum, squares, weight, count, share, args_.eps, additions);
      const auto formula = formula_of(FloatFactors::of(numbers.mean, 0, numbers.rstd * weight, bias), param);
      PlainSums<centred> next;
      if (!numbers.in_float) {
        normalise_alone(plan_, args_, run, set, PlainTotals{sum, squares, static_cast<double>(additions_)});
        if (coming) add_line(coming, next);
      } else {
        store_numbers(args_, stat, numbers, count);
        if (coming) {
          PlainSums<centred> inner;
          for_packs(run, [&](auto at) {
            if (asks) {
              prefetch(coming + at.start, kNearAheadBytes);
              prefetch(y + at.start, kNearAheadBytes);
            }
            inner.add(at, coming);
            at.store(y, formula(at, x));
          });
          next = inner;
        } else {
          for_packs(run, [&](auto at) { at.store(y, formula(at, x)); });
        }
      }
      sums = next;
      x = coming;
    }
  }

  // Sums of all sets of a batch.
  template <bool centred>
  FASTNORM_LOOPS void measure(Batch& batch) const {
    const int64_t count = batch.count, lines = lines_, step = run_step<float>(plan_.x, run_);
    const SetPlaces::View xs = batch.x.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      const char* x_line = xs[lane];
      PlainSums<centred> sums;
      for (int64_t line = 0; line < lines; ++line, x_line += step) {
        add_line(reinterpret_cast<const float*>(x_line), sums);
      }
      batch.put(lane, sums);
    }
  }

  template <bool centred>
  FASTNORM_INLINE void add_line(const float* x, PlainSums<centred>& sums) const {
    PlainSums<centred> inner = sums;
    for_packs(run_, [&](auto at) { inner.add(at, x); });
    sums = inner;
  }

  // Normalises one batch and measures the next.
  template <bool centred, class FormulaOf>
  void normalise(const Batch& now, Batch& next, const FormulaOf& formula_of) const {
    if (!now.in_float) {
      normalise_each(plan_, args_, run_, additions_, now);
      return measure<centred>(next);
    }
    if (args_.past_cache) {
      normalise_past_cache<centred>(now, next, formula_of);
    } else {
      normalise_and_measure<centred>(now, next, formula_of);
      normalise_lines(now, next.count, now.count, 0, lines_, formula_of);
    }
  }

  // In the same loops: arithmetic of the one hides memory of the other.
  template <bool centred, class FormulaOf>
  void normalise_and_measure(const Batch& now, Batch& next, const FormulaOf& formula_of) const {
    if (lines_ == 1 && distance_ == 0) {
      if (asks_ && kManyRegisters && run_ >= kAskedRun) {
        return normalise_and_measure_runs<centred, true, kAnyRun>(now, next, formula_of);
      }
      return with_short_run(
          true, run_, [&](auto packs) { normalise_and_measure_runs<centred, false, packs>(now, next, formula_of); });
    }
    with_short_run(kManyRegisters && lines_ > 1 && distance_ == 0, run_,
                   [&](auto packs) { normalise_and_measure_lines<centred, packs>(now, next, formula_of); });
  }

  // Sets of several lines, or from memory.
  template <bool centred, int kPacks, class FormulaOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_and_measure_lines(const Batch& now, Batch& next,
                                                                    const FormulaOf& formula_of) const {
    const int64_t run = run_, lines = lines_, distance = distance_, count = next.count;
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    const int64_t x_step = run_step<float>(plan_.x, run), y_step = run_step<float>(plan_.y, run);
    for (int64_t lane = 0; lane < count; ++lane) {
      const char *x_line = xs[lane], *coming_line = next_xs[lane];
      char* y_line = ys[lane];
      const auto formula = formula_of(now, lane);
      PlainSums<centred> sums;
      for (int64_t line = 0; line < lines; ++line) {
        const float *x = reinterpret_cast<const float*>(x_line), *coming = reinterpret_cast<const float*>(coming_line);
        float* y = reinterpret_cast<float*>(y_line);
        PlainSums<centred> inner = sums;
        const auto at_place = [&](auto at) {
          inner.add(at, coming);
          at.store(y, formula(at, x));
        };
        if constexpr (kPacks == kAnyRun) {
          for_packs(run, [&](auto at) {
            if (distance != 0) prefetch(coming + at.start, distance);
            at_place(at);
          });
        } else {
          const Whole last{run - kPack};
          const Pack<float> end = formula(last, x);
          for_constants<kPacks>([&](auto i) { at_place(Whole{i * kPack}); });
          inner.add(Partial{kPacks * kPack, run - kPacks * kPack}, coming);
          last.store(y, end);
        }
        sums = inner;
        x_line += x_step;
        coming_line += x_step;
        y_line += y_step;
      }
      next.put(lane, sums);
    }
  }

  // Sets of one line each, two at a time: every sum is a chain of additions that wait for each other, and two chains do
  // not (RMS norm of rows of 100: 60 us to 56; instance norm 14 x 14: 51 to 46). Few registers do not hold the sums of
  // both (AVX2: layer norm 512 x 768 83 us instead of 52). kAsks: as asks_; kPacks: of a short run (with_short_run).
  template <bool centred, bool kAsks, int kPacks, class FormulaOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_and_measure_runs(const Batch& now, Batch& next,
                                                                   const FormulaOf& formula_of) const {
    const int64_t run = run_, count = next.count;
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    const auto values = [](char* set) { return reinterpret_cast<float*>(set); };
    const auto normalise = [&](int64_t lane, auto sets) FASTNORM_LOOPS {
      constexpr int kSets = decltype(sets)::value;
      using Formula = decltype(formula_of(now, lane));
      const float* const x[2] = {values(xs[lane]), values(xs[lane + kSets - 1])};
      const float* const coming[2] = {values(next_xs[lane]), values(next_xs[lane + kSets - 1])};
      float* const y[2] = {values(ys[lane]), values(ys[lane + kSets - 1])};
      const Formula formulas[2] = {formula_of(now, lane), formula_of(now, lane + kSets - 1)};
      PlainSums<centred> sums[kSets];
      const auto at_place = [&](auto at) {
        Pack<float> results[kSets];
        for_constants<kSets>([&](auto k) {
          if constexpr (kAsks) {
            prefetch(coming[k] + at.start, kNearAheadBytes);
            prefetch(y[k] + at.start, kNearAheadBytes);
          }
          sums[k].add(at, coming[k]);
          results[k] = formulas[k](at, x[k]);
        });
        for_constants<kSets>([&](auto k) { at.store(y[k], results[k]); });
      };
      if constexpr (kPacks == kAnyRun) {
        for_packs(run, at_place);
      } else if (run == (kPacks + 1) * kPack) {
        for_constants<kPacks + 1>([&](auto i) { at_place(Whole{i * kPack}); });
      } else {
        const Whole last{run - kPack};
        Pack<float> ends[kSets];
        for_constants<kSets>([&](auto k) { ends[k] = formulas[k](last, x[k]); });
        for_constants<kPacks>([&](auto i) { at_place(Whole{i * kPack}); });
        for_constants<kSets>([&](auto k) {
          sums[k].add(Partial{kPacks * kPack, run - kPacks * kPack}, coming[k]);
          last.store(y[k], ends[k]);
        });
      }
      for_constants<kSets>([&](auto k) { next.put(lane + k, sums[k]); });
    };
    int64_t lane = 0;
    if constexpr (kManyRegisters) {
      for (; lane + 2 <= count; lane += 2) normalise(lane, std::integral_constant<int, 2>{});
    }
    for (; lane < count; ++lane) normalise(lane, std::integral_constant<int, 1>{});
  }

  // Lines [line, end) of the sets in lanes [first, last).
  template <class FormulaOf>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise_lines(const Batch& batch, int64_t first, int64_t last, int64_t line,
                                                        int64_t end, const FormulaOf& formula_of) const {
    const int64_t run = run_;
    const bool past_cache = args_.past_cache;
    const SetPlaces::View xs = batch.x.view(), ys = batch.y.view();
    const int64_t x_step = run_step<float>(plan_.x, run), y_step = run_step<float>(plan_.y, run);
    for (; line < end; ++line) {
      for (int64_t lane = first; lane < last; ++lane) {
        const float* x = reinterpret_cast<const float*>(xs[lane] + line * x_step);
        float* y = reinterpret_cast<float*>(ys[lane] + line * y_step);
        const auto formula = formula_of(batch, lane);
        for_stored_packs(past_cache, y, run, [&](auto at, auto out) { out.store(at, y, formula(at, x)); });
      }
    }
  }

  void apply_carefully(int64_t set) const {
    const Statistic s = given_statistic(args_, plan_.set_stat.offset(set));
    for (int64_t unit = 0; unit < units_per_set(plan_); ++unit) normalise_unit(plan_, args_, run_, set, unit, s);
  }

  // What given_statistic has, for all sets of a batch; fit: those that can be normalised in float32.
  void take_given(Batch& batch, bool* fit) const {
    load_parameters(plan_, args_, batch);
    Offsets stats(plan_.set_stat, batch.first);
    for (int64_t lane = 0; lane < batch.count; ++lane) {
      const Statistic s = given_statistic(args_, stats.next());
      const double factor = s.rstd * batch.weight.of[lane];
      batch.put(lane, FloatFactors::of(s.mean, s.mean_lo, factor, batch.bias.of[lane]));
      fit[lane] = fits(s) && zero_or_moderate(factor);
    }
  }

  // Stores past the cache are aligned, the lanes of the sums are not: the one runs a few values ahead of the other.
  template <bool centred, class FormulaOf>
  FASTNORM_LOOPS void normalise_past_cache(const Batch& now, Batch& next, const FormulaOf& formula_of) const {
    const int64_t run = run_, lines = lines_, distance = distance_, count = now.count, measured = next.count;
    const int64_t x_step = run_step<float>(plan_.x, run), y_step = run_step<float>(plan_.y, run);
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    for (int64_t lane = 0; lane < count; ++lane) {
      const bool measures = lane < measured;
      const char *x_line = xs[lane], *coming_line = measures ? next_xs[lane] : x_line;
      char* y_line = ys[lane];
      const auto formula = formula_of(now, lane);
      PlainSums<centred> sums;
      for (int64_t line = 0; line < lines; ++line, x_line += x_step, coming_line += x_step, y_line += y_step) {
        const float *x = reinterpret_cast<const float*>(x_line), *coming = reinterpret_cast<const float*>(coming_line);
        float* y = reinterpret_cast<float*>(y_line);
        const int64_t unaligned = unaligned_values(y), lead = unaligned < run ? unaligned : run;
        const auto store = [&](auto at) { PastCacheToTheEnds::store(at, y, formula(at, x)); };
        if (lead > 0) store(Partial{0, lead});
        PlainSums<centred> inner = sums;
        for_packs(run, [&](auto at) {
          prefetch(coming + at.start, distance);
          inner.add(at, coming);
          const int64_t i = at.start + lead;
          if (i + kPack <= run) {
            store(Whole{i});
          } else if (i < run) {
            store(Partial{i, run - i});
          }
        });
        sums = inner;
      }
      if (measures) next.put(lane, sums);
    }
  }

  const Plan& plan_;
  const NormArgs<float>& args_;
  int64_t run_, lines_;
  int64_t additions_;  // in the longest chain of a sum
  int64_t distance_;
  bool asks_;  // for what comes, and for the results, a few lines ahead?
};

}  // namespace
}  // namespace fastnorm
