// The sums of the backward over float32 rows, a group of rows at a time and tile by tile of columns, in one reading:
// row sums of g = dy * weight and of g * (x - mean), column sums of dy and of dy * xhat (the gradients of bias and
// weight). All is float32 but the running sums: a tile's terms are added in short trees, along a row over the packs of
// the tile, along a column over the rows of the group, and then widened.
//
// Only for rows that `fits_tiles`, with weights that are 0 or `tile_weight`; how the terms of a row come out is for
// TileMeans to judge. A tile whose column sums may have overflowed or lost digits to underflow is added up in double.
#pragma once

#include <type_traits>
#include <utility>

#include "isa/segment.hpp"
#include "isa/short_trees.hpp"

namespace fastnorm {
namespace {

// Rows whose columns are added up in float32: each more would be a rounding more, and dweight has 8 u. Where rows are
// cut for other reasons, it is at multiples of this.
constexpr int kMostRows = 4;

// body(constant) for 0 .. count - 1: arrays that are indexed with constants stay in registers, in loops they may not.
template <class Body, int... k>
FASTNORM_INLINE void for_constants(std::integer_sequence<int, k...>, const Body& body) {
  (body(std::integral_constant<int, k>{}), ...);
}
template <int kCount, class Body>
FASTNORM_INLINE void for_constants(const Body& body) {
  for_constants(std::make_integer_sequence<int, kCount>{}, body);
}
#define FASTNORM_ROLLED _Pragma("GCC unroll 1")  // unrolled, the packs of four rows spill registers
#define FASTNORM_IN_PLACE __attribute__((always_inline))
inline int64_t whole_tiles(int64_t rows) { return (rows + kMostRows - 1) / kMostRows * kMostRows; }

// Columns of a tile, whose sums along a row are float32; columns of a strip, whose sums wait to be widened.
constexpr int64_t kRowTile = kTreePacks * kPack;
constexpr int64_t kStrip = 8 * kRowTile;

// What TileMeans allows for lies below these powers, with a unit of float32 to spare.
inline bool fits_tiles(const Statistic& s) { return s.rstd > 0x1p-30 && s.rstd < 0x1p30 && std::fabs(s.mean) < 0x1p60; }
inline bool tile_weight(float w) { return w == 0 || (std::fabs(w) > 0x1p-30f && std::fabs(w) < 0x1p30f); }

// The means of g and g * xhat, and whether float32 did for them and does for dx: no infinity, and nothing that
// underflow can have taken from products with rstd and weights (2^-150 * 2^60 in xhat <= 2^8) is a unit of the mean of
// |g|.
struct TileMeans {
  double a, b;
  bool in_float() const {
    const double size = std::fabs(a) + std::fabs(b);
    return size > 0x1p-45 && size < 0x1p45;
  }
};

// dweight += dy * xhat, dbias += dy, in double, for one set after the other. dbias: nullptr where it is not wanted.
struct ParameterSums {
  double *dweight, *dbias;

  ParameterSums from(int64_t first) const { return {dweight + first, dbias ? dbias + first : nullptr}; }
  ParameterSums without_bias() const { return {dweight, nullptr}; }
};

template <class T>
FASTNORM_LOOPS inline void add_parameter_gradients(const T* x, const T* dy, int64_t n, const Statistic& s,
                                                   ParameterSums sums) {
  const Centre<T, double> centre(s);
  const Pack<double> rstd(s.rstd);
  for_packs(n, [&](auto at) {
    const PackPair terms = gradient_terms(at, x, dy, centre, rstd, None{});
    at.store(sums.dweight, at.template load<double>(sums.dweight) + terms.second);
    if (sums.dbias) at.store(sums.dbias, at.template load<double>(sums.dbias) + terms.first);
  });
}

// A row in tiles: what is read of it, and what that gives.
struct TiledRow {
  const float *x, *dy;
  const Statistic* statistic;
  float mean, mean_lo, rstd;
  Pair total{0, 0};  // of g (layer norm only) and of g * (x - mean)

  void set(const float* row_x, const float* row_dy, const Statistic& s) {
    x = row_x, dy = row_dy, statistic = &s;
    mean = static_cast<float>(s.mean);
    mean_lo = static_cast<float>((s.mean - static_cast<double>(mean)) + s.mean_lo);
    rstd = static_cast<float>(s.rstd);
  }
};

// kCentred: layer norm. kParams: there are weights, and the gradients of the parameters are wanted.
template <bool kCentred, bool kParams>
class RowTiles {
 public:
  // `weight` and the sums have room for whole packs.
  RowTiles(int64_t n, const float* weight, ParameterSums params, int64_t ahead)
      : n_(n), weight_(weight), params_(params), ahead_(ahead) {}

  // The sums of a group of up to kMostRows rows.
  void sum(TiledRow* rows, int count) {
    in_groups(count, [&](auto group, int first) {
      ahead_ == 0 ? sum_group<group, false>(rows + first) : sum_group<group, true>(rows + first);
    });
  }

  // The gradient of the bias alone, as `sum` has it: no x, not one with a NaN, may change its bits.
  void sum_bias(const TiledRow* rows, int count) {
    in_groups(count, [&](auto group, int first) { sum_group_bias<group>(rows + first); });
  }

  TileMeans means(const TiledRow& row) const {
    return {kCentred ? row.total.first * share_ : 0, row.total.second * share_ * row.statistic->rstd};
  }

  // Is every g of a row 0, for want of dy?
  FASTNORM_LOOPS bool zeros(const TiledRow& row) const {
    Size size;
    for_packs(n_, [&](auto at) { size.add(at, row.dy); });
    return size.total() == 0;
  }

  // dx = rstd * ((g - a) - (x - pivot) * b), as InputGradient has it.
  FASTNORM_LOOPS void write(const TiledRow& row, const TileMeans& means, float* dx, bool past_cache) const {
    const float *const x = row.x, *const dy = row.dy, *const weight = weight_;
    const Statistic& s = *row.statistic;
    const auto factors = GradientFactors::of(Pivot::of(s), s.rstd, means.a, means.b);
    const Pack<float> pivot(factors.pivot), rstd(factors.rstd), a(factors.a), b(factors.b);
    const auto body = [&](auto at, auto out) FASTNORM_IN_PLACE {
      Pack<float> g = at.template load<float>(dy), centred = at.template load<float>(x);
      if constexpr (kParams) g *= at.template load<float>(weight);
      if constexpr (kCentred) {
        g -= a;
        centred -= pivot;
      }
      out.store(at, dx, rstd * (g - centred * b));
    };
    if (!past_cache && n_ < kAlignedRow) {
      for_packs(n_, [&](auto at) { body(at, IntoCache{}); });
    } else if (past_cache) {
      for_aligned_packs(PastCache{}, dx, n_, body);
    } else {
      for_aligned_packs(IntoCache{}, dx, n_, body);
    }
  }

 private:
  // Rows from this length on are worth a partial pack more, for results in whole lines (512 x 768: 76 us to 67).
  static constexpr int64_t kAlignedRow = 24 * kPack;

  // body(rows in the group, the first of them)
  template <class Body>
  FASTNORM_INLINE static void in_groups(int count, const Body& body) {
    if (count == kMostRows) return body(std::integral_constant<int, kMostRows>{}, 0);
    int first = 0;
    for (; first + 2 <= count; first += 2) body(std::integral_constant<int, 2>{}, first);
    if (first < count) body(std::integral_constant<int, 1>{}, first);
  }

  // The registers of a group of rows, and their running sums.
  template <int kRows>
  struct Group {
    const float *x[kRows], *dy[kRows];
    Pack<float> mean[kRows], mean_lo[kRows], rstd[kRows];
    PackPair sums[kRows];
  };

  template <int kRows>
  struct Trees {
    Pack<float> g[kRows], product[kRows];
  };

  struct Watches {
    MagnitudeWatch weight, bias;
  };

  template <int kRows, bool kAhead>
  FASTNORM_LOOPS [[gnu::noinline]] void sum_group(TiledRow* rows) {
    Group<kRows> group;
    for_constants<kRows>([&](auto r) FASTNORM_IN_PLACE {
      group.x[r] = rows[r].x, group.dy[r] = rows[r].dy;
      group.mean[r] = Pack<float>(rows[r].mean), group.mean_lo[r] = Pack<float>(rows[r].mean_lo);
      group.rstd[r] = Pack<float>(rows[r].rstd);
      group.sums[r] = PackPair{0.0, 0.0};
    });
    for (int64_t first = 0; first < n_; first += kStrip) {
      const int64_t n = n_ - first < kStrip ? n_ - first : kStrip, packs = n / kPack;
      Watches watch;
      int64_t k = 0;
      for (; k + kTreePacks <= packs; k += kTreePacks) {
        tile<kRows, kAhead>(group, watch, k, first + k * kPack, kTreePacks, None{});
      }
      const int64_t start = first + packs * kPack;
      if (n % kPack != 0) {
        tile<kRows, kAhead>(group, watch, k, first + k * kPack, packs - k, Partial{start, n % kPack});
      } else if (k < packs) {
        tile<kRows, kAhead>(group, watch, k, first + k * kPack, packs - k, None{});
      }
      add_columns(rows, kRows, watch, first, n);
    }
    fold_sums<kRows>(group, rows);
  }

  // Up to kTreePacks packs of all rows, pack by pack: a row's packs are read by one instruction, which the processor's
  // reading ahead relies on.
  template <int kRows, bool kAhead, class Last>
  FASTNORM_INLINE void tile(Group<kRows>& group, Watches& watch, int64_t column, int64_t first, int64_t whole,
                            Last last) {
    Trees<kRows> trees;
    for_constants<kRows>([&](auto r) FASTNORM_IN_PLACE { trees.g[r] = trees.product[r] = Pack<float>(0.0f); });
    FASTNORM_ROLLED
    for (int64_t k = 0; k < whole; ++k) {
      pack<kRows, kAhead>(group, trees, watch, column + k, Whole{first + k * kPack});
    }
    if constexpr (!std::is_same_v<Last, None>) pack<kRows, kAhead>(group, trees, watch, column + whole, last);
    for_constants<kRows>([&](auto r) FASTNORM_IN_PLACE {
      if constexpr (kCentred) group.sums[r].first += widen(trees.g[r]);
      group.sums[r].second += widen(trees.product[r]);
    });
  }

  template <int kRows, bool kAhead, class At>
  FASTNORM_INLINE void pack(const Group<kRows>& group, Trees<kRows>& trees, Watches& watch, int64_t column, At at) {
    Pack<float> weight, dweight, dbias;
    if constexpr (kParams) weight = in_register(Whole{at.start}.template load<float>(weight_));
    for_constants<kRows>([&](auto r) FASTNORM_IN_PLACE {
      Pack<float> centred = at.template load<float>(group.x[r]);
      if constexpr (kCentred) centred = (centred - group.mean[r]) - group.mean_lo[r];
      Pack<float> g = in_register(at.template load<float>(group.dy[r])), product = g * centred;
      if constexpr (kParams) {
        const Pack<float> term = product * group.rstd[r];
        dweight = r == 0 ? term : dweight + term;
        if constexpr (kCentred) dbias = r == 0 ? g : dbias + g;
        g *= weight;
        product *= weight;
      }
      if constexpr (kCentred) trees.g[r] += g;
      trees.product[r] += product;
      if constexpr (kAhead) {
        prefetch(group.x[r] + at.start, ahead_);
        prefetch(group.dy[r] + at.start, ahead_);
      }
    });
    if constexpr (kParams) {
      watch.weight.terms(or_one(at, dweight));
      dweight_[column] = dweight;
      if constexpr (kCentred) {
        watch.bias.sums(dbias);
        dbias_[column] = dbias;
      }
    }
  }

  template <int kRows>
  FASTNORM_INLINE static void fold_sums(const Group<kRows>& group, TiledRow* rows) {
    if constexpr (kRows == 4) {
      Pack<double> packs[8];
      double totals[8];
      for_constants<kRows>([&](auto r) FASTNORM_IN_PLACE {
        packs[r] = group.sums[r].second;
        packs[kRows + r] = kCentred ? group.sums[r].first : group.sums[r].second;
      });
      fold_eight(packs, totals);
      for (int r = 0; r < kRows; ++r) rows[r].total = {totals[kRows + r], totals[r]};
    } else {
      for (int r = 0; r < kRows; ++r) rows[r].total = fold(group.sums[r]);
    }
  }

  // The columns of n values from `first` on, as `tile` has left them.
  FASTNORM_INLINE void add_columns(const TiledRow* rows, int count, const Watches& watch, int64_t first,
                                   int64_t n) const {
    if constexpr (kParams) {
      if (watch.weight.hold()) {
        add_widened(dweight_, params_.dweight + first, n);
      } else {
        add_doubtful_weight(rows, count, first, n);
      }
    }
    if constexpr (kParams && kCentred) {
      if (params_.dbias) add_bias(rows, count, watch.bias, first, n);
    }
  }

  FASTNORM_INLINE static void add_widened(const Pack<float>* columns, double* sums, int64_t n) {
    for (int64_t i = 0; i * kPack < n; ++i) {
      const Whole at{i * kPack};
      at.store(sums, at.load<double>(sums) + widen(columns[i]));
    }
  }

  FASTNORM_INLINE void add_bias(const TiledRow* rows, int count, const MagnitudeWatch& watch, int64_t first,
                                int64_t n) const {
    if (watch.hold()) {
      add_widened(dbias_, params_.dbias + first, n);
    } else {
      add_bias_in_double(rows, count, first, n);
    }
  }

  // Some column of a strip may have overflowed or lost digits: tile by tile, for a sum so small that it seems
  // underflown is often that of zeros (padding), and right.
  [[gnu::noinline]] void add_doubtful_weight(const TiledRow* rows, int count, int64_t first, int64_t n) const {
    for (int64_t i = 0; i < n; i += kRowTile) {
      const int64_t size = n - i < kRowTile ? n - i : kRowTile;
      if (nothing_lost(rows, count, first + i, first + i + size)) {
        add_widened(dweight_ + i / kPack, params_.dweight + first + i, size);
      } else {
        for (int r = 0; r < count; ++r) {
          add_parameter_gradients(rows[r].x + first + i, rows[r].dy + first + i, size, *rows[r].statistic,
                                  params_.from(first + i).without_bias());
        }
      }
    }
  }

  bool nothing_lost(const TiledRow* rows, int count, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0, size = 0;
      for (int r = 0; r < count; ++r) {
        sum += rows[r].dy[i] * ((rows[r].x[i] - rows[r].mean) - rows[r].mean_lo) * rows[r].rstd;
        size += std::fabs(rows[r].dy[i]);
      }
      if (size != 0 && !(std::fabs(sum) > 0x1p-70f && std::fabs(sum) < 0x1p50f)) return false;
    }
    return true;
  }

  [[gnu::noinline]] void add_bias_in_double(const TiledRow* rows, int count, int64_t first, int64_t n) const {
    for (int r = 0; r < count; ++r) {
      for (int64_t i = first; i < first + n; ++i) params_.dbias[i] += static_cast<double>(rows[r].dy[i]);
    }
  }

  template <int kRows>
  FASTNORM_LOOPS [[gnu::noinline]] void sum_group_bias(const TiledRow* rows) {
    const auto strip = [&](int64_t first, int64_t n) {
      MagnitudeWatch watch;
      for_packs(n, [&](auto at) {
        Pack<float> dbias = at.template load<float>(rows[0].dy + first);
        for (int r = 1; r < kRows; ++r) dbias += at.template load<float>(rows[r].dy + first);
        watch.sums(dbias);
        dbias_[at.start / kPack] = dbias;
      });
      add_bias(rows, kRows, watch, first, n);
    };
    for (int64_t first = 0; first < n_; first += kStrip) strip(first, n_ - first < kStrip ? n_ - first : kStrip);
  }

  // With 1 in the lanes that a place does not have.
  FASTNORM_INLINE static Pack<float> or_one(Whole, const Pack<float>& v) { return v; }
  FASTNORM_INLINE static Pack<float> or_one(Partial last, const Pack<float>& v) {
    return v + (Pack<float>(1.0f) - Partial{0, last.count}.load<float>(kOnes));
  }
  static constexpr float kOnes[kPack] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  const int64_t n_;
  const double share_ = 1 / static_cast<double>(n_);
  const float* const weight_;
  const ParameterSums params_;
  const int64_t ahead_;
  // The columns of a strip.
  Pack<float> dweight_[kStrip / kPack], dbias_[kStrip / kPack];
};

}  // namespace
}  // namespace fastnorm
