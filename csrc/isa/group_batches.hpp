// Forward of small float32 sets of several segments with a weight each (group norm): the statistics of a batch are
// computed side by side, and the next set is measured between the segments of this one.
#pragma once

#include "isa/set_batches.hpp"

namespace fastnorm {
namespace {

// y = formula(x) along a run, which ends with a whole pack like the others, not with a part of one: it computes some
// values twice, from x as it was, should y be x.
template <class Formula>
FASTNORM_INLINE void write_run(const float* x, float* y, int64_t n, const Formula& formula) {
  const auto each = [&](auto at) { at.store(y, formula(at, x)); };
  if (n < kPack || n % kPack == 0) return for_packs(n, each);
  const Whole end{n - kPack};
  const Pack<float> last = formula(end, x);
#pragma GCC unroll 4
  for (int64_t i = 0; i < end.start; i += kPack) each(Whole{i});
  end.store(y, last);
}

// Adds up a set that is one run, a part of it at a time.
class RunInParts {
 public:
  RunInParts(const float* x, int64_t n, int64_t distance) : x_(x), size_(n), distance_(distance) {}

  // What there is before `end`, four packs at a time.
  FASTNORM_INLINE void add_up_to(int64_t end) {
    PlainSums<> inner = sums_;
    constexpr int64_t kStep = 4 * kPack;
    for (; done_ + kStep <= end; done_ += kStep) {
      if (distance_ != 0) {
        for (int64_t i = 0; i < kStep; i += kPack) prefetch(x_ + done_ + i, distance_);
      }
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
    return run > 0 && plan.segments > 1 && plan.family == Family::channel && fits_batch(plan);
  }

  void forward(int64_t begin, int64_t end) const {
    const int64_t packs = (plan_.set_size() + kPack - 1) / kPack;
    for_batches(
        plan_, begin, end, [&](Batch& batch) { measure(batch); },
        [&](Batch& batch) { finish_batch(plan_, args_, packs, batch); },
        [&](const Batch& now, Batch& next) {
          if (now.in_float) return normalise(now, next);
          normalise_one_by_one(plan_, args_, run_, packs, now);
          measure(next);
        });
  }

 private:
  RunInParts run_of(int64_t set) const {
    return RunInParts(Line<float>(plan_.x, set, 0, run_).at(0, 0), plan_.whole.count, distance_);
  }

  void measure(Batch& batch) const {
    for (int64_t lane = 0; lane < batch.count; ++lane) measure(batch, lane);
  }
  void measure(Batch& batch, int64_t lane) const {
    const int64_t set = batch.first + lane;
    if (one_run_) return batch.put(lane, run_of(set).total());
    batch.put(lane, plain_whole(plan_, set));
  }

  FASTNORM_LOOPS void normalise(const Batch& now, Batch& next) const {
    for (int64_t lane = 0; lane < now.count; ++lane) {
      const bool measures = lane < next.count;
      if (measures && one_run_) {
        RunInParts coming = run_of(next.first + lane);
        normalise_set(now, lane, [&](int64_t segment) { coming.add_up_to((segment + 1) * plan_.elements); });
        next.put(lane, coming.total());
      } else {
        if (measures) measure(next, lane);
        normalise_set(now, lane, [](int64_t) {});
      }
    }
  }

  void normalise_units(int64_t set, int64_t unit, int64_t end, const Statistic& s) const {
    for (; unit < end; ++unit) normalise_unit(plan_, args_, run_, set, unit, s);
  }

  // before_segment(i) comes before each.
  template <class Before>
  FASTNORM_INLINE void normalise_set(const Batch& now, int64_t lane, const Before& before_segment) const {
    const int64_t set = now.first + lane, units = chunks_per_segment(plan_);
    const float* weight = args_.weight ? args_.weight + now.param[lane] : nullptr;
    const float* bias = args_.bias ? args_.bias + now.param[lane] : nullptr;
    const double rstd = now.rstd[lane];
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      before_segment(segment);
      const double factor = weight ? rstd * static_cast<double>(weight[segment]) : rstd;
      if (!moderate(factor) && factor != 0) {
        normalise_units(set, segment * units, (segment + 1) * units, Statistic{now.mean[lane], 0, rstd, 1});
        continue;
      }
      const SetFormula<true, None, Same<float>> formula{now.high_mean[lane], now.low_mean[lane],
                                                        static_cast<float>(factor), None{},
                                                        Same<float>(bias ? bias[segment] : 0.0f)};
      const Line<float> from(plan_.x, set, segment, run_), to(plan_.y, set, segment, run_);
      for (int64_t line = 0; line < lines_; ++line) {
        const float* x = from.at(line, 0);
        float* y = to.at(line, 0);
        if (args_.past_cache) {
          for_stored_packs(true, y, run_, [&](auto at, auto out) { out.store(at, y, formula(at, x)); });
        } else {
          write_run(x, y, run_, formula);
        }
      }
    }
  }

  const Plan& plan_;
  const NormArgs<float>& args_;
  int64_t run_, lines_, distance_;
  bool one_run_;
};

}  // namespace
}  // namespace fastnorm
