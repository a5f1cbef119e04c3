// Forward of small float32 sets of several segments with a weight each (group norm): the statistics of a batch are
// computed side by side, and the next set is measured between the segments of this one. Large sets come one by one.
#pragma once

#include "isa/set_batches.hpp"

namespace fastnorm {
namespace {

// Adds up a set that is one run, a part of it at a time.
class RunInParts {
 public:
  RunInParts(const float* x, int64_t n, int64_t distance) : x_(x), size_(n), distance_(distance) {}

  // What there is before `end`, four packs at a time.
  FASTNORM_INLINE void add_up_to(int64_t end) {
    PlainSums<> inner = sums_;
    constexpr int64_t kStep = 4 * kPack;
    for (; done_ + kStep <= end; done_ += kStep) {
      ask_for(x_ + done_, kStep, distance_);
      FASTNORM_UNROLL
      for (int64_t i = 0; i < kStep; i += kPack) inner.add(Whole{done_ + i}, x_);
    }
    sums_ = inner;
  }
  FASTNORM_INLINE const PlainSums<>& total() {
    add_up_to(size_);
    for (; done_ + kPack <= size_; done_ += kPack) sums_.add(Whole{done_}, x_);
    if (done_ < size_) sums_.add(Partial{done_, size_ - done_}, x_);
    done_ = size_;
    return sums_;
  }

 private:
  const float* x_;
  int64_t size_, distance_, done_ = 0;
  PlainSums<> sums_;
};

// Sets from this size on go one by one: then those that are normalised lie in the nearest cache (14 x 14: 53 us to 46).
constexpr int64_t kLongGroup = 1024;

class GroupBatches {
 public:
  GroupBatches(const Plan& plan, const NormArgs<float>& args, int64_t run)
      : plan_(plan),
        args_(args),
        run_(run),
        lines_(plan.elements / run),
        distance_(reading_ahead<float>(plan, plan.x, plan.whole.inner_size())),
        one_run_(plan.x.aligned && plan.whole.rank == 1 && plan.whole.stride[0] == sizeof(float)) {}

  static bool suit(const Plan& plan, int64_t run) {
    return run > 0 && plan.segments > 1 && plan.family == Family::channel && fits_batch(plan) &&
           plan.x.segment.rank < 2 && plan.y.segment.rank < 2;
  }

  void forward(int64_t begin, int64_t end) const {
    const int64_t packs = (plan_.set_size() + kPack - 1) / kPack;
    if (one_run_ && distance_ == 0 && !args_.past_cache && plan_.set_size() >= kLongGroup) {
      return one_by_one(begin, end, packs);
    }
    for_batches<Batch>(
        plan_, kBatchElements, begin, end, [&](Batch& batch) { measure(batch); },
        [&](Batch& batch) { finish_batch(plan_, args_, packs, batch); },
        [&](const Batch& now, Batch& next) {
          if (!now.in_float) {
            normalise_each(plan_, args_, run_, packs, now);
            return measure(next);
          }
          if (args_.past_cache) return normalise<true, kAnyRun>(now, next);
          with_short_run<16>(lines_ == 1, run_, [&](auto packs) { normalise<false, packs>(now, next); });
        });
  }

 private:
  // From line to line and from segment to segment, in bytes. (A copy, as SetPlaces::View.)
  struct Steps {
    int64_t x_line, y_line, x_segment, y_segment;
    Steps(const Plan& plan, int64_t run)
        : x_line(run_step<float>(plan.x, run)),
          y_line(run_step<float>(plan.y, run)),
          x_segment(inner_stride(plan.x.segment)),
          y_segment(inner_stride(plan.y.segment)) {}
  };

  // As SetBatches::forward_one_by_one.
  [[gnu::noinline]] FASTNORM_LOOPS void one_by_one(int64_t begin, int64_t end, int64_t packs) const {
    const double count = static_cast<double>(plan_.set_size()), share = 1 / count;
    const double additions = static_cast<double>(packs + kPack);
    Offsets stats(plan_.set_stat, begin), params(plan_.set_param, begin);
    Offsets xs(plan_.x.set, begin), ys(plan_.y.set, begin);
    const Steps steps(plan_, run_);
    const char* x = plan_.x.data + xs.next();
    PlainSums<> sums = run_of(x).total();
    for (int64_t set = begin; set < end; ++set) {
      const int64_t stat = stats.next(), param = params.next();
      const double sum = fold(sums.sum), squares = fold(sums.squares);
      const SetNumbers numbers = SetNumbers::of<true>(sum, squares, 1, count, share, args_.eps, additions);
      const bool last = set + 1 == end;
      const char* const coming_x = last ? x : plan_.x.data + xs.next();
      char* const y = plan_.y.data + ys.next();
      RunInParts coming = run_of(coming_x);
      if (!numbers.in_float) {
        normalise_alone(plan_, args_, run_, set, PlainTotals{sum, squares, static_cast<double>(packs)});
      } else {
        store_numbers(args_, stat, numbers, count);
        if (last) {
          normalise_set<false, kAnyRun>(steps, x, y, set, param, numbers.mean, numbers.rstd, [](int64_t) {});
        } else {
          normalise_set<false, kAnyRun>(steps, x, y, set, param, numbers.mean, numbers.rstd,
                                        [&](int64_t segment) { coming.add_up_to((segment + 1) * plan_.elements); });
        }
      }
      if (!last) sums = coming.total();
      x = coming_x;
    }
  }

  RunInParts run_of(const char* x) const {
    const int64_t distance = distance_ != 0 ? distance_ : kNearAheadBytes;
    return RunInParts(reinterpret_cast<const float*>(x), plan_.whole.count, distance);
  }

  FASTNORM_LOOPS void measure(Batch& batch) const {
    const SetPlaces::View xs = batch.x.view();
    for (int64_t lane = 0; lane < batch.count; ++lane) {
      one_run_ ? batch.put(lane, run_of(xs[lane]).total()) : batch.put(lane, plain_whole(plan_, batch.first + lane));
    }
  }

  // kPacks: of a line, where a segment is a short one (with_short_run).
  template <bool kPastCache, int kPacks>
  [[gnu::noinline]] FASTNORM_LOOPS void normalise(const Batch& now, Batch& next) const {
    const SetPlaces::View xs = now.x.view(), ys = now.y.view(), next_xs = next.x.view();
    const Steps steps(plan_, run_);
    const int64_t elements = plan_.elements, measured = one_run_ ? next.count : 0;
    for (int64_t lane = 0; lane < now.count; ++lane) {
      const int64_t set = now.first + lane, param = now.param[lane];
      const double mean = now.mean[lane], rstd = now.rstd[lane];
      if (lane < measured) {
        RunInParts coming = run_of(next_xs[lane]);
        normalise_set<kPastCache, kPacks>(steps, xs[lane], ys[lane], set, param, mean, rstd,
                                          [&](int64_t segment) { coming.add_up_to((segment + 1) * elements); });
        next.put(lane, coming.total());
      } else {
        normalise_set<kPastCache, kPacks>(steps, xs[lane], ys[lane], set, param, mean, rstd, [](int64_t) {});
      }
    }
    if (!one_run_) measure(next);
  }

  [[gnu::noinline]] void normalise_units(int64_t set, int64_t unit, int64_t end, const Statistic& s) const {
    for (; unit < end; ++unit) normalise_unit(plan_, args_, run_, set, unit, s);
  }

  // before_segment(i) comes before each.
  template <bool kPastCache, int kPacks, class Before>
  FASTNORM_INLINE void normalise_set(const Steps& steps, const char* x_segment, char* y_segment, int64_t set,
                                     int64_t param, double mean, double rstd, const Before& before_segment) const {
    const int64_t segments = plan_.segments, run = run_, lines = kPacks == kAnyRun ? lines_ : 1;
    const float* weight = args_.weight ? args_.weight + param : nullptr;
    const float* bias = args_.bias ? args_.bias + param : nullptr;
    for (int64_t segment = 0; segment < segments; ++segment) {
      before_segment(segment);
      const double factor = weight ? rstd * static_cast<double>(weight[segment]) : rstd;
      if (zero_or_moderate(factor)) {
        const double shift = bias ? static_cast<double>(bias[segment]) : kNoBias;
        const FloatFormula<true, None, None> formula(FloatFactors::of(mean, 0, factor, shift), None{}, None{});
        const char* x_line = x_segment;
        char* y_line = y_segment;
        for (int64_t line = 0; line < lines; ++line) {
          const float* x = reinterpret_cast<const float*>(x_line);
          float* const y = reinterpret_cast<float*>(y_line);
          if constexpr (kPacks == kAnyRun) {
            write_run<kPastCache>(y, run, [&](auto at) { return formula(at, x); });
          } else {
            write_short_run<kPacks>(y, run, [&](int, Whole at) { return formula(at, x); });
          }
          x_line += steps.x_line;
          y_line += steps.y_line;
        }
      } else {
        const int64_t units = chunks_per_segment(plan_);
        normalise_units(set, segment * units, (segment + 1) * units, Statistic{mean, 0, rstd, 1});
      }
      x_segment += steps.x_segment;
      y_segment += steps.y_segment;
    }
  }

  const Plan& plan_;
  const NormArgs<float>& args_;
  int64_t run_, lines_, distance_;
  bool one_run_;
};

}  // namespace
}  // namespace fastnorm
