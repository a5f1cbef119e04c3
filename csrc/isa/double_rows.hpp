// The sums of the backward over float64 rows, four rows side by side in one reading: row sums of g = dy * weight and of
// g * xhat, column sums of dy and of dy * xhat (the gradients of bias and weight). Double has no digits to spare: along
// a row terms are added in chains of at most four packs, and those with what rounding takes; along a column over four
// rows, then into the sums of their group. Nor has the mean that the forward found: its error is small beside a
// standard deviation, but where one outlier makes that, not beside what the others are off the mean (dx of layer norm
// was off by 25 u). So x - mean is added up as well, about a number from which the differences are exact (short_mean).
//
// xhat is made first, so that no product is farther from the ordinary than in the formulas. Only for rows that `fit`;
// the others take part as rows of zeros.
#pragma once

#include "isa/row_tiles.hpp"

namespace fastnorm {
namespace {

constexpr int64_t kLongestDoubleRow = 8192;

// Rows that are summed up before any dx of them is written, a lane for each: what is read of them, and what that gives.
struct DoubleRows {
  static constexpr int kMost = kPack, kFolded = 8;

  const double *x[kMost], *dy[kMost];
  double* dx[kMost];
  alignas(64) double mean[kMost], mean_lo[kMost], rstd[kMost], rstd_lo[kMost];
  alignas(64) double pivot[kMost], shift[kMost];  // xhat = (x - pivot) * rstd - shift
  // Sums of g, of g * (x - pivot) * rstd with what they have lost, and of x - pivot, in lanes and folded.
  HalfPack g_lanes[kMost], product_lanes[kMost], product_lost_lanes[kMost], rest_lanes[kMost];
  alignas(64) double g[kMost], product[kMost], product_lost[kMost], rest[kMost];
  alignas(64) double a[kMost], b[kMost];  // dx = rstd * ((g - a) - (x - pivot) * b); RMS norm: rstd * g - x * b
  alignas(64) double size[kMost];         // of b; infinite where it is beyond the ordinary

  // A row that does not fit takes part in sums as one whose xhat is 0.
  void blank(int r, const double* zeros) {
    x[r] = zeros;
    pivot[r] = shift[r] = rstd[r] = rstd_lo[r] = 0;
  }

  // Do neither x - mean nor its product with rstd overflow or underflow?
  bool fit(int64_t r) const { return (rstd[r] > 0x1p-500) & (rstd[r] < 0x1p500) & (std::fabs(mean[r]) < 0x1p500); }
  bool holds(int64_t r) const { return size[r] < 0x1p900; }

  // When `count` rows are set. Do all of them fit?
  bool start(int count, double eps) {
    for (int r = count; r < kMost; ++r) mean[r] = mean_lo[r] = rstd_lo[r] = 0, rstd[r] = 1;
    int64_t beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t r = 0; r < kMost; ++r) {
      pivot[r] = short_mean(mean[r], rstd[r], varies(rstd[r], eps));
      shift[r] = ((mean[r] - pivot[r]) + mean_lo[r]) * rstd[r];
      beyond |= fit(r) ? 0 : 1;
    }
    return beyond == 0;
  }

  // When the sums of rows [first, first + count) are known, of n values each. Are all of them ordinary? What b is made
  // of is rounded once: where g is 0, weights being, there is nothing else beside which its error is small.
  template <bool kCentred>
  bool finish(int first, int count, double n) {
    const double share = 1 / n;
    for (int r = first - first % kFolded; r < first + count; r += kFolded) {
      if (kCentred) fold_eight(g_lanes + r, g + r), fold_eight(rest_lanes + r, rest + r);
      fold_eight_exactly<true>(product_lanes + r, product_lost_lanes + r, product + r, product_lost + r);
#pragma omp simd
      for (int k = r; k < r + kFolded; ++k) {
        const double off = kCentred ? rest[k] * share : 0;  // of the mean, from the pivot
        const TwoTerm sum = two_sum(product[k], product_lost[k] - (kCentred ? off * rstd[k] * g[k] : 0));
        const double mean = sum.hi / n;
        const TwoTerm back = two_product(mean, n), once = two_product(mean, rstd[k]);
        const double twice_lost = 2 * mean * rstd_lo[k];  // by xhat as well
        const double once_lo = once.lo + ((((sum.hi - back.hi) - back.lo) + sum.lo) * share * rstd[k] + twice_lost);
        double factor = once.hi + once_lo;
        if (!kCentred) {
          const TwoTerm twice = two_product(once.hi, rstd[k]);
          factor = twice.hi + (twice.lo + (once_lo * rstd[k] + once.hi * rstd_lo[k]));
        }
        a[k] = kCentred ? g[k] / n - off * factor : 0;
        b[k] = factor;
        const bool fine = ((sum.hi == 0) | (std::fabs(factor) > 0x1p-900)) & (std::fabs(mean) < 0x1p900);
        size[k] = fine ? std::fabs(factor) : HUGE_VAL;
      }
    }
    int64_t beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t r = 0; r < kMost; ++r) beyond |= (r >= first) & (r < first + count) & !holds(r) ? 1 : 0;
    return beyond == 0;
  }
};

// kCentred: layer norm. kParams: there are weights, and the gradients of the parameters are wanted.
template <bool kCentred, bool kParams>
class DoubleRowTiles {
 public:
  // `weight` and the sums have room for whole packs.
  DoubleRowTiles(int64_t n, const double* weight, ParameterSums params, RowsAhead ahead)
      : n_(n), weight_(weight), params_(params), ahead_(ahead) {}

  // The sums of rows [first, first + count), up to kMostRows.
  void sum(DoubleRows& rows, int first, int count) const {
    for (int r = first, size; r < first + count; r += size) {
      size = group_size(first + count - r);
      if (size == kMostRows && ahead_.summed != 0) {
        sum_group<kMostRows, true>(rows, r);
      } else if (size == kMostRows) {
        sum_group<kMostRows>(rows, r);
      } else if (size == 2) {
        sum_group<2>(rows, r);
      } else {
        sum_group<1>(rows, r);
      }
    }
  }

  void settle(const DoubleRows&) const {}
  void finish() const {}
  bool zeros(const double*) const { return false; }

  // dx of rows [first, end), as InputGradient has it. What is read next is asked for here.
  void write(const DoubleRows& rows, int first, int end, bool past_cache) const {
    if (ahead_.summed != 0) return write_rows<true, kAnyRun>(rows, first, end, true);
    with_short_run<8>(!past_cache, n_, [&](auto packs) { write_rows<false, packs>(rows, first, end, past_cache); });
  }

 private:
  static constexpr int64_t kTile = 4 * kPack;  // columns whose sums along a row are a chain

  // The registers of a group of rows, and where its columns go.
  template <int kRows>
  struct Group {
    const double *x[kRows], *dy[kRows], *weight;
    int64_t to_dx[kRows];
    Pack<double> pivot[kRows], shift[kRows], rstd[kRows];
    double *dweight, *dbias;
  };

  // Sums along the rows.
  template <int kRows>
  struct Chains {
    HalfPack g[kRows], product[kRows], rest[kRows];
    // What rounding takes is added to `lost`.
    FASTNORM_INLINE void add(const Chains& other, Chains& lost) {
      for_constants<kRows>([&](auto r) {
        if constexpr (kCentred) g[r].add(other.g[r], lost.g[r]), rest[r].add(other.rest[r], lost.rest[r]);
        product[r].add(other.product[r], lost.product[r]);
      });
    }
  };

  template <bool kFromMemory, int kPacks>
  FASTNORM_LOOPS [[gnu::noinline]] void write_rows(const DoubleRows& rows, int first, int end, bool past_cache) const {
    const int64_t n = n_, ahead = ahead_.written;
    const double* const weight = weight_;
    for (int r = first; r < end; ++r) {
      const double *const x = rows.x[r], *const dy = rows.dy[r];
      const Pack<double> pivot(rows.pivot[r]), rstd(rows.rstd[r]), a(rows.a[r]), b(rows.b[r]);
      write_asking<kFromMemory, kPacks>(rows.dx[r], n, x, dy, ahead, past_cache, true, [&](auto at) {
        Pack<double> g = at.template load<double>(dy), centred = at.template load<double>(x);
        if constexpr (kParams) g *= at.template load<double>(weight);
        if constexpr (!kCentred) return rstd * g - centred * b;
        return rstd * ((g - a) - (centred - pivot) * b);
      });
    }
  }

  static int group_size(int left) { return left >= kMostRows ? kMostRows : left >= 2 ? 2 : 1; }

  template <int kRows, bool kAhead = false>
  FASTNORM_LOOPS [[gnu::noinline]] void sum_group(DoubleRows& rows, int first) const {
    Group<kRows> group;
    for_constants<kRows>([&](auto r) {
      const int row = first + r;
      group.x[r] = rows.x[row], group.dy[r] = rows.dy[row];
      group.to_dx[r] = bytes_between(rows.x[row], rows.dx[row]);
      group.pivot[r] = Pack<double>(rows.pivot[row]), group.shift[r] = Pack<double>(rows.shift[row]);
      group.rstd[r] = Pack<double>(rows.rstd[row]);
    });
    group.weight = weight_, group.dweight = params_.dweight, group.dbias = params_.dbias;
    const int64_t n = n_, whole = n / kPack * kPack;
    Chains<kRows> sums{}, lost{};
    const bool results = ahead_.results;
    for (int64_t i = 0;;) {
      Chains<kRows> chains{};
      const bool first_tile = i == 0;
      const int64_t stop = i + kTile < whole ? i + kTile : whole;
#pragma GCC unroll 1
      for (; i < stop; i += kPack) {
        for (int r = 0; kAhead && r < kRows; ++r) {
          prefetch<later>(group.x[r] + i, ahead_.summed);
          prefetch<later>(group.dy[r] + i, ahead_.summed);
        }
        if (results) ask_for_results<kRows>(group, i);
        add_pack<kRows>(group, chains, Whole{i});
      }
      const bool last = i == whole;
      if (last && whole < n) {
        if (results) ask_for_results<kRows>(group, whole);
        add_pack<kRows>(group, chains, Partial{whole, n - whole});
      }
      if (first_tile) {
        sums = chains;
      } else {
        sums.add(chains, lost);
      }
      if (last) break;
    }
    for_constants<kRows>([&](auto r) {
      const int row = first + r;
      if constexpr (kCentred) {
        rows.g_lanes[row] = sums.g[r] += lost.g[r];
        rows.rest_lanes[row] = sums.rest[r] += lost.rest[r];
      }
      rows.product_lanes[row] = sums.product[r];
      rows.product_lost_lanes[row] = lost.product[r];
    });
  }

  template <int kRows>
  FASTNORM_INLINE static void ask_for_results(const Group<kRows>& group, int64_t i) {
    for_constants<kRows>([&](auto r) { prefetch(group.x[r] + i, group.to_dx[r]); });
  }

  // A pack of all rows.
  template <int kRows, class At>
  FASTNORM_INLINE static void add_pack(const Group<kRows>& group, Chains<kRows>& chains, At at) {
    const Whole whole{at.start};
    Pack<double> weight, dweight, dbias;
    if constexpr (kParams) weight = in_register(whole.template load<double>(group.weight));
    for_constants<kRows>([&](auto r) {
      Pack<double> xhat = at.template load<double>(group.x[r]);
      if constexpr (kCentred) {
        xhat -= group.pivot[r];
        chains.rest[r] += within(at, xhat);
      }
      xhat *= group.rstd[r];  // and shift
      Pack<double> g = in_register(at.template load<double>(group.dy[r]));
      if constexpr (kParams) {
        const Pack<double> term = g * (kCentred ? xhat - group.shift[r] : xhat);
        dweight = r == 0 ? term : dweight + term;
        if constexpr (kCentred) dbias = r == 0 ? g : dbias + g;
        g *= weight;
      }
      if constexpr (kCentred) chains.g[r] += g;
      chains.product[r].add_products(g, xhat);
    });
    if constexpr (kParams) {
      whole.store(group.dweight, whole.template load<double>(group.dweight) + dweight);
      if constexpr (kCentred) whole.store(group.dbias, whole.template load<double>(group.dbias) + dbias);
    }
  }

  const int64_t n_;
  const double* const weight_;
  const ParameterSums params_;
  const RowsAhead ahead_;
};

}  // namespace
}  // namespace fastnorm
