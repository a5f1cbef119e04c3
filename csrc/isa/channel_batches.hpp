// Backward of sets that are read in place, several at a time: the sums of eight segments are folded together, so that
// what there is to do once per segment costs little beside a few dozen values.
#pragma once

#include <type_traits>

#include "isa/channel_sums.hpp"

namespace fastnorm {
namespace {

// The sums of g and of g * xhat over the segments of a set of float64 data, and what rounding has taken from them
// (known of one segment alone).
struct WeightedSums {
  double a, b, a_lo, b_lo;
};

FASTNORM_INLINE WeightedSums weighted_sums(double weight, double dy, double dy_xhat) {
  const TwoTerm a = two_product(weight, dy), b = two_product(weight, dy_xhat);
  return {a.hi, b.hi, a.lo, b.lo};
}

// From the sums of dy and of dy * xhat; `weight` may be nullptr. A few segments are not worth a tree.
inline WeightedSums weighted_sums(const double* weight, const double* dy, const double* dy_xhat, int64_t segments) {
  constexpr int64_t kFewSegments = 8;
  if (segments == 1) return weighted_sums(weight ? *weight : 1, *dy, *dy_xhat);
  if (segments <= kFewSegments) {
    WeightedSums sums{0, 0, 0, 0};
    for (int64_t i = 0; i < segments; ++i) {
      const double factor = weight ? weight[i] : 1;
      sums.a += factor * dy[i];
      sums.b += factor * dy_xhat[i];
    }
    return sums;
  }
  const auto along = [&](auto weights) {
    const Pair sums = sum(segments, [&](auto at) {
      return PackPair{times(at, at.template load<double>(dy), weights),
                      times(at, at.template load<double>(dy_xhat), weights)};
    });
    return WeightedSums{sums.first, sums.second, 0, 0};
  };
  return weight ? along(Each<double>{weight}) : along(None{});
}

// What there is of g in a segment of float32 data, as far as its sums tell: infinite where the weight is beyond what
// float32 can be trusted with.
FASTNORM_INLINE double size_of_gradient(double weight, double dy, double dy_xhat) {
  return zero_or_moderate(weight) ? std::fabs(weight) * (std::fabs(dy) + std::fabs(dy_xhat)) : HUGE_VAL;
}

// Is there so much of g in a set of float32 data that what underflow takes from dx is nothing beside it, and no more
// than its means can bear? Or no sum of it at all: dx is a product with dy alone then.
FASTNORM_INLINE bool sized(double size, double count) {
  return static_cast<bool>(((size > 0x1p-60 * count) & (size < 0x1p60 * count)) | (size == 0));
}

// Can a number of float32 data be a factor that takes no digits away?
FASTNORM_INLINE bool fit_factor(double factor) {
  const double size = std::fabs(factor);
  return static_cast<bool>(((size > 0x1p-100) & (size < 0x1p100)) | (size == 0));
}

// Can dx of a set of float32 data be made about a pivot? (That of a single value is 0, whatever is rounded.)
FASTNORM_INLINE bool plain(const GradientMeans& means, double size, double count, double rstd) {
  return static_cast<bool>(means.plain & (count > 1) & sized(size, count) & fit_factor(means.b_rstd * rstd));
}

template <class T>
inline GradientMeans channel_means(const Plan& plan, const NormArgs<T>& args, int64_t set, const Statistic& s,
                                   const SegmentTable<T>& sums) {
  const int64_t param = plan.set_param.offset(set), first = set * plan.segments;
  const double count = static_cast<double>(plan.set_size()), centred = args.centred ? 1 : 0;
  if constexpr (kMayOverflow<T>) {
    const double* weight = args.weight ? args.weight + param : nullptr;
    const WeightedSums g = weighted_sums(weight, sums.dy + first, sums.dy_xhat + first, plan.segments);
    return GradientMeans::of_sums<T>(centred * g.a, g.b, count, s.mean, s.rstd, s.rstd_lo, centred * g.a_lo, g.b_lo);
  } else {
    double a = 0, b = 0, size = 0;
    for (int64_t segment = 0; segment < plan.segments; ++segment) {
      const double weight = args.weight ? static_cast<double>(args.weight[param + segment]) : 1;
      const double dy = sums.dy[first + segment], dy_xhat = sums.dy_xhat[first + segment];
      a += weight * dy;
      b += weight * dy_xhat;
      size += size_of_gradient(weight, dy, dy_xhat);
    }
    GradientMeans means = GradientMeans::of_sums<T>(centred * a, b, count, s.mean, s.rstd);
    means.plain = plain(means, size, count, s.rstd);
    return means;
  }
}

// dx of a segment, about a pivot: of float64 data as PivotGradient has it, of float32 data with one factor for dy and
// one for x.
template <class T>
struct SegmentGradient : PivotGradient<T, Same<T>> {
  SegmentGradient(T pivot, double rstd, T a, T b)
      : PivotGradient<T, Same<T>>(GradientFactors<T>{pivot, static_cast<T>(rstd), a, b}, Same<T>(1)) {}
  FASTNORM_INLINE void weigh(T of_segment) { this->weight.value = Pack<T>(of_segment); }

  static T a_of(const GradientMeans& means, double off, double) { return means.pivot_a + off * means.b_rstd; }
  static T b_of(const GradientMeans& means, double) { return means.b_rstd; }
};

template <>
struct SegmentGradient<float> {
  double rstd;
  Pack<float> pivot, factor, a, b;

  SegmentGradient(float about, double by, float less, float times)
      : rstd(by), pivot(about), factor(0.0f), a(less), b(times) {}
  FASTNORM_INLINE void weigh(float weight) {
    factor = Pack<float>(static_cast<float>(rstd * static_cast<double>(weight)));
  }

  static float a_of(const GradientMeans& means, double off, double rstd) {
    return static_cast<float>(rstd * (means.pivot_a + off * means.b_rstd));
  }
  static float b_of(const GradientMeans& means, double rstd) { return static_cast<float>(rstd * means.b_rstd); }

  template <class At>
  FASTNORM_INLINE Pack<float> operator()(At at, const float* x, const float* dy) const {
    return (at.template load<float>(dy) * factor - a) - (at.template load<float>(x) - pivot) * b;
  }
};

template <class T>
FASTNORM_LOOPS inline void channel_unit_gradient(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t set,
                                                 int64_t unit, const Statistic& s, const GradientMeans& means) {
  const int64_t param = plan.set_param.offset(set) + segment_of(plan, unit);
  const double weight = args.weight ? static_cast<double>(args.weight[param]) : 1;
  const Operands<2, true> operands{{&plan.x, &plan.dy}, &plan.dx};
  const auto visit = [&](const auto& write) {
    visit_unit<T>(plan, operands, run, set, unit,
                  [&](const T* const* in, T* dx, int64_t, int64_t n) { write(in[0], in[1], dx, n); });
  };
  const auto visit_packs = [&](const auto& gradient) {
    visit([&](const T* x, const T* dy, T* dx, int64_t n) {
      for_stored_packs(args.past_cache, dx, n, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    });
  };
  if (args.constant_stats) {
    return visit(
        [&](const T*, const T* dy, T* dx, int64_t n) { input_gradient_constant(dy, dx, n, s, Same<double>(weight)); });
  }
  const InputGradient<T, double, Same<double>> careful(s, means.a, means.b, Same<double>(weight));
  if (s.scale != 1 || !means.plain) return visit_packs(careful);
  using Gradient = SegmentGradient<T>;
  const Pivot<T> pivot = Pivot<T>::of(s);
  Gradient plain(pivot.value, s.rstd, Gradient::a_of(means, pivot.off, s.rstd), Gradient::b_of(means, s.rstd));
  plain.weigh(static_cast<T>(weight));
  write_mending<T>(plan.dx_in_place(), [&](auto mends) {
    visit_packs([&](auto at, const T* x, const T* dy) {
      return mended<decltype(mends)::value>(plain(at, x, dy), [&] { return careful(at, x, dy); });
    });
  });
}

// The sums of one unit.
template <class T>
inline SegmentSums segment_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s) {
  SegmentSums sums;
  if (!tree_unit_sums<T>(plan, run, set, unit, s, sums)) sums = careful_sums<T>(plan, run, set, unit, s, sums);
  return sums;
}

// Segments whose sums are folded together.
constexpr int64_t kFoldedSegments = 8;
// Sets of a batch at most, a multiple of those whose statistics are computed together.
constexpr int64_t kGradientSets = 32;
// Bytes of x of the sets of a batch: x and dy of the one size fit the nearest cache; up to the other, which fit the
// next, where fewer segments than are folded together would else make a batch.
constexpr int64_t kGradientBatchBytes = 16 << 10, kFarBatchBytes = 128 << 10;
// The same of float32 data where dx and the next batch are asked for as well (kNearestCacheBytes), and the largest sets
// for that. Sets of several lines took 10 % more for it, float64 data 5 %, planes of 7 x 7 12 % in the caches.
constexpr int64_t kAskedBatchBytes = 8 << 10, kAskedSetBytes = 2 << 10;

// The sets of a batch are neighbours along the innermost axis of sets: everything of theirs lies at equal distances.
template <class T>
class ChannelBatches {
 public:
  ChannelBatches(const Plan& plan, const NormArgs<T>& args, int64_t run, SegmentTable<T>& sums)
      : plan_(plan),
        args_(args),
        run_(run),
        lines_(plan.elements / run),
        asks_(!kMayOverflow<T> && plan.in_last_cache && lines_ == 1 && run >= kAskedRun && !args.past_cache &&
              !plan.dx_in_place() && plan.set_size() * static_cast<int64_t>(sizeof(T)) <= kAskedSetBytes),
        sums_(sums) {}

  // Can all segments be read in place, each at one go?
  static bool suit(const Plan& plan, int64_t run) {
    const auto steps = [](const Operand& operand) { return operand.segment.rank < 2; };
    return run > 0 && chunks_per_segment(plan) == 1 && steps(plan.x) && steps(plan.dy) && steps(plan.dx);
  }

  void backward(int64_t begin, int64_t end) {
    const int64_t size = sets_at_once();
    int64_t row = plan_.sets;
    for (const Walk* walk : {&plan_.x.set, &plan_.dy.set, &plan_.dx.set, &plan_.set_param, &plan_.set_stat}) {
      if (walk->rank > 0 && walk->inner_size() < row) row = walk->inner_size();
    }
    for (first_ = begin; first_ < end; first_ += count_) {
      const int64_t left = row - first_ % row, room = end - first_ < left ? end - first_ : left;
      count_ = room < size ? room : size;
      take_statistics();
      const TreeCut cut(run_);
      cut.with_rest([&](auto rest) {
        constexpr int kRest = decltype(rest)::value;
        if (reading_ahead<T>(plan_, plan_.x, run_) > 0) return measure<kRest, false>(cut, ReadAhead<T>(plan_, run_));
        if constexpr (!kMayOverflow<T>) {
          if (asks_) return measure<kRest, false>(cut, ResultsAhead{});
        } else {                                         // sets of several lines gain nothing by asking
          const ReadAhead<T> near(kNearAheadBytes / 2);  // (the whole: 2 to 5 % longer)
          if (lines_ == 1)
            return cut.is_one_tree() ? measure<kRest, true>(cut, near) : measure<kRest, false>(cut, near);
        }
        measure<kRest, false>(cut, NoReadAhead{});
      });
      prepare();
      for (int64_t i = 0; i < count_; ++i) {
        if (plain_[i] == 0) write_carefully(i);
      }
      with_lines([&](const auto& lines) {
        if (args_.past_cache) {
          write<true>(lines);
        } else {
          write<false>(lines);
        }
      });
    }
  }

 private:
  static constexpr bool kWantsRest = kMayOverflow<T>;  // is the sum of x - pivot wanted?
  using Gradient = SegmentGradient<T>;

  // Statistics of whole lanes: the last ones may be of no set.
  static int64_t whole_lanes(int64_t count) {
    return (count + kStatisticLanes - 1) / kStatisticLanes * kStatisticLanes;
  }

  int64_t sets_at_once() const {
    const int64_t bytes = plan_.set_size() * static_cast<int64_t>(sizeof(T));
    const int64_t near = (asks_ ? kAskedBatchBytes : kGradientBatchBytes) / bytes, far = kFarBatchBytes / bytes;
    const int64_t folded = (kFoldedSegments + plan_.segments - 1) / plan_.segments,
                  wanted = folded < far ? folded : far;
    const int64_t size = near > wanted ? near : wanted;
    return size < 1 ? 1 : size < kGradientSets ? size : kGradientSets;
  }

  // The lines of a segment; most often there is one.
  struct OneLine {
    static constexpr int64_t count = 1;
  };
  struct Lines {
    int64_t count;
  };
  template <class Call>
  void with_lines(const Call& call) const {
    if (lines_ == 1) {
      call(OneLine{});
    } else {
      call(Lines{lines_});
    }
  }

  struct Lanes {
    HalfPack dy[kFoldedSegments], product[kFoldedSegments], rest[kFoldedSegments];
    double off[kFoldedSegments], mean[kFoldedSegments], rstd[kFoldedSegments];
    const char* gradients[kFoldedSegments];  // dy

    FASTNORM_INLINE void put(int64_t lane, const TreeGradientSums<T>& sums) {
      dy[lane] = sums.dy_sum;
      product[lane] = sums.product_sum;
      if constexpr (kWantsRest) rest[lane] = sums.rest_sum;
    }
  };

  // One operand of the batch.
  struct Runs : SegmentLines<T> {
    int64_t set_step;
    Runs(const Operand& operand, int64_t set, int64_t run)
        : SegmentLines<T>(operand, set, run), set_step(inner_stride(operand.set)) {}
    char* set(int64_t i) const { return this->base + i * set_step; }
  };

  // From a set of the batch to one of the next, in bytes; behind the last there is nothing to ask for.
  int64_t distance_to_next(const Operand& operand) const {
    if (first_ + count_ >= plan_.sets) return 0;
    return operand.set.offset(first_ + count_) - operand.set.offset(first_);
  }

  const T* weight_of(int64_t i, int64_t segment) const {
    return weights_ + i * weight_step_ + (args_.weight ? segment : 0);
  }

  // One number for each set of the batch, from places `step` apart, in vectors where that is 1: numbers that are stored
  // one by one and then read together have to wait until all dx before them is in the cache (instance norm 14 x 14:
  // 5 % of its time). Where there are none the zeros stay that `to` was made with.
  template <class From>
  void take_numbers(const From* from, int64_t step, double* to) const {
    if (!from) return;
    if (step == 1) {
      for_packs(count_, [&](auto at) { Whole{at.start}.store(to, at.template load<double>(from)); });
    } else {
      for (int64_t i = 0; i < count_; ++i) to[i] = static_cast<double>(from[i * step]);
    }
  }
  static const double* at_place(const double* numbers, int64_t place) { return numbers ? numbers + place : nullptr; }

  // What given_statistic and Pivot::of do, for all sets of the batch.
  [[gnu::noinline]] void take_statistics() {
    const int64_t stat = plan_.set_stat.offset(first_), step = inner_stride(plan_.set_stat);
    take_numbers(at_place(args_.mean, stat), step, mean_);
    take_numbers(at_place(args_.mean_lo, stat), step, mean_lo_);
    take_numbers(at_place(args_.rstd, stat), step, rstd_);
    take_numbers(at_place(args_.rstd_lo, stat), step, rstd_lo_);
    const int64_t rounded = whole_lanes(count_);
    const double eps = args_.eps;
#pragma omp simd
    for (int64_t i = 0; i < rounded; ++i) {
      const double mean_lo = std::fabs(mean_lo_[i]) * rstd_[i] < 0x1p-56 ? 0 : mean_lo_[i];
      pivot_[i] = Pivot<T>::next_to(mean_[i], rstd_[i], varies(rstd_[i], eps));
      off_[i] = (static_cast<double>(pivot_[i]) - mean_[i]) - mean_lo;
    }
  }

  template <int kRest, bool kOneTree, class Ahead>  // kOneTree: is that what every segment is?
  [[gnu::noinline]] FASTNORM_LOOPS void measure(const TreeCut& cut_of_run, const Ahead& ahead_of) {
    Lanes lanes;
    const TreeCut cut = cut_of_run;
    Ahead ahead = ahead_of;
    constexpr bool kResults = std::is_same<Ahead, ResultsAhead>::value;
    const int64_t count = count_, segments = plan_.segments, all = count * segments, lines = lines_;
    const Runs x(plan_.x, first_, run_), dy(plan_.dy, first_, run_);
    [[maybe_unused]] const Runs dx(plan_.dx, first_, run_);
    int64_t lane = 0, done = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Pack<T> pivots(pivot_[i]);
      const char *x_segment = x.set(i), *dy_segment = dy.set(i);
      for (int64_t segment = 0; segment < segments; ++segment) {
        if constexpr (kResults) {
          ahead.distance = bytes_between(x_segment, dx.set(i) + segment * dx.segment_step);
        }
        TreeGradientSums<T> sums;
        if constexpr (kOneTree) {
          take_run<kRest>(sums, reinterpret_cast<const T*>(x_segment), reinterpret_cast<const T*>(dy_segment), cut,
                          pivots, ahead);
        } else {
          const char *x_line = x_segment, *dy_line = dy_segment;
          for (int64_t line = 0; line < lines; ++line) {
            TreeGradientSums<T> inner = sums;
            add_run<kRest>(inner, reinterpret_cast<const T*>(x_line), reinterpret_cast<const T*>(dy_line), cut, pivots,
                           ahead);
            sums = inner;
            x_line += x.line_step;
            dy_line += dy.line_step;
          }
          sums.finish();
        }
        if constexpr (!kWantsRest) lanes.gradients[lane] = dy_segment;
        x_segment += x.segment_step;
        dy_segment += dy.segment_step;
        lanes.put(lane, sums);
        lanes.off[lane] = off_[i];
        if constexpr (kWantsRest) lanes.mean[lane] = mean_[i];
        lanes.rstd[lane] = rstd_[i];
        ++lane;
        if (lane == kFoldedSegments || done + lane == all) {
          finish(lanes, lane, done, dy.line_step);
          done += lane;
          lane = 0;
        }
      }
    }
  }

  // The sums of segments [first, first + count) of the batch.
  void finish(const Lanes& lanes, int64_t count, int64_t first, int64_t line_step) {
    double dy[kFoldedSegments], product[kFoldedSegments], rest[kFoldedSegments], dy_xhat[kFoldedSegments];
    fold_eight(lanes.dy, dy);
    fold_eight(lanes.product, product);
    if constexpr (kWantsRest) fold_eight(lanes.rest, rest);
    // Sets of one segment are a lane each: their numbers are at hand.
    const bool of_sets = !kWantsRest && plan_.segments == 1;
    const double *const off = of_sets ? off_ + first : lanes.off, *const mean = of_sets ? mean_ + first : lanes.mean;
    const double* const rstd = of_sets ? rstd_ + first : lanes.rstd;
    const auto totals = [&](int64_t lane) {
      return TreeTotals::of<T>(dy[lane], product[lane], off[lane], mean[lane], rstd[lane]);
    };
    const double values = static_cast<double>(plan_.elements);
    int64_t failures = 0;
#pragma omp simd reduction(| : failures)
    for (int64_t lane = 0; lane < kFoldedSegments; ++lane) {
      dy_xhat[lane] = totals(lane).dy_xhat;
      if constexpr (kWantsRest) rest[lane] += off[lane] * values;
      failures |= totals(lane).trusted ? 0 : 1;
    }
    const int64_t to = first_ * plan_.segments + first;
    const auto put = [&](size_t n) {
      std::memcpy(sums_.dy + to, dy, n * sizeof(double));
      std::memcpy(sums_.dy_xhat + to, dy_xhat, n * sizeof(double));
      if constexpr (kWantsRest) std::memcpy(sums_.rest + to, rest, n * sizeof(double));
    };
    if (count == kFoldedSegments) {
      put(kFoldedSegments);
    } else {
      put(static_cast<size_t>(count));
    }
    for (int64_t lane = 0; failures != 0 && lane < count; ++lane) {
      if (totals(lane).trusted) continue;
      // Without any dy, the product's 0 of finite x can be trusted.
      const bool zeros = !kWantsRest && dy[lane] == 0 && dy_xhat[lane] == 0;
      if (!(zeros && nothing_in(lanes.gradients[lane], line_step))) sum_carefully(to + lane);
    }
  }

  [[gnu::noinline]] FASTNORM_LOOPS bool nothing_in(const char* dy_segment, int64_t line_step) const {
    Pack<float> all(0.0f);
    const int64_t run = run_, lines = lines_;
    for (int64_t line = 0; line < lines; ++line, dy_segment += line_step) {
      all = either(all, reinterpret_cast<const float*>(dy_segment), run);
    }
    return all_zero(all);
  }

  [[gnu::noinline]] void sum_carefully(int64_t index) const {
    const int64_t set = index / plan_.segments, segment = index % plan_.segments;
    sums_.put(index, careful_sums<T>(plan_, run_, set, segment, kept_statistic(plan_, args_, set), sums_[index]));
  }

  // SegmentTable::centre for all sets of the batch.
  void centre() {
    if (!kWantsRest || !args_.centred) return;
    const int64_t segments = plan_.segments, sets = count_;
    const double count = static_cast<double>(plan_.set_size());
    double *const dy_xhat = sums_.dy_xhat + first_ * segments, *const rest = sums_.rest + first_ * segments;
    const double* const dy = sums_.dy + first_ * segments;
    if (segments == 1) {
#pragma omp simd
      for (int64_t i = 0; i < sets; ++i) {
        const bool any = (rest[i] != 0) & (std::fabs(rest[i]) < kMostOrdinary);
        const double off = any ? rest[i] / count : 0, part = off * rstd_[i] * dy[i];
        dy_xhat[i] -= any ? part : 0;
        rest[i] = off;
        off_[i] -= off;
      }
      return;
    }
    for (int64_t i = 0, first = first_ * segments; i < sets; ++i, first += segments) {
      sums_.centre(first, segments, count, rstd_[i]);
      off_[i] -= sums_.rest_of_mean(first);
    }
  }

  // The sums of g and of g * xhat of the sets of the batch, and what there is of g, as channel_means has them.
  void weigh(double* a, double* b, double* size, double* a_lo, double* b_lo) const {
    const int64_t segments = plan_.segments, sets = count_;
    const double *dy = sums_.dy + first_ * segments, *dy_xhat = sums_.dy_xhat + first_ * segments;
    if (segments == 1) {
      alignas(64) double weight[kGradientSets];
      for (int64_t i = 0; weight_step_ == 0 && i < kGradientSets; ++i) weight[i] = static_cast<double>(*weights_);
      if (weight_step_ != 0) take_numbers(weights_, weight_step_, weight);
#pragma omp simd
      for (int64_t i = 0; i < sets; ++i) {
        if constexpr (!kWantsRest) {
          a[i] = weight[i] * dy[i];
          b[i] = weight[i] * dy_xhat[i];
          size[i] = size_of_gradient(weight[i], dy[i], dy_xhat[i]);
        } else {
          const WeightedSums g = weighted_sums(weight[i], dy[i], dy_xhat[i]);
          a[i] = g.a, b[i] = g.b, a_lo[i] = g.a_lo, b_lo[i] = g.b_lo;
        }
      }
      return;
    }
    // Few segments side by side, as channel_means goes through them one by one.
    const bool in_order = weight_step_ == (args_.weight ? segments : 0);
    if (segments <= kNarrowSet && in_order) {
      const T* const weights = weights_;
      const auto along = [=](auto narrow, auto weighted) {
        constexpr int64_t kSegments = decltype(narrow)::value;
#pragma omp simd
        for (int64_t i = 0; i < sets; ++i) {
          double sum_a = 0, sum_b = 0, sum_size = 0;
          for_constants<kSegments>([&](auto segment) {
            const int64_t k = i * kSegments + segment;
            const double weight = decltype(weighted)::value ? static_cast<double>(weights[k]) : 1;
            sum_a += weight * dy[k];
            sum_b += weight * dy_xhat[k];
            if constexpr (!kWantsRest) sum_size += size_of_gradient(weight, dy[k], dy_xhat[k]);
          });
          a[i] = sum_a, b[i] = sum_b;
          if constexpr (kWantsRest) a_lo[i] = b_lo[i] = 0;
          if constexpr (!kWantsRest) size[i] = sum_size;
        }
      };
      return with_narrow_set(segments, [&](auto narrow) {
        args_.weight ? along(narrow, std::true_type{}) : along(narrow, std::false_type{});
      });
    }
    for (int64_t i = 0; i < sets; ++i) {
      if constexpr (kMayOverflow<T>) {
        const WeightedSums g = weighted_sums(args_.weight ? weight_of(i, 0) : nullptr, dy, dy_xhat, segments);
        a[i] = g.a, b[i] = g.b, a_lo[i] = g.a_lo, b_lo[i] = g.b_lo;
        dy += segments;
        dy_xhat += segments;
      } else {
        double sum_a = 0, sum_b = 0, sum_size = 0;
        for (int64_t segment = 0; segment < segments; ++segment) {
          const double weight = static_cast<double>(*weight_of(i, segment));
          sum_a += weight * *dy;
          sum_b += weight * *dy_xhat;
          sum_size += size_of_gradient(weight, *dy++, *dy_xhat++);
        }
        a[i] = sum_a, b[i] = sum_b, size[i] = sum_size;
      }
    }
  }

  // What channel_means does, for all sets of the batch.
  [[gnu::noinline]] void prepare() {
    alignas(64) double a[kGradientSets], b[kGradientSets], size[kGradientSets], a_lo[kGradientSets],
        b_lo[kGradientSets];
    const double count = static_cast<double>(plan_.set_size()), centred = args_.centred ? 1 : 0;
    if (args_.weight) {
      weights_ = args_.weight + plan_.set_param.offset(first_);
      weight_step_ = inner_stride(plan_.set_param);
    }
    centre();
    weigh(a, b, size, a_lo, b_lo);
    const int64_t rounded = whole_lanes(count_);
#pragma omp simd
    for (int64_t i = 0; i < rounded; ++i) {
      const GradientMeans means =
          GradientMeans::of_sums<T>(centred * a[i], b[i], count, mean_[i], rstd_[i], rstd_lo_[i],
                                    kWantsRest ? centred * a_lo[i] : 0, kWantsRest ? b_lo[i] : 0);
      factor_a_[i] = Gradient::a_of(means, off_[i], rstd_[i]);
      factor_b_[i] = Gradient::b_of(means, rstd_[i]);
      mean_g_[i] = means.a;
      mean_g_xhat_[i] = means.b;
      plain_[i] = (kWantsRest ? means.plain : plain(means, size[i], count, rstd_[i])) ? 1 : 0;
    }
  }

  template <bool kPastCache, class Lines>
  void write(const Lines& lines) const {
    write_mending<T>(plan_.dx_in_place(), [&](auto mends) {
      constexpr bool kMends = decltype(mends)::value;
      if constexpr (kPastCache || kMends) {
        write<kPastCache, kMends, kAnyRun, false>(lines);
      } else {
        if constexpr (!kMayOverflow<T>) {
          if (asks_) return write<false, false, kAnyRun, true>(lines);
        }
        with_short_run(true, run_, [&](auto packs) { write<false, false, packs, false>(lines); });
      }
    });
  }

  template <bool kPastCache, bool kMends, int kPacks, bool kAsks, class Lines>
  [[gnu::noinline]] FASTNORM_LOOPS void write(const Lines& lines) const {
    const int64_t count = count_, segments = plan_.segments, run = run_;
    const Runs x(plan_.x, first_, run), dy(plan_.dy, first_, run), dx(plan_.dx, first_, run);
    const int64_t weight_step = args_.weight ? 1 : 0;
    [[maybe_unused]] const int64_t next_x = kAsks ? distance_to_next(plan_.x) : 0;
    [[maybe_unused]] const int64_t next_dy = kAsks ? distance_to_next(plan_.dy) : 0;
    for (int64_t i = 0; i < count; ++i) {
      if (plain_[i] == 0) continue;
      Gradient gradient(pivot_[i], rstd_[i], factor_a_[i], factor_b_[i]);
      const T* weight = weight_of(i, 0);
      const char *x_segment = x.set(i), *dy_segment = dy.set(i);
      char* dx_segment = dx.set(i);
      for (int64_t segment = 0; segment < segments; ++segment) {
        gradient.weigh(*weight);
        const char *x_line = x_segment, *dy_line = dy_segment;
        char* dx_line = dx_segment;
        for (int64_t line = 0; line < lines.count; ++line) {
          const T *from = reinterpret_cast<const T*>(x_line), *dy_from = reinterpret_cast<const T*>(dy_line);
          T* const to = reinterpret_cast<T*>(dx_line);
          if constexpr (kAsks) {
            ask_for(from, run, next_x);
            ask_for(dy_from, run, next_dy);
          }
          if constexpr (kPacks == kAnyRun) {
            write_run<kPastCache>(to, run, [&](auto at) {
              return mended<kMends>(gradient(at, from, dy_from),
                                    [&] { return careful(i, segment)(at, from, dy_from); });
            });
          } else {
            write_short_run<kPacks>(to, run, [&](int, Whole at) { return gradient(at, from, dy_from); });
          }
          x_line += x.line_step;
          dy_line += dy.line_step;
          dx_line += dx.line_step;
        }
        weight += weight_step;
        x_segment += x.segment_step;
        dy_segment += dy.segment_step;
        dx_segment += dx.segment_step;
      }
    }
  }

  // dx of float32 data, each value by itself.
  InputGradient<T, double, Same<double>> careful(int64_t i, int64_t segment) const {
    return {kept_statistic(plan_, args_, first_ + i), mean_g_[i], mean_g_xhat_[i],
            Same<double>(static_cast<double>(*weight_of(i, segment)))};
  }

  [[gnu::noinline]] void write_carefully(int64_t i) const {
    GradientMeans means;
    means.a = mean_g_[i];
    means.b = mean_g_xhat_[i];
    Statistic s = kept_statistic(plan_, args_, first_ + i);
    if (args_.centred) s.mean_lo += sums_.rest_of_mean((first_ + i) * plan_.segments);
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      channel_unit_gradient(plan_, args_, run_, first_ + i, segment, s, means);
    }
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  const int64_t run_, lines_;
  const bool asks_;  // is dx asked for while a set is measured, and the next batch while dx is written?
  SegmentTable<T>& sums_;
  int64_t first_ = 0, count_ = 0;  // the batch
  const T one_ = 1;
  const T* weights_ = &one_;
  int64_t weight_step_ = 0;
  alignas(64) double mean_[kGradientSets] = {}, mean_lo_[kGradientSets] = {}, rstd_[kGradientSets] = {};
  double rstd_lo_[kGradientSets] = {}, off_[kGradientSets];
  double mean_g_[kGradientSets], mean_g_xhat_[kGradientSets];
  T pivot_[kGradientSets], factor_a_[kGradientSets], factor_b_[kGradientSets], plain_[kGradientSets];
};

}  // namespace
}  // namespace fastnorm
