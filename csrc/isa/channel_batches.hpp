// Backward of float32 sets that are read in place, several at a time: the sums of eight segments are folded together,
// so that what there is to do once per segment costs little beside a few dozen values.
#pragma once

#include "isa/channel_sums.hpp"

namespace fastnorm {
namespace {

template <class T>
inline GradientMeans channel_means(const Plan& plan, const NormArgs<T>& args, int64_t set, const Statistic& s,
                                   const SegmentTable<T>& sums) {
  const int64_t param = plan.set_param.offset(set);
  Sum a, b;
  double size = 0;
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    const double weight = args.weight ? static_cast<double>(args.weight[param + segment]) : 1;
    const SegmentSums& of_dy = sums[set * plan.segments + segment];
    accumulate<T>(a, {weight * of_dy.dy.value(), 0});
    accumulate<T>(b, {weight * of_dy.dy_xhat.value(), 0});
    size += std::fabs(weight) * of_dy.size;
  }
  return GradientMeans::of<T>(a, b, size, static_cast<double>(plan.set_size()), args.centred, true, s);
}

template <class T>
FASTNORM_LOOPS inline void channel_unit_gradient(const Plan& plan, const NormArgs<T>& args, int64_t run, int64_t set,
                                                 int64_t unit, const Statistic& s, const GradientMeans& means) {
  const int64_t param = plan.set_param.offset(set) + segment_of(plan, unit);
  const double weight = args.weight ? static_cast<double>(args.weight[param]) : 1;
  const Operands<2, true> operands{{&plan.x, &plan.dy}, &plan.dx};
  visit_unit<T>(plan, operands, run, set, unit, [&](const T* const* in, T* dx, int64_t, int64_t n) {
    const T *x = in[0], *dy = in[1];
    if (args.constant_stats) return input_gradient_constant(dy, dx, n, s, Same<double>(weight));
    const auto along = [&](const auto& gradient) {
      for_stored_packs(args.past_cache, dx, n, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    };
    if constexpr (!kMayOverflow<T>) {
      if (means.in_float) return along(InputGradient<T, T, Same<T>>(s, means.a, means.b, Same<T>(weight)));
    }
    along(InputGradient<T, double, Same<double>>(s, means.a, means.b, Same<double>(weight)));
  });
}

// The sums of one unit.
template <class T>
inline SegmentSums segment_sums(const Plan& plan, int64_t run, int64_t set, int64_t unit, const Statistic& s) {
  if constexpr (!kMayOverflow<T>) {
    SegmentSums sums;
    if (tree_unit_sums(plan, run, set, unit, s, sums)) return sums;
  }
  return unit_sums<T>(plan, run, set, unit, s, [](int64_t) { return None{}; });
}

// Segments whose sums are folded together.
constexpr int64_t kFoldedSegments = 8;
// Values of the sets of a batch: the nearest cache holds x and dy of as many.
constexpr int64_t kGradientBatchElements = 4096;

// The sets of a batch are neighbours along the innermost axis of sets: everything of theirs lies at equal distances.
class ChannelBatches {
 public:
  ChannelBatches(const Plan& plan, const NormArgs<float>& args, int64_t run, SegmentTable<float>& sums)
      : plan_(plan), args_(args), run_(run), lines_(plan.elements / run), sums_(sums) {}

  // Can all segments be read in place, each at one go?
  static bool suit(const Plan& plan, int64_t run) {
    const auto steps = [](const Operand& operand) { return operand.segment.rank < 2; };
    return run > 0 && chunks_per_segment(plan) == 1 && steps(plan.x) && steps(plan.dy) && steps(plan.dx);
  }

  void backward(int64_t begin, int64_t end) {
    const int64_t fitting = kGradientBatchElements / plan_.set_size();
    const int64_t size = fitting < 1 ? 1 : fitting < kPack ? fitting : kPack;
    int64_t row = plan_.sets;
    for (const Walk* walk : {&plan_.x.set, &plan_.dy.set, &plan_.dx.set, &plan_.set_param, &plan_.set_stat}) {
      if (walk->rank > 0 && walk->inner_size() < row) row = walk->inner_size();
    }
    for (first_ = begin; first_ < end; first_ += count_) {
      const int64_t left = row - first_ % row, room = end - first_ < left ? end - first_ : left;
      count_ = room < size ? room : size;
      take_statistics();
      if (reading_ahead<float>(plan_, plan_.x, run_) > 0) {
        measure(ReadAhead(plan_, run_));
      } else {
        measure(NoReadAhead{});
      }
      prepare();
      for (int64_t i = 0; i < count_; ++i) {
        if (plain_[i] == 0) write_carefully(i);
      }
      write();
    }
  }

 private:
  struct Lanes {
    Pack<double> dy[kFoldedSegments], product[kFoldedSegments], size[kFoldedSegments];
    double off[kFoldedSegments], rstd[kFoldedSegments];
  };

  // One operand of the batch: line k of segment j of set i.
  template <class T>
  struct Runs {
    char* base;
    int64_t set_step, segment_step, line_step;

    Runs(const Operand& operand, int64_t set, int64_t run)
        : base(operand.data + operand.set.offset(set)),
          set_step(inner_stride(operand.set)),
          segment_step(inner_stride(operand.segment)),
          line_step(operand.element.rank == 2 ? operand.element.stride[0] : run * static_cast<int64_t>(sizeof(T))) {}
    T* at(int64_t i, int64_t j, int64_t k) const {
      return reinterpret_cast<T*>(base + i * set_step + j * segment_step + k * line_step);
    }
  };
  static int64_t inner_stride(const Walk& walk) { return walk.rank > 0 ? walk.stride[walk.rank - 1] : 0; }

  // What given_statistic and Pivot::of do, for all sets of the batch.
  void take_statistics() {
    const int64_t stat = plan_.set_stat.offset(first_), step = inner_stride(plan_.set_stat);
    for (int64_t i = 0; i < count_; ++i) {
      mean_[i] = args_.mean ? args_.mean[stat + i * step] : 0;
      mean_lo_[i] = args_.mean_lo ? args_.mean_lo[stat + i * step] : 0;
      rstd_[i] = args_.rstd[stat + i * step];
    }
#pragma omp simd
    for (int64_t i = 0; i < kPack; ++i) {
      const double mean_lo = std::fabs(mean_lo_[i]) * rstd_[i] < 0x1p-54 ? 0 : mean_lo_[i];
      pivot_[i] = static_cast<float>(mean_[i]);
      off_[i] = (static_cast<double>(pivot_[i]) - mean_[i]) - mean_lo;
    }
  }

  template <class Ahead>
  FASTNORM_LOOPS void measure(const Ahead& ahead) {
    Lanes lanes;
    const int64_t count = count_, segments = plan_.segments, all = count * segments, run = run_, lines = lines_;
    const Runs<const float> x(plan_.x, first_, run), dy(plan_.dy, first_, run);
    int64_t lane = 0, done = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Pack<float> pivots(pivot_[i]);
      for (int64_t segment = 0; segment < segments; ++segment) {
        TreeGradientSums sums;
        for (int64_t line = 0; line < lines; ++line) {
          TreeGradientSums inner = sums;
          inner.add_run(x.at(i, segment, line), dy.at(i, segment, line), run, pivots, ahead);
          sums = inner;
        }
        lanes.dy[lane] = sums.dy_sum.lanes;
        lanes.product[lane] = sums.product_sum.lanes;
        lanes.size[lane] = widen(sums.size);
        lanes.off[lane] = off_[i];
        lanes.rstd[lane] = rstd_[i];
        ++lane;
        if (lane == kFoldedSegments || done + lane == all) {
          finish(lanes, lane, done);
          done += lane;
          lane = 0;
        }
      }
    }
  }

  // The sums of segments [first, first + count) of the batch.
  void finish(const Lanes& lanes, int64_t count, int64_t first) {
    double dy[kFoldedSegments], product[kFoldedSegments], size[kFoldedSegments], dy_xhat[kFoldedSegments],
        untrusted[kFoldedSegments], failures = 0;
    fold_eight(lanes.dy, dy);
    fold_eight(lanes.product, product);
    fold_eight(lanes.size, size);
#pragma omp simd
    for (int64_t lane = 0; lane < kFoldedSegments; ++lane) {
      const TreeTotals totals = TreeTotals::of(dy[lane], product[lane], size[lane], lanes.off[lane], lanes.rstd[lane]);
      dy_xhat[lane] = totals.dy_xhat;
      untrusted[lane] = totals.trusted ? 0 : 1;
    }
    const int64_t to = first_ * plan_.segments + first;
    for (int64_t lane = 0; lane < count; ++lane) {
      sums_.dy[to + lane] = dy[lane];
      sums_.dy_xhat[to + lane] = dy_xhat[lane];
      sums_.size[to + lane] = size[lane];
      failures += untrusted[lane];
    }
    for (int64_t lane = 0; failures > 0 && lane < count; ++lane) {
      if (untrusted[lane] != 0) sums_.put(to + lane, careful_sums(to + lane));
    }
  }

  [[gnu::noinline]] SegmentSums careful_sums(int64_t index) const {
    const int64_t set = index / plan_.segments, segment = index % plan_.segments;
    return unit_sums<float>(plan_, run_, set, segment, kept_statistic(plan_, args_, set),
                            [](int64_t) { return None{}; });
  }

  // What channel_means and GradientFactors::of do, for all sets of the batch.
  void prepare() {
    double a[kPack], b[kPack], size[kPack];
    const double count = static_cast<double>(plan_.set_size()), centred = args_.centred ? 1 : 0;
    const int64_t segments = plan_.segments;
    const double *dy = sums_.dy + first_ * segments, *dy_xhat = sums_.dy_xhat + first_ * segments,
                 *of_dy = sums_.size + first_ * segments;
    param_ = plan_.set_param.offset(first_);
    param_step_ = inner_stride(plan_.set_param);
    for (int64_t i = 0; i < count_; ++i) {
      const float* weights = args_.weight ? args_.weight + param_ + i * param_step_ : nullptr;
      a[i] = b[i] = size[i] = 0;
      for (int64_t segment = i * segments; segment < (i + 1) * segments; ++segment) {
        const double weight = weights ? static_cast<double>(*weights++) : 1;
        a[i] += weight * dy[segment];
        b[i] += weight * dy_xhat[segment];
        size[i] += std::fabs(weight) * of_dy[segment];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kPack; ++i) {
      const GradientMeans means = GradientMeans::of_sums(centred * a[i], b[i], size[i], count, mean_[i], rstd_[i]);
      const double b_rstd = means.b * rstd_[i];
      factor_a_[i] = static_cast<float>(means.a + off_[i] * b_rstd);
      factor_b_[i] = static_cast<float>(b_rstd);
      factor_rstd_[i] = static_cast<float>(rstd_[i]);
      mean_g_[i] = means.a;
      mean_g_xhat_[i] = means.b;
      plain_[i] = means.in_float ? 1 : 0;
    }
  }

  FASTNORM_LOOPS void write() {
    const int64_t count = count_, segments = plan_.segments, run = run_, lines = lines_;
    const Runs<const float> x(plan_.x, first_, run), dy(plan_.dy, first_, run);
    const Runs<float> dx(plan_.dx, first_, run);
    for (int64_t i = 0; i < count; ++i) {
      if (plain_[i] == 0) continue;
      const GradientFactors factors{pivot_[i], factor_rstd_[i], factor_a_[i], factor_b_[i]};
      InputGradient<float, float, Same<float>> gradient(factors, Same<float>(1));
      for (int64_t segment = 0; segment < segments; ++segment) {
        if (args_.weight) gradient.weight.value = Pack<float>(args_.weight[param_ + i * param_step_ + segment]);
        for (int64_t line = 0; line < lines; ++line) {
          const float *from = x.at(i, segment, line), *dy_from = dy.at(i, segment, line);
          float* to = dx.at(i, segment, line);
          for_stored_packs(args_.past_cache, to, run,
                           [&](auto at, auto out) { out.store(at, to, gradient(at, from, dy_from)); });
        }
      }
    }
  }

  [[gnu::noinline]] void write_carefully(int64_t i) const {
    GradientMeans means;
    means.a = mean_g_[i];
    means.b = mean_g_xhat_[i];
    const Statistic s = kept_statistic(plan_, args_, first_ + i);
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      channel_unit_gradient(plan_, args_, run_, first_ + i, segment, s, means);
    }
  }

  const Plan& plan_;
  const NormArgs<float>& args_;
  const int64_t run_, lines_;
  SegmentTable<float>& sums_;
  int64_t first_ = 0, count_ = 0;  // the batch
  int64_t param_ = 0, param_step_ = 0;
  double mean_[kPack] = {}, mean_lo_[kPack] = {}, rstd_[kPack] = {}, off_[kPack];
  double mean_g_[kPack], mean_g_xhat_[kPack];
  float pivot_[kPack], factor_rstd_[kPack], factor_a_[kPack], factor_b_[kPack], plain_[kPack];
};

}  // namespace
}  // namespace fastnorm
