// The sums of the backward over float32 rows, some rows at a time and tile by tile of columns, in one reading: row sums
// of g = dy * weight and of g * (x - mean), column sums of dy and of dy * xhat (the gradients of bias and weight). All
// is float32 but the running sums: terms are added in short trees, along a row over the packs of a tile, along a column
// over eight rows, and then widened.
//
// Only for rows that `fit`, with weights that are 0 or `tile_weight`; how the terms of a row come out is for
// TiledRows::finish to judge. Columns of groups in which anything overflowed or lost digits to underflow are added up
// in double.
#pragma once

#include "isa/segment.hpp"
#include "isa/short_trees.hpp"

namespace fastnorm {
namespace {

constexpr int kMostRows = 4;  // that are read side by side: a group

// Rows whose columns are added up in float32, in a tree: three roundings, where dweight has 8 u for them and for those
// of its terms (a chain of eight was off by 10 u on rows of a period). Where rows are cut for other reasons, it is at
// multiples of this.
constexpr int kColumnRows = 2 * kMostRows;
inline int64_t whole_tiles(int64_t rows) { return (rows + kColumnRows - 1) / kColumnRows * kColumnRows; }

// Packs whose sums along a row are a chain of float32; columns of a tile, which is two such chains: four roundings.
// Columns of a strip: rows up to this length wait for a second group before their columns' sums are widened. dx of rows
// from kLinedRow on is written in whole lines of the cache (512 x 768: 98 us to 94; 4096 x 100: 132 us to 140).
constexpr int64_t kChain = kTreePacks;
constexpr int64_t kRowTile = 2 * kChain * kPack;
constexpr int64_t kRowStrip = 10 * kRowTile;
constexpr int64_t kLinedRow = 512;

inline bool tile_weight(float w) { return (w == 0) | ((std::fabs(w) > 0x1p-30f) & (std::fabs(w) < 0x1p30f)); }

// dweight += dy * xhat, dbias += dy, in double, for one set after the other. dbias: nullptr where it is not wanted.
struct ParameterSums {
  double *dweight, *dbias;

  ParameterSums from(int64_t first) const { return {dweight + first, dbias ? dbias + first : nullptr}; }
  ParameterSums without_bias() const { return {dweight, nullptr}; }
};

template <class T>
FASTNORM_LOOPS inline void add_parameter_gradients(const T* x, const T* dy, int64_t n, const Statistic& s,
                                                   ParameterSums sums) {
  const Centre<T> centre(s);
  const Pack<double> rstd(s.rstd);
  for_packs(n, [&](auto at) {
    const PackPair terms = gradient_terms(at, x, dy, centre, rstd, None{});
    at.store(sums.dweight, at.template load<double>(sums.dweight) + terms.second);
    if (sums.dbias) at.store(sums.dbias, at.template load<double>(sums.dbias) + terms.first);
  });
}

// Rows in tiles, a lane for each: what is read of them, and what that gives.
struct TiledRows {
  static constexpr int kMost = kPack, kFolded = 8;

  const float *x[kMost], *dy[kMost];
  float* dx[kMost];
  alignas(64) double mean[kMost], mean_lo[kMost], rstd[kMost];
  alignas(64) float pivot[kMost], pivot_lo[kMost], float_rstd[kMost];  // pivot + pivot_lo: the mean
  HalfPack g_lanes[kMost], product_lanes[kMost];                       // sums of g and of g * (x - mean), in lanes,
  alignas(64) double g[kMost], product[kMost];                         // and folded
  alignas(64) float a[kMost], b[kMost];  // dx = rstd * ((g - a) - (x - pivot) * b); RMS norm: rstd * g - x * b
  alignas(64) float size[kMost];         // of the means of g and g * xhat
  bool careful[kMost];                   // does some g lose digits in float32? Of use where `any_careful` alone.
  bool any_careful;

  Statistic statistic(int r) const { return {mean[r], mean_lo[r], rstd[r], 1}; }

  // Does float32 do for the sums? What `holds` allows for lies below these powers, with a unit of float32 to spare.
  bool fit(int r) const {
    return (float_rstd[r] > 0x1p-30f) & (float_rstd[r] < 0x1p30f) & (std::fabs(pivot[r]) < 0x1p60f);
  }

  // Did it, and does it for dx? There was no infinity, and nothing that underflow can have taken from products with
  // rstd and weights (2^-150 * 2^60 in xhat <= 2^8) is a unit of the mean of |g|.
  bool holds(int r) const { return ordinary(r) && !(any_careful && careful[r]); }
  bool ordinary(int r) const { return (size[r] > 0x1p-45f) & (size[r] < 0x1p45f); }

  void be_careful(int r) {
    if (!any_careful) std::memset(careful, 0, sizeof careful);
    careful[r] = any_careful = true;
  }

  // When `count` rows are set. Do all of them fit?
  bool start(int count, double) {
    for (int r = count; r < kMost; ++r) mean[r] = mean_lo[r] = 0, rstd[r] = 1;
    any_careful = false;
    const Pack<double> means = kAll.load<double>(mean);
    const Pack<float> pivots = narrow(means);
    kAll.store(pivot, pivots);
    kAll.store(pivot_lo, narrow((means - widen(pivots)) + kAll.load<double>(mean_lo)));
    kAll.store(float_rstd, narrow(kAll.load<double>(rstd)));
    int beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int r = 0; r < kMost; ++r) beyond |= fit(r) ? 0 : 1;
    return beyond == 0;
  }

  // When the sums of rows [first, first + count) are known, of n values each: a and b, as GradientFactors has them. Are
  // all held? What other lanes get is of no use.
  template <bool centred>
  bool finish(int first, int count, double n) {
    const int end = first + count;
    for (int r = first - first % kFolded; r < end; r += kFolded) {
      if (centred) fold_eight(g_lanes + r, g + r);
      fold_eight(product_lanes + r, product + r);
    }
    const Pack<double> share(1 / n), rstds = kAll.load<double>(rstd);
    const Pack<double> mean_g_xhat = kAll.load<double>(product) * share * rstds, factor = mean_g_xhat * rstds;
    if constexpr (centred) {
      const Pack<double> mean_g = kAll.load<double>(g) * share;
      const Pack<double> off = (kAll.load<double>(pivot) - kAll.load<double>(mean)) - kAll.load<double>(mean_lo);
      kAll.store(a, narrow(mean_g + off * factor));
      kAll.store(b, narrow(factor));
      kAll.store(size, narrow(magnitude(mean_g) + magnitude(mean_g_xhat)));
    } else {
      // There are values of dx that are a product with x alone: one factor for it. What `fit` and `ordinary` allow
      // keeps it within 2^105, far from overflow and underflow.
      kAll.store(b, narrow(factor * rstds));
      kAll.store(size, narrow(magnitude(mean_g_xhat)));
    }
    int beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int r = 0; r < kMost; ++r) beyond |= (r >= first) & (r < end) & !ordinary(r) ? 1 : 0;
    return beyond == 0 && !any_careful;
  }

 private:
  static constexpr Whole kAll{0};
};

// Bytes from a row to the one that is asked for: while dx of it is written, for the nearest cache; while it is summed
// up, for the second one, which helps with rows from memory alone (16384 x 1024: 8.4 ms to 7.4; 2048 x 1024, from the
// last cache: 0.57 ms to 0.60). 0: none is.
struct RowsAhead {
  int64_t written = 0, summed = 0;
  bool results = false;  // is dx asked for while its row is summed up?
};

// Stores formula(place) along dx of a row and asks for x and dy of the one that is `ahead` bytes on; 0: for none.
// kPacks: of a short row (with_short_run).
template <bool kFromMemory, int kPacks, class T, class Formula>
FASTNORM_INLINE void write_asking(T* dx, int64_t n, const T* x, const T* dy, int64_t ahead, bool past_cache,
                                  bool whole_lines, const Formula& formula) {
  const auto gradient = [&](auto at) {
    if (kFromMemory || ahead != 0) {
      prefetch(x + at.start, ahead);
      prefetch(dy + at.start, ahead);
    }
    if constexpr (kFromMemory) hold_back();
    return formula(at);
  };
  if constexpr (kPacks != kAnyRun) return write_short_run<kPacks>(dx, n, [&](int, Whole at) { return gradient(at); });
  past_cache ? write_run<true>(dx, n, gradient) : write_run<false>(dx, n, gradient, whole_lines);
}

// kCentred: layer norm. kParams: there are weights, and the gradients of the parameters are wanted.
template <bool kCentred, bool kParams>
class RowTiles {
 public:
  // `weight` and the sums have room for whole packs.
  RowTiles(int64_t n, const float* weight, ParameterSums params, RowsAhead ahead)
      : n_(n), weight_(weight), params_(params), ahead_(ahead) {}

  // The sums of rows [first, first + count), up to kMostRows. Those of columns are complete after `finish`.
  void sum(TiledRows& rows, int first, int count) {
    for (int64_t column = 0; column < n_; column += kRowStrip) {
      const int64_t n = n_ - column < kRowStrip ? n_ - column : kRowStrip;
      for (int r = first, size; r < first + count; r += size) {
        size = group_size(first + count - r);
        open(r, size, false);
        sum_group(rows, r, size, column, n);
        complete(rows, column, n);
      }
    }
  }

  // The gradient of the bias alone, as `sum` has it: no x, not one with a NaN, may change its bits. That of the weight
  // gets nothing, and where there is no bias a group's turn passes, for the cut of pairs is that of the rows.
  FASTNORM_LOOPS void sum_bias(TiledRows& rows, int first, int count) {
    for (int64_t column = 0; column < n_; column += kRowStrip) {
      const int64_t n = n_ - column < kRowStrip ? n_ - column : kRowStrip;
      for (int r = first, size; r < first + count; r += size) {
        size = group_size(first + count - r);
        open(r, size, true);
        for_packs(n, [&](auto at) { put_bias_sums(rows, groups_[waiting_], waiting_, column, at); });
        complete(rows, column, n);
      }
    }
  }

  // To be called before dx of any row is written, in whose place dy may lie, and before others ask for lost digits.
  void settle(TiledRows& rows) {
    if constexpr (kParams) judge(rows, 0, n_);
    clear_ = false;
  }

  void finish() {
    if (waiting_ > 0) add_columns(0, n_);
  }

  // Is every g of a row 0, for want of dy?
  FASTNORM_LOOPS bool zeros(const float* dy) const { return all_zero(either(Pack<float>(0.0f), dy, n_)); }

  // dx of rows [first, end), as InputGradient has it. What is read next is asked for here: the sums would put the rows
  // that dx is made of out of the nearest cache (16384 x 768: 6.2 ms to 5.5).
  void write(const TiledRows& rows, int first, int end, bool past_cache) const {
    if (ahead_.summed != 0) return write_rows<true, kAnyRun>(rows, first, end, true);
    with_short_run<8>(!past_cache, n_, [&](auto packs) { write_rows<false, packs>(rows, first, end, past_cache); });
  }

 private:
  // The registers of a group of rows, and where its columns go.
  template <int kRows>
  struct Group {
    const float *x[kRows], *dy[kRows], *weight;
    int64_t to_dx[kRows];
    Pack<float> mean[kRows], mean_lo[kRows], rstd[kRows];
    const Pack<float>* before;
    Pack<float>*columns, *third;
  };

  // Sums along the rows: of g, then of g * (x - mean).
  template <int kRows>
  struct Chains {
    Pack<float> g[kRows], product[kRows];
    FASTNORM_INLINE Chains& operator+=(const Chains& other) {
      for_constants<kRows>([&](auto r) {
        if constexpr (kCentred) g[r] += other.g[r];
        product[r] += other.product[r];
      });
      return *this;
    }
  };

  // The columns' sums of a group, dbias after dweight.
  static constexpr int64_t kColumnPacks = kRowStrip / kPack;
  struct Columns {
    Pack<float> sums[2 * kColumnPacks];
  };

  struct NoColumns {};

  struct WaitingGroup {
    int first, size;
    bool bias_alone;
  };

  template <bool kFromMemory, int kPacks>
  FASTNORM_LOOPS [[gnu::noinline]] void write_rows(const TiledRows& rows, int first, int end, bool past_cache) const {
    const int64_t n = n_, ahead = ahead_.written;
    const float* const weight = weight_;
    for (int r = first; r < end; ++r) {
      const float *const x = rows.x[r], *const dy = rows.dy[r];
      const Pack<float> pivot(rows.pivot[r]), rstd(rows.float_rstd[r]), a(kCentred ? rows.a[r] : 0), b(rows.b[r]);
      write_asking<kFromMemory, kPacks>(rows.dx[r], n, x, dy, ahead, past_cache, n >= kLinedRow, [&](auto at) {
        Pack<float> g = at.template load<float>(dy), centred = at.template load<float>(x);
        if constexpr (kParams) g *= at.template load<float>(weight);
        if constexpr (!kCentred) return g * rstd - centred * b;
        return rstd * ((g - a) - (centred - pivot) * b);
      });
    }
  }

  static int group_size(int left) { return left >= kMostRows ? kMostRows : left >= 2 ? 2 : 1; }

  // n columns of a group.
  void sum_group(TiledRows& rows, int first, int size, int64_t column, int64_t n) {
    if (size == kMostRows && ahead_.summed != 0) {
      sum_group<kMostRows, true>(rows, first, column, n);
    } else if (size == kMostRows) {
      sum_group<kMostRows>(rows, first, column, n);
    } else if (size == 2) {
      sum_group<2>(rows, first, column, n);
    } else {
      sum_group<1>(rows, first, column, n);
    }
  }

  // Few registers hold what one row of layer norm needs (AVX2, 512 x 768: 138 us to 123, 64 x 256: 6.9 to 5.8).
  static constexpr bool kSideBySide = kManyRegisters || !kCentred;

  template <int kRows, bool kAhead = false>
  FASTNORM_LOOPS [[gnu::noinline]] void sum_group(TiledRows& rows, int first, int64_t column, int64_t n) {
    if constexpr (kSideBySide) {
      sum_rows<kRows, 0, kRows, kAhead>(rows, first, column, n);
    } else {
      for_constants<kRows>([&](auto r) FASTNORM_LOOPS { sum_rows<1, r, kRows, kAhead>(rows, first + r, column, n); });
    }
  }

  // Rows [kFirst, kFirst + kRows) of a group of kAll.
  template <int kRows, int kFirst, int kAll, bool kAhead>
  FASTNORM_INLINE void sum_rows(TiledRows& rows, int first, int64_t column, int64_t n) {
    Group<kRows> group;
    for_constants<kRows>([&](auto r) {
      const int row = first + r;
      group.x[r] = rows.x[row] + column, group.dy[r] = rows.dy[row] + column;
      group.to_dx[r] = bytes_between(rows.x[row], rows.dx[row]);
      group.mean[r] = Pack<float>(rows.pivot[row]), group.mean_lo[r] = Pack<float>(rows.pivot_lo[row]);
      group.rstd[r] = Pack<float>(rows.float_rstd[row]);
    });
    if constexpr (kParams) group.weight = weight_ + column;
    group.columns = columns_[waiting_].sums, group.before = before(waiting_);
    if constexpr (kRows < kAll) group.third = third_row_.sums;
    HalfPack *const g = rows.g_lanes + first, *const product = rows.product_lanes + first;
    const int64_t whole = n / kPack, rest = n % kPack;
    const bool results = ahead_.results;
    bool first_tile = column == 0, second = false;
    Chains<kRows> chains{}, kept;
    if (rest > 0) {
      if (results) ask_for_results<kRows>(group, n - rest);
      add_pack<kRows, kFirst, kAll>(group, chains, Partial{n - rest, rest});
    }
    for (int64_t k = 0, stop = rest > 0 ? kChain - 1 : kChain;; stop += kChain) {
      const int64_t end = stop < whole ? stop : whole;
#pragma GCC unroll 1  // unrolled, the packs of four rows spill registers
      for (; k < end; ++k) {
        if constexpr (kAhead) ask_for_later<kRows>(group, k * kPack);
        if (results) ask_for_results<kRows>(group, k * kPack);
        add_pack<kRows, kFirst, kAll>(group, chains, Whole{k * kPack});
      }
      if (k == whole) break;
      if (second) {
        add_chains<kRows>(chains += kept, first_tile, g, product);
        first_tile = false;
      } else {
        kept = chains;
      }
      second = !second;
      chains = Chains<kRows>{};
    }
    if (second) chains += kept;
    add_chains<kRows>(chains, first_tile, g, product);
  }

  // The sums along the rows: those of a tile, widened.
  template <int kRows>
  FASTNORM_INLINE static void add_chains(const Chains<kRows>& chains, bool first_tile, HalfPack* g, HalfPack* product) {
    if (first_tile) {
      for_constants<kRows>([&](auto r) {
        if constexpr (kCentred) g[r] = widen(chains.g[r]);
        product[r] = widen(chains.product[r]);
      });
    } else {
      for_constants<kRows>([&](auto r) {
        if constexpr (kCentred) g[r] += widen(chains.g[r]);
        product[r] += widen(chains.product[r]);
      });
    }
  }

  template <int kRows>
  FASTNORM_INLINE void ask_for_later(const Group<kRows>& group, int64_t i) const {
    for_constants<kRows>([&](auto r) {
      prefetch<later>(group.x[r] + i, ahead_.summed);
      prefetch<later>(group.dy[r] + i, ahead_.summed);
    });
  }

  template <int kRows>
  FASTNORM_INLINE static void ask_for_results(const Group<kRows>& group, int64_t i) {
    for_constants<kRows>([&](auto r) { prefetch(group.x[r] + i, group.to_dx[r]); });
  }

  // A pack of all rows: a row's packs are read by one instruction, which the processor's reading ahead relies on.
  template <int kRows, int kFirst, int kAll, class At>
  FASTNORM_INLINE static void add_pack(const Group<kRows>& group, Chains<kRows>& chains, At at) {
    Pack<float> weight, dweight[2], dbias[2];
    if constexpr (kParams) weight = in_register(Whole{at.start}.template load<float>(group.weight));
    for_constants<kRows>([&](auto r) {
      Pack<float> centred = at.template load<float>(group.x[r]);
      if constexpr (kCentred) centred = (centred - group.mean[r]) - group.mean_lo[r];
      Pack<float> g = in_register(at.template load<float>(group.dy[r])), product = g * centred;
      if constexpr (kParams) {
        const Pack<float> term = product * group.rstd[r];
        dweight[r / 2] = r % 2 == 0 ? term : dweight[r / 2] + term;
        if constexpr (kCentred) dbias[r / 2] = r % 2 == 0 ? g : dbias[r / 2] + g;
        g *= weight;
        product = kCentred ? product * weight : g * centred;
      }
      if constexpr (kCentred) chains.g[r] += g;
      chains.product[r] += product;
    });
    if constexpr (kParams) {
      add_columns_of<kRows, kFirst, kAll>(group, at.start / kPack, 0, dweight);
      if constexpr (kCentred) add_columns_of<kRows, kFirst, kAll>(group, at.start / kPack, kColumnPacks, dbias);
    }
  }

  // The columns' sums of a pack, in a tree: (0 + 1) + (2 + 3), whether the rows come at once or one by one. Then what
  // there was before the group.
  template <int kRows, int kFirst, int kAll>
  FASTNORM_INLINE static void add_columns_of(const Group<kRows>& group, int64_t pack, int64_t half,
                                             const Pack<float> (&pairs)[2]) {
    Pack<float>* const column = group.columns + half + pack;
    Pack<float> sum = pairs[0];
    if constexpr (kRows > 2) sum += pairs[1];
    if constexpr (kRows < kAll && kFirst == 2) {
      group.third[half + pack] = sum;
    } else {
      if constexpr (kRows < kAll && kFirst == 3) sum = group.third[half + pack] + sum;
      if constexpr (kRows < kAll && kFirst > 0) sum = *column + sum;
      if constexpr (kFirst + kRows == kAll) {
        if (group.before) sum += group.before[half + pack];
      }
      *column = sum;
    }
  }

  // A group is to be summed up.
  void open(int first, int size, bool bias_alone) {
    if constexpr (kParams) {
      groups_[waiting_] = {first, size, bias_alone};
      if (unjudged_++ == 0 && !clear_) LostDigits::clear();
    }
  }

  // n columns of it are: they are widened with those of a second group, if that comes soon.
  void complete(TiledRows& rows, int64_t column, int64_t n) {
    if constexpr (kParams) {
      if (++waiting_ < 2 && n_ <= kRowStrip) return;
      judge(rows, column, n);
      add_columns(column, n);
    }
  }

  // Groups that may have lost digits are added up again.
  void judge(TiledRows& rows, int64_t column, int64_t n) {
    if (unjudged_ == 0) return;
    clear_ = !LostDigits::any();
    for (int k = waiting_ - unjudged_; !clear_ && k < waiting_; ++k) add_in_double(rows, k, column, n);
    unjudged_ = 0;
  }
  [[gnu::noinline]] void add_in_double(TiledRows& rows, int waiting, int64_t column, int64_t n) {
    const WaitingGroup group = groups_[waiting];
    for (int r = group.first; r < group.first + group.size && !group.bias_alone; ++r) {
      const float* const dy = rows.dy[r] + column;
      add_parameter_gradients(rows.x[r] + column, dy, n, rows.statistic(r), params_.from(column).without_bias());
      // Without a mean of g there are values of dx that are one g alone.
      if (!kCentred && loses_digits(dy, weight_ + column, n)) rows.be_careful(r);
    }
    for_packs(n, [&](auto at) { put_bias_sums(rows, group, waiting, column, at); });
    if (!kCentred || !params_.dbias) return;
    const float* const first = reinterpret_cast<const float*>(columns_[0].sums + kColumnPacks);
    float* const sums = reinterpret_cast<float*>(columns_[waiting].sums + kColumnPacks);
    for (int64_t i = 0; i < n; ++i) {
      if (std::fabs(sums[i]) < HUGE_VALF) continue;
      double sum = waiting > 0 ? static_cast<double>(first[i]) : 0;
      for (int r = group.first; r < group.first + group.size; ++r) sum += static_cast<double>(rows.dy[r][column + i]);
      params_.dbias[column + i] += sum;
      sums[i] = 0;
    }
  }

  // The columns' sums of a pack of a group: dbias as `sum` has it, dweight nothing.
  template <class At>
  FASTNORM_INLINE void put_bias_sums(const TiledRows& rows, const WaitingGroup& group, int waiting, int64_t column,
                                     At at) {
    const int64_t i = at.start / kPack;
    const Pack<float>* const first = before(waiting);
    Pack<float>* const columns = columns_[waiting].sums;
    columns[i] = first ? first[i] : Pack<float>(0.0f);
    if constexpr (kCentred) {
      const auto dy = [&](int k) { return at.template load<float>(rows.dy[group.first + k] + column); };
      Pack<float> sum = dy(0);
      if (group.size > 1) sum += dy(1);
      if (group.size > 2) sum += dy(2) + dy(3);
      columns[kColumnPacks + i] = first ? sum + first[kColumnPacks + i] : sum;
    }
  }

  // Is some dy * weight rounded below the ordinary numbers, or above all?
  static bool loses_digits(const float* dy, const float* weight, int64_t n) {
    bool lost = false;
    for (int64_t i = 0; i < n; ++i) {
      const double exact = static_cast<double>(dy[i]) * static_cast<double>(weight[i]);
      const float g = static_cast<float>(exact), size = std::fabs(g);
      lost = lost || (static_cast<double>(g) != exact && !(size >= 0x1p-126f && size < HUGE_VALF));
    }
    return lost;
  }

  FASTNORM_LOOPS [[gnu::noinline]] void add_columns(int64_t column, int64_t n) {
    const Pack<float>* const last = columns_[waiting_ - 1].sums;
    add_widened(last, params_.dweight + column, n);
    if (kCentred && params_.dbias) add_widened(last + kColumnPacks, params_.dbias + column, n);
    waiting_ = 0;
  }

  FASTNORM_INLINE static void add_widened(const Pack<float>* columns, double* sums, int64_t n) {
    for (int64_t i = 0; i * kPack < n; ++i) {
      const Whole at{i * kPack};
      at.store(sums, at.load<double>(sums) + widen(columns[i]));
    }
  }

  // What the sums of a second group begin with.
  const Pack<float>* before(int waiting) const { return waiting > 0 ? columns_[0].sums : nullptr; }

  const int64_t n_;
  const float* const weight_;
  const ParameterSums params_;
  const RowsAhead ahead_;
  int waiting_ = 0;   // groups whose columns are to be widened
  int unjudged_ = 0;  // the last of them, which may have lost digits
  // Is it known that nothing is noted yet? Asking waits for all arithmetic before it: 1 to 2 % of rows of 30 each time.
  bool clear_ = false;
  WaitingGroup groups_[2];
  Columns columns_[2];  // of the first group; of both
  std::conditional_t<kSideBySide, NoColumns, Columns> third_row_;
};

}  // namespace
}  // namespace fastnorm
