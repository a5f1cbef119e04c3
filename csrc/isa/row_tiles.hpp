// The sums of the backward over float32 rows, a group of rows at a time and tile by tile of columns, in one reading:
// row sums of g = dy * weight and of g * (x - mean), column sums of dy and of dy * xhat (the gradients of bias and
// weight). All is float32 but the running sums: a tile's terms are added in short trees, along a row over the packs of
// the tile, along a column over the rows of the group, and then widened.
//
// Only for rows that `fits_tiles`, with weights that are 0 or `tile_weight`; how the terms of a row come out is for
// TileMeans to judge. A tile whose column sums may have overflowed or lost digits to underflow is added up in double.
#pragma once

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
#define FASTNORM_IN_PLACE __attribute__((always_inline))
#define FASTNORM_ROLLED _Pragma("GCC unroll 1")  // one copy of a loop over rows, not kMostRows
inline int64_t whole_tiles(int64_t rows) { return (rows + kMostRows - 1) / kMostRows * kMostRows; }

// Columns of a tile, and tiles whose trees wait to be widened.
constexpr int64_t kRowTile = kTreePacks * kPack;
constexpr int kStripTiles = 8;

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

// kCentred: layer norm. kParams: there are weights, and the gradients of the parameters are wanted.
template <bool kCentred, bool kParams>
class RowTiles {
 public:
  RowTiles(int64_t n, const float* weight, ParameterSums params, int64_t ahead)
      : n_(n), weight_(weight), params_(params), ahead_(ahead) {}

  void add_row(const float* x, const float* dy, const Statistic& s) {
    const float mean = static_cast<float>(s.mean);
    rows_[count_++] = {x, dy, mean, static_cast<float>((s.mean - static_cast<double>(mean)) + s.mean_lo),
                       static_cast<float>(s.rstd)};
    statistics_[count_ - 1] = &s;
  }

  FASTNORM_LOOPS void sum() {
    FASTNORM_ROLLED
    for (int r = 0; r < count_; ++r) sums_[r] = PackPair{0.0, 0.0};
    int64_t first = 0;
    while (n_ - first >= kRowTile) {
      int tiles = 0;
      for (; tiles < kStripTiles && n_ - first >= kRowTile; ++tiles, first += kRowTile) {
        tile<kTreePacks>(tiles, first, Whole{first + kRowTile - kPack});
      }
      add_trees(tiles);
    }
    last_tile(first, [&](auto packs, Partial last) FASTNORM_IN_PLACE {
      tile<packs>(0, first, last);
      add_trees(1);
    });
  }

  // The gradient of the bias alone, as `sum` has it: no x, not one with a NaN, may change its bits.
  FASTNORM_LOOPS void sum_bias() const {
    int64_t first = 0;
    for (; n_ - first >= kRowTile; first += kRowTile) {
      bias_tile<kTreePacks>(first, Whole{first + kRowTile - kPack});
    }
    last_tile(first, [&](auto packs, Partial last) FASTNORM_IN_PLACE { bias_tile<packs>(first, last); });
  }

  TileMeans means(int r) const {
    const Pair total = fold(sums_[r]);
    return {kCentred ? total.first * share_ : 0, total.second * share_ * statistics_[r]->rstd};
  }

  // Is every g of a row 0, for want of dy?
  FASTNORM_LOOPS bool zeros(int r) const {
    Size size;
    for_packs(n_, [&](auto at) { size.add(at, rows_[r].dy); });
    return size.total() == 0;
  }

  // dx = rstd * (g - a - (x - mean) * (b * rstd))
  FASTNORM_LOOPS void write(int r, const TileMeans& means, float* dx, bool past_cache) const {
    const Row& row = rows_[r];
    const float *const x = row.x, *const dy = row.dy, *const weight = weight_;
    const Pack<float> mean(row.mean), mean_lo(row.mean_lo), rstd(row.rstd), a(static_cast<float>(means.a)),
        b(static_cast<float>(means.b * statistics_[r]->rstd));
    for_stored_packs(past_cache, dx, n_, [&](auto at, auto out) {
      Pack<float> g = at.template load<float>(dy), centred = at.template load<float>(x);
      if constexpr (kParams) g *= at.template load<float>(weight);
      if constexpr (kCentred) {
        g -= a;
        centred = (centred - mean) - mean_lo;
      }
      out.store(at, dx, rstd * (g - centred * b));
    });
  }

 private:
  struct Row {
    const float *x, *dy;
    float mean, mean_lo, rstd;
  };

  // body(packs, the last of them) for what is left of a row from `first` on, if anything is.
  template <class Body>
  FASTNORM_INLINE void last_tile(int64_t first, const Body& body) const {
    const int64_t rest = n_ - first;
    if (rest == 0) return;
    const int64_t packs = (rest - 1) / kPack;
    const Partial last{first + packs * kPack, rest - packs * kPack};
    switch (packs) {
      case 0:
        return body(std::integral_constant<int, 1>{}, last);
      case 1:
        return body(std::integral_constant<int, 2>{}, last);
      case 2:
        return body(std::integral_constant<int, 3>{}, last);
      default:
        return body(std::integral_constant<int, 4>{}, last);
    }
  }

  template <int kPacks, class Last>
  FASTNORM_INLINE void bias_tile(int64_t first, Last last) const {
    Pack<float> dbias[kPacks];
    for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE {
      dbias[k] = Pack<float>(0.0f);
      const auto at = place<kPacks, k>(first, last);
      for (int r = 0; r < count_; ++r) dbias[k] += at.template load<float>(rows_[r].dy);
    });
    add_bias<kPacks>(first, last, dbias);
  }

  // The packs of a tile but the last are whole.
  template <int kPacks, class Last>
  FASTNORM_INLINE void tile(int index, int64_t first, Last last) {
    Pack<float> dweight[kPacks], dbias[kPacks];
    for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE { dweight[k] = dbias[k] = Pack<float>(0.0f); });
    FASTNORM_ROLLED
    for (int r = 0; r < count_; ++r) {
      const float *const x = rows_[r].x, *const dy = rows_[r].dy;
      const Pack<float> mean(rows_[r].mean), mean_lo(rows_[r].mean_lo), rstd(rows_[r].rstd);
      Pack<float> g[kTreePacks], g_centred[kTreePacks];
      for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE {
        const auto at = place<kPacks, k>(first, last);
        Pack<float> centred = at.template load<float>(x);
        if constexpr (kCentred) centred = (centred - mean) - mean_lo;
        const Pack<float> gradient = in_register(at.template load<float>(dy)), term = gradient * centred;
        g[k] = gradient;
        g_centred[k] = term;
        if constexpr (kParams) {
          dweight[k] += term * rstd;
          if constexpr (kCentred) dbias[k] += gradient;
          const Pack<float> weight = in_register(at.template load<float>(weight_));
          g[k] = gradient * weight;
          g_centred[k] = term * weight;
        }
      });
      if constexpr (kCentred) trees_[r].g[index] = tree<kPacks>(g);
      trees_[r].g_centred[index] = tree<kPacks>(g_centred);
      if (ahead_ == 0) continue;
      for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE {
        prefetch(x + first + k * kPack, ahead_);
        prefetch(dy + first + k * kPack, ahead_);
      });
    }
    if constexpr (kParams) add_weight<kPacks>(first, last, dweight);
    if constexpr (kParams && kCentred) {
      if (params_.dbias) add_bias<kPacks>(first, last, dbias);
    }
  }

  template <int kPacks, int k, class Last>
  FASTNORM_INLINE static auto place(int64_t first, Last last) {
    if constexpr (k < kPacks - 1) {
      return Whole{first + k * kPack};
    } else {
      return last;
    }
  }

  // The trees of some tiles, two of them at a time.
  FASTNORM_INLINE void add_trees(int tiles) {
    FASTNORM_ROLLED
    for (int r = 0; r < count_; ++r) {
      PackPair sums = sums_[r];
      int t = 0;
      for (; t + 2 <= tiles; t += 2) {
        if constexpr (kCentred) sums.first += widen(trees_[r].g[t] + trees_[r].g[t + 1]);
        sums.second += widen(trees_[r].g_centred[t] + trees_[r].g_centred[t + 1]);
      }
      if (t < tiles) {
        if constexpr (kCentred) sums.first += widen(trees_[r].g[t]);
        sums.second += widen(trees_[r].g_centred[t]);
      }
      sums_[r] = sums;
    }
  }

  template <int kPacks>
  FASTNORM_INLINE static Pack<float> tree(const Pack<float>* v) {
    if constexpr (kPacks == 1) return v[0];
    if constexpr (kPacks == 2) return v[0] + v[1];
    if constexpr (kPacks == 3) return (v[0] + v[1]) + v[2];
    return (v[0] + v[1]) + (v[2] + v[3]);
  }

  template <int kPacks, class Last>
  FASTNORM_INLINE void add_weight(int64_t first, Last last, const Pack<float>* dweight) const {
    MagnitudeWatch watch;
    for_constants<kPacks - 1>([&](auto k) FASTNORM_IN_PLACE { watch.terms(dweight[k]); });
    watch.terms(dweight[kPacks - 1] + absent(last));
    const int64_t n = (kPacks - 1) * kPack + width(last);
    if (!watch.hold() && !nothing_lost(first, first + n)) return add_weight_in_double(first, n);
    for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE {
      const auto at = place<kPacks, k>(first, last);
      at.store(params_.dweight, at.template load<double>(params_.dweight) + widen(dweight[k]));
    });
  }

  template <int kPacks, class Last>
  FASTNORM_INLINE void add_bias(int64_t first, Last last, const Pack<float>* dbias) const {
    MagnitudeWatch watch;
    for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE { watch.sums(dbias[k]); });
    if (!watch.hold()) return add_bias_in_double(first, (kPacks - 1) * kPack + width(last));
    for_constants<kPacks>([&](auto k) FASTNORM_IN_PLACE {
      const auto at = place<kPacks, k>(first, last);
      at.store(params_.dbias, at.template load<double>(params_.dbias) + widen(dbias[k]));
    });
  }

  static int64_t width(Whole) { return kPack; }
  static int64_t width(Partial last) { return last.count; }
  // 1 in the lanes that a place does not have.
  FASTNORM_INLINE static Pack<float> absent(Whole) { return Pack<float>(0.0f); }
  FASTNORM_INLINE static Pack<float> absent(Partial last) {
    return Pack<float>(1.0f) - Partial{0, last.count}.load<float>(kOnes);
  }
  static constexpr float kOnes[kPack] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  // A sum so small that it seems underflown is often that of zeros (padding), and right.
  [[gnu::noinline]] bool nothing_lost(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0, size = 0;
      for (int r = 0; r < count_; ++r) {
        const Row& row = rows_[r];
        sum += row.dy[i] * ((row.x[i] - row.mean) - row.mean_lo) * row.rstd;
        size += std::fabs(row.dy[i]);
      }
      if (size != 0 && !(std::fabs(sum) > 0x1p-70f && std::fabs(sum) < 0x1p50f)) return false;
    }
    return true;
  }

  [[gnu::noinline]] void add_weight_in_double(int64_t first, int64_t n) const {
    for (int r = 0; r < count_; ++r) {
      add_parameter_gradients(rows_[r].x + first, rows_[r].dy + first, n, *statistics_[r],
                              params_.from(first).without_bias());
    }
  }

  [[gnu::noinline]] void add_bias_in_double(int64_t first, int64_t n) const {
    for (int r = 0; r < count_; ++r) {
      for (int64_t i = first; i < first + n; ++i) params_.dbias[i] += static_cast<double>(rows_[r].dy[i]);
    }
  }

  const int64_t n_;
  const double share_ = 1 / static_cast<double>(n_);
  const float* const weight_;
  const ParameterSums params_;
  const int64_t ahead_;
  int count_ = 0;
  Row rows_[kMostRows];
  const Statistic* statistics_[kMostRows];
  PackPair sums_[kMostRows];
  struct {
    Pack<float> g[kStripTiles], g_centred[kStripTiles];
  } trees_[kMostRows];
};

}  // namespace
}  // namespace fastnorm
