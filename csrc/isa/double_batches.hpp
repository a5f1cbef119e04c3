// Small float64 sets that are read in place, eight at a time: what moments_about and reciprocal_std do for one set,
// long chains of dependent operations, is done for eight side by side, with the same bits.
#pragma once

#include "isa/lane_statistics.hpp"
#include "isa/set_units.hpp"

namespace fastnorm {
namespace {

constexpr int64_t kDoubleSets = 8;

struct DoubleBatch {
  int64_t count = 0;
  const double* x[kDoubleSets];
  alignas(64) double pivot[kDoubleSets], sum[kDoubleSets] = {}, squares[kDoubleSets] = {};
  double lost_sum[kDoubleSets] = {}, lost_squares[kDoubleSets] = {};
  double mean[kDoubleSets], mean_lo[kDoubleSets], var[kDoubleSets], rstd[kDoubleSets], near[kDoubleSets],
      plain[kDoubleSets];
};

class DoubleBatches {
 public:
  DoubleBatches(const Plan& plan, const NormArgs<double>& args) : plan_(plan), args_(args) {}

  // Is every set one run, and that one block?
  static bool suit(const Plan& plan, int64_t run) {
    return run > 0 && run == plan.elements && plan.segments == 1 && plan.whole.rank <= 1 && run <= kBlock &&
           plan.whole_blocks.count == 1;
  }

  void forward(int64_t begin, int64_t end) const {
    for (int64_t first = begin; first < end; first += kDoubleSets) {
      DoubleBatch batch;
      batch.count = end - first < kDoubleSets ? end - first : kDoubleSets;
      for (int64_t i = 0; i < kDoubleSets; ++i) {
        const int64_t set = first + (i < batch.count ? i : 0);
        batch.x[i] = reinterpret_cast<const double*>(plan_.x.data + plan_.x.set.offset(set));
      }
      if (args_.centred) {
        measure(batch);
      } else {
        measure_squares(batch);
      }
      finish_lanes({batch.pivot, batch.sum, batch.lost_sum, batch.squares, batch.lost_squares},
                   {batch.mean, batch.mean_lo, batch.var, batch.rstd, batch.near, batch.plain}, kDoubleSets,
                   static_cast<double>(plan_.elements), args_.eps);
      for (int64_t i = 0; i < batch.count; ++i) normalise(first + i, statistic(batch, first + i, i));
    }
  }

 private:
  // As block_moments has it.
  FASTNORM_LOOPS void measure(DoubleBatch& batch) const {
    const int64_t n = plan_.elements;
    const double count = static_cast<double>(n);
    // A set's pivot is on its way while the deviations of the one before are added up.
    for (int64_t k = 0; k <= batch.count; ++k) {
      if (k < batch.count) {
        const double* x = batch.x[k];
        batch.pivot[k] = fastnorm::sum(n, [&](auto at) { return at.template load<double>(x); }) / count;
      }
      if (k == 0) continue;
      const int64_t i = k - 1;
      const double* x = batch.x[i];
      const Pack<double> pivots(batch.pivot[i]);
      const Pair sums = fastnorm::sum(n, [&](auto at) { return deviations(at.template load<double>(x), pivots); });
      batch.sum[i] = sums.first;
      batch.squares[i] = sums.second;
      if (!few_terms<double>(n)) continue;
      const Pair lost = fastnorm::sum(n, [&](auto at) { return lost_deviations(at.template load<double>(x), pivots); });
      batch.lost_sum[i] = lost.first;
      batch.lost_squares[i] = lost.second;
    }
    for (int64_t i = batch.count; i < kDoubleSets; ++i) batch.pivot[i] = 0;
  }

  // As block_squares has it.
  FASTNORM_LOOPS void measure_squares(DoubleBatch& batch) const {
    for (int64_t i = 0; i < kDoubleSets; ++i) batch.pivot[i] = 0;
    for (int64_t i = 0; i < batch.count; ++i) {
      const double* x = batch.x[i];
      batch.squares[i] = fastnorm::sum(plan_.elements, [&](auto at) {
        const Pack<double> v = at.template load<double>(x);
        return v * v;
      });
    }
  }

  // Stored; measured again, with a scale, where that is needed.
  Statistic statistic(const DoubleBatch& batch, int64_t set, int64_t i) const {
    if (batch.plain[i] == 0) {
      Moments moments = set_moments<double>(plan_, set, args_.centred, 1);
      return finish_set(plan_, args_, set, moments);
    }
    const int64_t stat = plan_.set_stat.offset(set);
    if (args_.mean) args_.mean[stat] = batch.mean[i];
    if (args_.mean_lo) args_.mean_lo[stat] = batch.mean_lo[i];
    if (args_.var) args_.var[stat] = batch.var[i];
    if (args_.rstd) args_.rstd[stat] = batch.rstd[i];
    Statistic s{batch.mean[i], batch.mean_lo[i], batch.rstd[i], 1};
    drop_negligible(s);
    return s;
  }

  FASTNORM_LOOPS void normalise(int64_t set, const Statistic& s) const {
    const int64_t n = plan_.elements;
    const double* const x = reinterpret_cast<const double*>(plan_.x.data + plan_.x.set.offset(set));
    double* const y = reinterpret_cast<double*>(plan_.y.data + plan_.y.set.offset(set));
    with_normalise<double, double>(plan_, args_, s, plan_.set_param.offset(set), 0, [&](const auto& formula) {
      for_stored_packs(args_.past_cache, y, n, [&](auto at, auto out) { out.store(at, y, formula(at, x)); });
    });
  }

  const Plan& plan_;
  const NormArgs<double>& args_;
};

}  // namespace
}  // namespace fastnorm
