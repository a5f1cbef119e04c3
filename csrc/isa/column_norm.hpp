// Family::column: neighbouring values have weights of their own (batch norm on (N, C), batch, instance and group norm
// with channels last). Rows are read in slabs of eight, a tile of columns at a time, so that each column's accumulator
// is loaded and stored once for eight rows. A set is `columns_per_set` neighbouring columns (one, but for group norm).
//
//   x, y, dy, dx: (outer, rows, columns) with any strides;  statistics: per outer and set;  weight, bias: (params)
//
// Every column has a pivot, the mean of the first rows of its set, so that one reading gives moments without
// cancellation; sets whose first rows are not like the others are read once more, about their mean.
#pragma once

#include <initializer_list>

#include "isa/channel_norm.hpp"

namespace fastnorm {
namespace {

constexpr int kSlab = 8;                    // rows summed in a tree
constexpr int64_t kChunkBytes = 128 << 10;  // of x, whose sums are kept apart: what one thread takes
constexpr int64_t kMinChunkRows = 64, kMaxChunkRows = 8192;
constexpr int64_t kMaxGroups = 64;  // of outer indices, with a workspace each

// Eight rows (or fewer) of a tile of one operand: pointers into the array where columns are contiguous, else copies.
template <class T>
class Slab {
 public:
  Slab(const Operand& operand, int64_t outer, int64_t column, int64_t width)
      : operand_(operand),
        base_(operand.data + operand.set.offset(outer) + column * operand.column_stride),
        width_(width),
        direct_(operand.aligned && (operand.column_stride == static_cast<int64_t>(sizeof(T)) || width == 1)) {}

  void place(int64_t first, int64_t count) {
    count_ = count;
    for_pieces(base_, operand_.element, first, count, [this](char* from, int64_t stride, int64_t start, int64_t n) {
      for (int64_t i = 0; i < n; ++i) home_[start + i] = from + i * stride;
    });
    for (int64_t r = 0; r < count; ++r) rows_[r] = direct_ ? reinterpret_cast<T*>(home_[r]) : buffer_[r];
  }
  void load() {
    if (direct_) return;
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t c = 0; c < width_; ++c) {
        std::memcpy(buffer_[r] + c, home_[r] + c * operand_.column_stride, sizeof(T));
      }
    }
  }
  void store() const {
    if (direct_) return;
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t c = 0; c < width_; ++c) {
        std::memcpy(home_[r] + c * operand_.column_stride, buffer_[r] + c, sizeof(T));
      }
    }
  }
  T* row(int64_t r) const { return rows_[r]; }

 private:
  const Operand& operand_;
  char* base_;
  int64_t width_, count_ = 0;
  bool direct_;
  char* home_[kSlab];
  T* rows_[kSlab];
  alignas(64) T buffer_[kSlab][kColumnTile];
};

// Two sums per column. Float64 sums keep what they lose to rounding.
struct ColumnSums {
  double *first, *second, *first_lo, *second_lo;
  float* size;  // about the sum of |dy|: float32 gradients only
};

inline void add_exactly(double* hi, double* lo, int64_t c, double value) {
  const TwoTerm sum = two_sum(hi[c], value);
  hi[c] = sum.hi;
  lo[c] += sum.lo;
}

template <class T, class At>
FASTNORM_INLINE void add_columns(At at, double* hi, double* lo, const Pack<double>& terms) {
  const Pack<double> before = at.template load<double>(hi);
  const Pack<double> sum = before + terms;
  at.store(hi, sum);
  if constexpr (kMayOverflow<T>) {
    const Pack<double> part = sum - before;
    at.store(lo, at.template load<double>(lo) + ((before - (sum - part)) + (terms - part)));
  }
}

template <class T>
class Columns {
 public:
  Columns(const Plan& plan, const NormArgs<T>& args)
      : plan_(plan), args_(args), columns_(plan.columns), rows_(plan.elements) {
    const int64_t wanted = kChunkBytes / (columns_ * static_cast<int64_t>(sizeof(T))) / kSlab * kSlab;
    chunk_rows_ = wanted < kMinChunkRows ? kMinChunkRows : wanted > kMaxChunkRows ? kMaxChunkRows : wanted;
    chunks_ = (rows_ + chunk_rows_ - 1) / chunk_rows_;
    tiles_ = (columns_ + kColumnTile - 1) / kColumnTile;
    per_group_ = (plan.sets + kMaxGroups - 1) / kMaxGroups;
    groups_ = (plan.sets + per_group_ - 1) / per_group_;
    across_sets_ = plan.threads == 1 || groups_ >= 2 * plan.threads;
  }

  int64_t groups() const { return groups_; }
  int64_t sets_in_outer() const { return columns_ / plan_.columns_per_set; }
  // Doubles that the sums of one outer index take, chunk by chunk.
  int64_t sums_space() const { return chunks_ * kRowsOfSums * columns_; }

  ColumnSums sums_at(double* space, int64_t chunk) const {
    double* at = space + chunk * kRowsOfSums * columns_;
    return {at, at + columns_, at + 3 * columns_, at + 4 * columns_, reinterpret_cast<float*>(at + 2 * columns_)};
  }
  int64_t stat(int64_t outer, int64_t set) const { return plan_.set_stat.offset(outer) + set * plan_.column_stat; }
  int64_t param(int64_t outer, int64_t column) const {
    return plan_.set_param.offset(outer) + column * plan_.column_param;
  }

  // body(outer) for all outer indices, group by group (`begin_group(group)` comes first): each with one thread, or one
  // after the other with all threads on each.
  template <class Body>
  void for_outer(const Body& body) const {
    parallel_for(across_sets_ ? plan_.threads : 1, groups_, [&](int64_t group) {
      const int64_t end = (group + 1) * per_group_ < plan_.sets ? (group + 1) * per_group_ : plan_.sets;
      for (int64_t outer = group * per_group_; outer < end; ++outer) body(group, outer);
    });
  }

  // piece(chunk, column, width) for the chunks and tiles of one outer index.
  template <class Piece>
  void for_pieces_of(bool backwards, const Piece& piece) const {
    const int64_t count = chunks_ * tiles_;
    parallel_for(across_sets_ ? 1 : plan_.threads, count, [&](int64_t i) {
      const int64_t index = backwards ? count - 1 - i : i;
      const int64_t column = index % tiles_ * kColumnTile;
      piece(index / tiles_, column, columns_ - column < kColumnTile ? columns_ - column : kColumnTile);
      if (args_.past_cache) finish_stores();
    });
  }

  // visit(first row, rows) for the slabs of a chunk.
  template <class Visit>
  void for_slabs(int64_t chunk, const Visit& visit) const {
    const int64_t end = (chunk + 1) * chunk_rows_ < rows_ ? (chunk + 1) * chunk_rows_ : rows_;
    for (int64_t r = chunk * chunk_rows_; r < end; r += kSlab) visit(r, end - r < kSlab ? end - r : kSlab);
  }

  // Sums of term(at, row) over the rows of all chunks, per column, into space; chunk 0 ends up with the totals.
  template <int kOperands, class Prepare>
  void sum(int64_t outer, const Operand* const (&operands)[kOperands], double* space, const Prepare& prepare) const {
    for_pieces_of(false, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
      const ColumnSums all = sums_at(space, chunk);
      const ColumnSums to{all.first + column, all.second + column, all.first_lo + column, all.second_lo + column,
                          all.size + column};
      for (int64_t c = 0; c < width; ++c) {
        to.first[c] = to.second[c] = 0;
        if constexpr (kMayOverflow<T>) to.first_lo[c] = to.second_lo[c] = 0;
        if constexpr (!kMayOverflow<T>) to.size[c] = 0;
      }
      Slab<T> first(*operands[0], outer, column, width);
      Slab<T> second(*operands[kOperands - 1], outer, column, width);
      const auto term = prepare(column);
      for_slabs(chunk, [&](int64_t r, int64_t count) {
        first.place(r, count);
        first.load();
        if constexpr (kOperands == 2) {
          second.place(r, count);
          second.load();
        }
        const auto value = [&](auto at, int row) {
          if constexpr (kOperands == 2) return term(at, first.row(row), second.row(row));
          if constexpr (kOperands == 1) return term(at, first.row(row));
        };
        for_packs(width, [&](auto at) {
          PackPair terms;
          if (count == kSlab) {
            terms = ((value(at, 0) + value(at, 1)) + (value(at, 2) + value(at, 3))) +
                    ((value(at, 4) + value(at, 5)) + (value(at, 6) + value(at, 7)));
          } else {
            terms = value(at, 0);
            for (int row = 1; row < count; ++row) terms += value(at, row);
          }
          add_columns<T>(at, to.first, to.first_lo, terms.first);
          add_columns<T>(at, to.second, to.second_lo, terms.second);
          if constexpr (kOperands == 2 && !kMayOverflow<T>) {
            Pack<float> size = at.template load<float>(to.size);
            for (int row = 0; row < count; ++row) size += magnitude(at.template load<float>(second.row(row)));
            at.store(to.size, size);
          }
        });
      });
    });
    merge_chunks(space);
  }

  const Plan& plan() const { return plan_; }
  const NormArgs<T>& args() const { return args_; }
  int64_t columns() const { return columns_; }
  int64_t rows() const { return rows_; }

 private:
  // first, second, size; and for float64 what the first two have lost
  static constexpr int64_t kRowsOfSums = kMayOverflow<T> ? 5 : 3;

  void merge_chunks(double* space) const {
    const ColumnSums total = sums_at(space, 0);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const ColumnSums part = sums_at(space, chunk);
      for (int64_t c = 0; c < columns_; ++c) {
        if constexpr (kMayOverflow<T>) {
          add_exactly(total.first, total.first_lo, c, part.first[c]);
          add_exactly(total.second, total.second_lo, c, part.second[c]);
          total.first_lo[c] += part.first_lo[c];
          total.second_lo[c] += part.second_lo[c];
        } else {
          total.first[c] += part.first[c];
          total.second[c] += part.second[c];
          total.size[c] += part.size[c];
        }
      }
    }
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  int64_t columns_, rows_, chunk_rows_, chunks_, tiles_, per_group_, groups_;
  bool across_sets_;
};

template <class T>
inline Sum column_sum(const double* hi, const double* lo, int64_t c) {
  Sum sum;
  sum.hi = hi[c];
  if constexpr (kMayOverflow<T>) sum.lo = lo[c];
  return sum;
}

// One set of columns as a plan of its own, for the rare second measurements (set_moments.hpp).
inline Plan single_set(const Plan& plan, int64_t outer, int64_t set) {
  Plan single = plan;
  single.x.data += plan.x.set.offset(outer) + set * plan.columns_per_set * plan.x.column_stride;
  single.x.set = Walk{};
  single.whole = plan.x.element;
  single.whole.push(plan.columns_per_set, plan.x.column_stride);
  single.whole_blocks = cut_blocks(single.whole.count, single.whole.inner_size());
  return single;
}

template <class T>
inline Moments single_moments(const Plan& plan, const NormArgs<T>& args, int64_t outer, int64_t set, Statistic& s) {
  const Plan single = single_set(plan, outer, set);
  Moments moments = set_moments<T>(single, 0, true, 1);
  s = set_statistic(single, 0, args, moments);
  return moments;
}

// ---- moments

// Are moments about this pivot as good as about the mean? Float32 data leaves room in double, float64 data does not.
template <class T>
inline bool near_mean(double m2, double squares) {
  return m2 * (kMayOverflow<T> ? 1.5 : 0x1p12) >= squares;
}

// Pivots: the mean of the first rows of each set.
template <class T>
FASTNORM_LOOPS inline void first_means(const Columns<T>& columns, int64_t outer, double* pivots) {
  const Plan& plan = columns.plan();
  constexpr int64_t kSample = kMayOverflow<T> ? 8 * kSlab : kSlab;
  const int64_t rows = columns.rows() < kSample ? columns.rows() : kSample, width = plan.columns_per_set;
  for (int64_t column = 0; column < columns.columns(); column += kColumnTile) {
    const int64_t left = columns.columns() - column, tile = left < kColumnTile ? left : kColumnTile;
    Slab<T> x(plan.x, outer, column, tile);
    double* to = pivots + column;
    for (int64_t first = 0; first < rows; first += kSlab) {
      const int64_t count = rows - first < kSlab ? rows - first : kSlab;
      x.place(first, count);
      x.load();
      for_packs(tile, [&](auto at) {
        Pack<double> sum = first == 0 ? Pack<double>(0.0) : at.template load<double>(to);
        for (int64_t r = 0; r < count; ++r) sum += at.template load<double>(x.row(r));
        at.store(to, sum);
      });
    }
  }
  const double count = static_cast<double>(rows * width);
  for (int64_t first = 0; first < columns.columns(); first += width) {
    double sum = 0;
    for (int64_t c = first; c < first + width; ++c) sum += pivots[c];
    for (int64_t c = first; c < first + width; ++c) pivots[c] = sum / count;
  }
}

// Workspace of one group of outer indices, and of what is known of the outer index at hand.
template <class T>
struct ColumnSpace {
  double *sums, *pivots, *done;       // done: per set, 1 once its moments are known
  T *mean, *mean_lo, *factor, *bias;  // y = ((x - mean) - mean_lo) * factor + bias, per column
  T *rstd, *a, *b;                    // dx = rstd * ((dy * weight - a) - centred * b)
  Statistic* statistics;              // per set
  double *mean_g, *mean_g_xhat;       // per set
  double* careful;                    // per pack of columns: some of them want double, or a scale

  static int64_t size(const Columns<T>& columns) {
    return columns.sums_space() + 9 * columns.columns() + 8 * columns.sets_in_outer() + columns.columns() / kPack + 8;
  }
  ColumnSpace(double* space, const Columns<T>& columns) {
    const auto take = [&](int64_t count) {
      double* taken = space;
      space += count;
      return taken;
    };
    const int64_t width = columns.columns(), sets = columns.sets_in_outer();
    sums = take(columns.sums_space());
    pivots = take(width);
    for (T** array : {&mean, &mean_lo, &factor, &bias, &rstd, &a, &b}) *array = reinterpret_cast<T*>(take(width));
    done = take(sets);
    statistics = reinterpret_cast<Statistic*>(take(4 * sets));
    mean_g = take(sets);
    mean_g_xhat = take(sets);
    careful = take(width / kPack + 1);
  }
};

// Moments of all sets of one outer index: finish(set, moments).
template <class T, class Finish>
inline void outer_moments(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, const Finish& finish) {
  const Plan& plan = columns.plan();
  const int64_t width = plan.columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  const Operand* const operands[1] = {&plan.x};
  first_means(columns, outer, space.pivots);
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  for (const bool again : {false, true}) {
    columns.template sum<1>(outer, operands, space.sums, [&](int64_t column) {
      return [about = space.pivots + column](auto at, const T* x) {
        const Pack<double> d = at.template load<double>(x) - at.template load<double>(about);
        return PackPair{d, d * d};
      };
    });
    const ColumnSums sums = columns.sums_at(space.sums, 0);
    int64_t far = 0;
    for (int64_t set = 0; set < sets; ++set) {
      if (space.done[set] != 0) continue;
      Sum first, second;
      for (int64_t c = set * width; c < (set + 1) * width; ++c) {
        first.add(column_sum<T>(sums.first, sums.first_lo, c));
        second.add(column_sum<T>(sums.second, sums.second_lo, c));
      }
      Moments moments = moments_about(space.pivots[set * width], count, first.value(), second.value());
      if (again || near_mean<T>(moments.m2.value(), second.value())) {
        space.done[set] = 1;
        finish(set, moments);
      } else {
        ++far;
        for (int64_t c = set * width; c < (set + 1) * width; ++c) space.pivots[c] = moments.mean;
      }
    }
    if (far == 0) return;
  }
}

template <class T>
inline Statistic column_statistic(const Columns<T>& columns, int64_t outer, int64_t set, Moments& moments) {
  const double eps = columns.args().eps;
  if (!needs_scale<T>(moments, eps)) return statistic_of<T>(moments, eps, 1);
  Statistic s;
  moments = single_moments(columns.plan(), columns.args(), outer, set, s);
  return s;
}

// The statistic a forward left for its backward; measured again where float64 could not hold it.
template <class T>
inline Statistic kept_column_statistic(const Columns<T>& columns, int64_t outer, int64_t set) {
  const NormArgs<T>& args = columns.args();
  const int64_t stat = columns.stat(outer, set);
  if (args.constant_stats || !lost<T>(args.rstd[stat])) return given_statistic(args, stat);
  Statistic s;
  single_moments(columns.plan(), args, outer, set, s);
  return s;
}

// ---- forward

// What normalises each column, from the statistics of its set.
template <class T>
inline void prepare_normalise(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const int64_t width = columns.plan().columns_per_set;
  for (int64_t c = 0; c < columns.columns(); ++c) {
    const Statistic& s = space.statistics[c / width];
    const int64_t param = columns.param(outer, c);
    const double factor = s.rstd * (args.weight ? static_cast<double>(args.weight[param]) : 1);
    if (c % kPack == 0) space.careful[c / kPack] = 0;
    const bool plain = kMayOverflow<T> ? s.scale == 1 && std::fabs(factor) < 0x1p1000 && std::fabs(factor) > 0x1p-1000
                                       : fits(s) && moderate(factor);
    if (!plain) space.careful[c / kPack] = 1;
    space.mean[c] = static_cast<T>(s.mean);
    space.mean_lo[c] = static_cast<T>((s.mean - static_cast<double>(space.mean[c])) + s.mean_lo);
    space.factor[c] = static_cast<T>(factor);
    space.bias[c] = args.bias ? args.bias[param] : T(0);
    space.rstd[c] = plain ? T(1) : T(0);
  }
}

// One value in double, whatever its set.
template <class T>
inline T normalised(const Columns<T>& columns, int64_t outer, const Statistic& s, int64_t c, T x) {
  const NormArgs<T>& args = columns.args();
  const int64_t param = columns.param(outer, c);
  const double xhat = ((static_cast<double>(x) * s.scale - s.mean) - s.mean_lo) * s.rstd;
  return static_cast<T>(xhat * (args.weight ? static_cast<double>(args.weight[param]) : 1) +
                        (args.bias ? static_cast<double>(args.bias[param]) : 0));
}

// Lanes of a pack, one value at a time: result[lane] = value(lane) for those that are not plain.
template <class T, class At, class Value>
inline Pack<T> mend(At at, Pack<T> pack, const T* plain, int64_t width, const Value& value) {
  T lanes[kPack];
  std::memcpy(lanes, &pack, sizeof lanes);
  for (int64_t lane = 0; lane < kPack && at.start + lane < width; ++lane) {
    if (plain[at.start + lane] == 0) lanes[lane] = value(lane);
  }
  std::memcpy(&pack, lanes, sizeof lanes);
  return pack;
}

template <class T>
inline void normalise_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set;
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Slab<T> x(plan.x, outer, column, width), y(plan.y, outer, column, width);
    const T *mean = space.mean + column, *mean_lo = space.mean_lo + column, *factor = space.factor + column,
            *bias = space.bias + column, *plain = space.rstd + column;
    const double* careful = space.careful + column / kPack;
    columns.for_slabs(chunk, [&](int64_t r, int64_t count) {
      x.place(r, count);
      y.place(r, count);
      x.load();
      for_packs(width, [&](auto at) {
        const Pack<T> m = at.template load<T>(mean), lo = at.template load<T>(mean_lo), k = at.template load<T>(factor),
                      shift = at.template load<T>(bias);
        const bool mends = careful[at.start / kPack] != 0;
        const auto one = [&](int64_t row) {
          const T* from = x.row(row);
          Pack<T> result = ((at.template load<T>(from) - m) - lo) * k + shift;
          if (mends) {
            result = mend(at, result, plain, width, [&](int64_t lane) {
              const int64_t c = column + at.start + lane;
              return normalised(columns, outer, space.statistics[c / per_set], c, from[at.start + lane]);
            });
          }
          with_store(args.past_cache, y.row(row), [&](auto out) { out.store(at, y.row(row), result); });
        };
        if (count == kSlab) {
          FASTNORM_UNROLL
          for (int row = 0; row < kSlab; ++row) one(row);
        } else {
          for (int64_t row = 0; row < count; ++row) one(row);
        }
      });
      y.store();
    });
  });
}

template <class T>
bool column_moments(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, [&](int64_t set, Moments& moments) {
      const Statistic s = column_statistic(columns, outer, set, moments);
      store_statistic(args, columns.stat(outer, set), moments, s);
      args.var[columns.stat(outer, set)] *= moments.count;
    });
  });
  return true;
}

template <class T>
bool column_forward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, [&](int64_t set, Moments& moments) {
      space.statistics[set] = column_statistic(columns, outer, set, moments);
      store_statistic(args, columns.stat(outer, set), moments, space.statistics[set]);
    });
    prepare_normalise(columns, outer, space);
    normalise_outer(columns, outer, space);
  });
  return true;
}

template <class T>
bool column_apply(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
      space.statistics[set] = given_statistic(args, columns.stat(outer, set));
    }
    prepare_normalise(columns, outer, space);
    normalise_outer(columns, outer, space);
  });
  return true;
}

// ---- backward

// Sums of dy and of dy * xhat per column.
template <class T>
inline void gradient_outer_sums(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set;
  // In double, a column's numbers are loaded for every slab; mean_g and mean_g_xhat are per set, pivots per column.
  double *mean = space.pivots, *rstd = reinterpret_cast<double*>(space.mean);
  for (int64_t c = 0; c < columns.columns(); ++c) {
    mean[c] = space.statistics[c / per_set].mean;
    rstd[c] = space.statistics[c / per_set].rstd;
  }
  double *mean_lo = reinterpret_cast<double*>(space.mean_lo), *scale = reinterpret_cast<double*>(space.factor);
  for (int64_t c = 0; kMayOverflow<T> && c < columns.columns(); ++c) {
    mean_lo[c] = space.statistics[c / per_set].mean_lo;
    scale[c] = space.statistics[c / per_set].scale;
  }
  const Operand* const operands[2] = {&plan.x, &plan.dy};
  columns.template sum<2>(outer, operands, space.sums, [=](int64_t column) {
    return [=](auto at, const T* x, const T* dy) {
      Pack<double> v = at.template load<double>(x);
      if constexpr (kMayOverflow<T>) v = v * at.template load<double>(scale + column);
      v = v - at.template load<double>(mean + column);
      if constexpr (kMayOverflow<T>) v = v - at.template load<double>(mean_lo + column);
      const Pack<double> g = at.template load<double>(dy);
      return PackPair{g, g * (v * at.template load<double>(rstd + column))};
    };
  });
}

// The means of each set, and what makes dx of them in each column.
template <class T>
inline void prepare_gradient(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const int64_t width = columns.plan().columns_per_set;
  const double count = static_cast<double>(columns.rows() * width);
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  const auto weight_of = [&](int64_t c) {
    return args.weight ? static_cast<double>(args.weight[columns.param(outer, c)]) : 1;
  };
  for (int64_t c = 0; c < columns.columns(); c += kPack) space.careful[c / kPack] = 0;
  for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
    const Statistic& s = space.statistics[set];
    Sum a, b;
    double size = 0;
    bool plain_weights = true;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      a.add(weight_of(c) * column_sum<T>(sums.first, sums.first_lo, c).value());
      b.add(weight_of(c) * column_sum<T>(sums.second, sums.second_lo, c).value());
      if constexpr (!kMayOverflow<T>) size += static_cast<double>(sums.size[c]);
      plain_weights = plain_weights && moderate(weight_of(c));
    }
    const GradientMeans means = GradientMeans::of<T>(a, b, size, count, true, plain_weights, s);
    const bool plain = !args.constant_stats && (kMayOverflow<T> ? s.scale == 1 : means.in_float);
    space.mean_g[set] = means.a;
    space.mean_g_xhat[set] = means.b;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      if (!plain) space.careful[c / kPack] = 1;
      space.mean[c] = static_cast<T>(s.mean);
      space.mean_lo[c] = static_cast<T>((s.mean - static_cast<double>(space.mean[c])) + s.mean_lo);
      space.factor[c] = static_cast<T>(weight_of(c));
      space.a[c] = static_cast<T>(means.a);
      space.b[c] = static_cast<T>(kMayOverflow<T> ? means.b : means.b * s.rstd);
      space.rstd[c] = static_cast<T>(s.rstd);
      space.bias[c] = plain ? T(1) : T(0);
    }
  }
}

// One value in double, whatever its set.
template <class T>
inline T input_gradient(const NormArgs<T>& args, const Statistic& s, double g, double a, double b, T x) {
  double scaled = s.rstd * g;  // through given statistics nothing else comes back
  if (!args.constant_stats) {
    const double xhat = ((static_cast<double>(x) * s.scale - s.mean) - s.mean_lo) * s.rstd;
    scaled = s.rstd * ((g - a) - xhat * b);
  }
  return static_cast<T>(scaled * s.scale);
}

template <class T>
inline void gradient_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const NormArgs<T>& args = columns.args();
  const int64_t per_set = plan.columns_per_set;
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Slab<T> x(plan.x, outer, column, width), dy(plan.dy, outer, column, width), dx(plan.dx, outer, column, width);
    const double* careful = space.careful + column / kPack;
    columns.for_slabs(chunk, [&](int64_t r, int64_t count) {
      for (Slab<T>* slab : {&x, &dy, &dx}) slab->place(r, count);
      x.load();
      dy.load();
      for_packs(width, [&](auto at) {
        const auto of = [&](const T* array) { return at.template load<T>(array + column); };
        const Pack<T> m = of(space.mean), lo = of(space.mean_lo), w = of(space.factor), a = of(space.a),
                      b = of(space.b), rstd = of(space.rstd);
        const bool mends = careful[at.start / kPack] != 0;
        const auto one = [&](int64_t row) {
          const T *values = x.row(row), *gradients = dy.row(row);
          Pack<T> centred = (at.template load<T>(values) - m) - lo;
          if constexpr (kMayOverflow<T>) centred = centred * rstd;  // b is not folded with rstd: it could overflow
          Pack<T> result = rstd * ((at.template load<T>(gradients) * w - a) - centred * b);
          if (mends) {
            result = mend(at, result, space.bias + column, width, [&](int64_t lane) {
              const int64_t c = column + at.start + lane, set = c / per_set;
              const double weight = args.weight ? static_cast<double>(args.weight[columns.param(outer, c)]) : 1;
              return input_gradient(args, space.statistics[set],
                                    static_cast<double>(gradients[at.start + lane]) * weight, space.mean_g[set],
                                    space.mean_g_xhat[set], values[at.start + lane]);
            });
          }
          with_store(args.past_cache, dx.row(row), [&](auto out) { out.store(at, dx.row(row), result); });
        };
        if (count == kSlab) {
          FASTNORM_UNROLL
          for (int row = 0; row < kSlab; ++row) one(row);
        } else {
          for (int64_t row = 0; row < count; ++row) one(row);
        }
      });
      dx.store();
    });
  });
}

template <class T>
bool column_backward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size(columns), width = columns.columns();
  const bool want_params = args.dweight || args.dbias;
  const Workspace<double> workspace(columns.groups() * size);
  // Sums of the outer indices of a group that share parameters; those with parameters of their own share none.
  bool owns = false;
  for (int axis = 0; axis < plan.set_param.rank; ++axis) owns = owns || plan.set_param.stride[axis] != 0;
  const int64_t own = owns ? plan.sets : columns.groups();
  const Workspace<SegmentSums> partial(want_params ? own * width : 0);
  if (!workspace || !partial) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
      space.statistics[set] = kept_column_statistic(columns, outer, set);
    }
    gradient_outer_sums(columns, outer, space);
    prepare_gradient(columns, outer, space);
    if (want_params) {
      const ColumnSums sums = columns.sums_at(space.sums, 0);
      SegmentSums* to = &partial[(owns ? outer : group) * width];
      for (int64_t c = 0; c < width; ++c) {
        to[c].dy.add(column_sum<T>(sums.first, sums.first_lo, c));
        to[c].dy_xhat.add(column_sum<T>(sums.second, sums.second_lo, c));
      }
    }
    gradient_outer(columns, outer, space);
  });
  return reduce_parameter_gradients(plan, args, partial.data(), want_params ? own : 0, width, plan.column_param,
                                    [&](int64_t i) { return columns.param(owns ? i : 0, 0); });
}

}  // namespace
}  // namespace fastnorm
