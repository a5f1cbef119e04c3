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
constexpr int64_t kChunkBytes = 128 << 10;  // of a tile of x, whose sums are kept apart: what one thread takes
constexpr int64_t kMinChunkRows = 128, kMaxChunkRows = 4096;
constexpr int64_t kMaxGroups = 64;  // of outer indices, with a workspace each
template <class T>
constexpr int64_t kTile = 4096 / sizeof(T);  // values of a line worked on together
template <class T>
constexpr int64_t kPanel = 32768 / sizeof(T);  // values of an operand at hand at a time
constexpr int64_t kMaxPanelRows = 64;          // a multiple of kSlab, as is kPanel / kTile
constexpr int64_t kFewColumns = 48;            // fewer are read several rows at a time
constexpr int64_t kAheadBytes = 8192;          // see reading_ahead (runs.hpp)
constexpr int64_t kLargeBytes = 3 << 20;
constexpr bool kManyRegisters = kVectorBytes == 64;

// Narrow rows are read as long ones: `fold` rows of `columns` values make one line, in which every column comes `fold`
// times. The statistics of a set add up what its columns' places have gathered.
struct Lines {
  int64_t columns, fold, length, count, last;  // last: values in the last line

  Lines(int64_t rows, int64_t columns_in_row) : columns(columns_in_row), fold(1) {
    if (columns < kFewColumns) {
      while (fold * columns % kPack != 0) fold *= 2;
      if (rows < 8 * fold) fold = 1;
    }
    length = fold * columns;
    count = (rows + fold - 1) / fold;
    last = (rows - (count - 1) * fold) * columns;
  }
};

template <class T>
struct Panel {
  T* data;
  int64_t stride;  // from line to line

  Panel from(int64_t line) const { return {data + line * stride, stride}; }
};

// A tile of one operand, read or written some lines at a time: where it lies if the tile's values are neighbours there
// and the lines evenly spaced, else through a buffer.
template <class T>
class Tile {
 public:
  Tile(const Operand& operand, const Lines& lines, int64_t outer, int64_t column)
      : operand_(operand), lines_(lines), base_(operand.data + operand.set.offset(outer)), column_(column) {
    const Walk& walk = operand.element;
    const int64_t row_bytes = lines.columns * static_cast<int64_t>(sizeof(T));
    together_ = operand.aligned && (operand.column_stride == static_cast<int64_t>(sizeof(T)) || lines.columns == 1);
    if (lines.fold > 1) together_ = together_ && walk.rank == 1 && walk.stride[0] == row_bytes;
    step_ = walk.rank == 0 ? 0 : lines.fold * walk.stride[walk.rank - 1];
  }

  Panel<T> read(int64_t first, int64_t count, int64_t width) {
    const Panel<T> panel = open(first, count, width);
    if (panel.data == buffer_) {
      for_stretches(first, count, width, [&](char* from, T* to, int64_t n) {
        for (int64_t c = 0; c < n; ++c) std::memcpy(to + c, from + c * operand_.column_stride, sizeof(T));
      });
    }
    return panel;
  }
  Panel<T> open(int64_t first, int64_t count, int64_t width) {
    const Walk& walk = operand_.element;
    const bool evenly = walk.rank <= 1 || first % walk.inner_size() + count <= walk.inner_size();
    if (!together_ || !evenly) return {buffer_, width};
    char* at = base_ + walk.offset(first * lines_.fold) + column_ * static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<T*>(at), step_ / static_cast<int64_t>(sizeof(T))};
  }
  void commit(const Panel<T>& panel, int64_t first, int64_t count, int64_t width) {
    if (panel.data != buffer_) return;
    for_stretches(first, count, width, [&](char* to, const T* from, int64_t n) {
      for (int64_t c = 0; c < n; ++c) std::memcpy(to + c * operand_.column_stride, from + c, sizeof(T));
    });
  }

 private:
  // visit(place in the array, place in the buffer, n) for the parts of rows that the panel is made of.
  template <class Visit>
  void for_stretches(int64_t first, int64_t count, int64_t width, const Visit& visit) {
    for (int64_t line = 0; line < count; ++line) {
      for (int64_t done = 0; done < width;) {
        const int64_t row = (column_ + done) / lines_.columns, column = (column_ + done) % lines_.columns;
        const int64_t room = lines_.columns - column, n = room < width - done ? room : width - done;
        char* at = base_ + operand_.element.offset((first + line) * lines_.fold + row);
        visit(at + column * operand_.column_stride, buffer_ + line * width + done, n);
        done += n;
      }
    }
  }

  const Operand& operand_;
  const Lines& lines_;
  char* base_;
  int64_t column_, step_;
  bool together_;
  alignas(64) T buffer_[kPanel<T>];
};

// visit(first, lines) for a panel: some lines at a time where they are long and come from memory, which likes to be
// read in order.
template <class T, int64_t kBand, class Visit>
FASTNORM_INLINE void for_bands(int64_t count, int64_t width, int64_t lines_ahead, const Visit& visit) {
  constexpr int64_t kLong = 1024;  // bytes
  const bool banded = lines_ahead != 0 && width * static_cast<int64_t>(sizeof(T)) > kLong;
  const int64_t band = banded ? kBand : count;
  for (int64_t first = 0; first < count; first += band) visit(first, count - first < band ? count - first : band);
}

// body(place, packs) along a line of n values: places of as many whole packs as registers hold, then of fewer.
template <int kPacks>
using Packs = std::integral_constant<int, kPacks>;

template <class T, class Body>
FASTNORM_INLINE void for_pack_groups(int64_t n, const Body& body) {
  int64_t i = 0;
  if constexpr (kManyRegisters) {
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; i + 4 * kPack <= n; i += 4 * kPack) body(Whole{i}, Packs<4>{});
    }
    for (; i + 2 * kPack <= n; i += 2 * kPack) body(Whole{i}, Packs<2>{});
  }
  for (; i + kPack <= n; i += kPack) body(Whole{i}, Packs<1>{});
  if (i < n) body(Partial{i, n - i}, Packs<1>{});
}

// Two sums per column. Float64 sums keep what they lose to rounding.
struct ColumnSums {
  double *first, *second, *first_lo, *second_lo;
  float* size;  // about the sum of |dy|: float32 gradients only

  ColumnSums operator+(int64_t c) const { return {first + c, second + c, first_lo + c, second_lo + c, size + c}; }
};

inline void add_exactly(double* hi, double* lo, int64_t c, double value) {
  const TwoTerm sum = two_sum(hi[c], value);
  hi[c] = sum.hi;
  lo[c] += sum.lo;
}

// A running sum of packs that keeps what float64 terms lose.
template <class T>
struct PackSum {
  Pack<double> hi, lo;

  template <class At>
  FASTNORM_INLINE PackSum(At at, const double* from, const double* from_lo) : hi(at.template load<double>(from)) {
    if constexpr (kMayOverflow<T>) lo = at.template load<double>(from_lo);
  }
  FASTNORM_INLINE void add(const Pack<double>& terms) {
    const Pack<double> before = hi;
    hi = before + terms;
    if constexpr (kMayOverflow<T>) {
      const Pack<double> part = hi - before;
      lo += (before - (hi - part)) + (terms - part);
    }
  }
  template <class At>
  FASTNORM_INLINE void store(At at, double* to, double* to_lo) const {
    at.store(to, hi);
    if constexpr (kMayOverflow<T>) at.store(to_lo, lo);
  }
};

template <class T>
class Columns {
 public:
  Columns(const Plan& plan, const NormArgs<T>& args)
      : plan_(plan), args_(args), lines_(plan.elements, plan.columns), columns_(plan.columns), rows_(plan.elements) {
    constexpr int64_t kBytes = sizeof(T);
    const int64_t tile = lines_.length < kTile<T> ? lines_.length : kTile<T>;
    const int64_t wanted = kChunkBytes / (tile * kBytes) / kSlab * kSlab;
    chunk_lines_ = wanted < kMinChunkRows ? kMinChunkRows : wanted > kMaxChunkRows ? kMaxChunkRows : wanted;
    chunks_ = (lines_.count + chunk_lines_ - 1) / chunk_lines_;
    tiles_ = (lines_.length + kTile<T> - 1) / kTile<T>;
    const int64_t fitting = kPanel<T> / tile / kSlab * kSlab;
    panel_lines_ = fitting < kMaxPanelRows ? fitting : kMaxPanelRows;
    lines_ahead_ =
        plan.sets * rows_ * columns_ * kBytes < kLargeBytes ? 0 : (kAheadBytes + tile * kBytes - 1) / (tile * kBytes);
    per_group_ = (plan.sets + kMaxGroups - 1) / kMaxGroups;
    groups_ = (plan.sets + per_group_ - 1) / per_group_;
    across_sets_ = plan.threads == 1 || groups_ >= 2 * plan.threads;
  }

  int64_t groups() const { return groups_; }
  int64_t sets_in_outer() const { return columns_ / plan_.columns_per_set; }
  // Doubles that the sums of one outer index take, chunk by chunk.
  int64_t sums_space() const { return chunks_ * kRowsOfSums * lines_.length; }

  ColumnSums sums_at(double* space, int64_t chunk) const {
    const int64_t length = lines_.length;
    double* at = space + chunk * kRowsOfSums * length;
    return {at, at + length, at + 3 * length, at + 4 * length, reinterpret_cast<float*>(at + 2 * length)};
  }
  int64_t stat(int64_t outer, int64_t set) const { return plan_.set_stat.offset(outer) + set * plan_.column_stat; }
  int64_t param(int64_t outer, int64_t column) const {
    return plan_.set_param.offset(outer) + column * plan_.column_param;
  }
  // The longest chain of additions behind a plain sum of a set.
  double additions() const { return static_cast<double>(chunk_lines_ + chunks_ + lines_.fold + plan_.columns_per_set); }

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
    const int64_t count = chunks_ * tiles_, length = lines_.length;
    parallel_for(across_sets_ ? 1 : plan_.threads, count, [&](int64_t i) {
      const int64_t index = backwards ? count - 1 - i : i;
      const int64_t column = index % tiles_ * kTile<T>;
      piece(index / tiles_, column, length - column < kTile<T> ? length - column : kTile<T>);
      if (args_.past_cache) finish_stores();
    });
  }

  // visit(first line, lines, width) for the panels of a chunk; only the last line may be shorter than the others.
  template <class Visit>
  FASTNORM_INLINE void for_panels(int64_t chunk, int64_t column, int64_t width, const Visit& visit) const {
    const int64_t whole = lines_.last == lines_.length ? lines_.count : lines_.count - 1;
    const int64_t begin = chunk * chunk_lines_, past = begin + chunk_lines_;
    const int64_t end = past < whole ? past : whole;
    for (int64_t first = begin; first < end; first += panel_lines_) {
      visit(first, end - first < panel_lines_ ? end - first : panel_lines_, width);
    }
    if (past > whole && whole < lines_.count && column < lines_.last) {
      visit(whole, int64_t{1}, lines_.last - column < width ? lines_.last - column : width);
    }
  }

  // Sums over the lines of all chunks, per column, into space: add(sums, lines, width, panels) adds those of a panel of
  // each operand. Chunk 0 ends up with the totals, its first `columns` places with those of all folds.
  template <int kOperands, class Add>
  void sum(int64_t outer, const Operand* const (&operands)[kOperands], double* space, const Add& add) const {
    for_pieces_of(false, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
      const ColumnSums to = sums_at(space, chunk) + column;
      for (int64_t c = 0; c < width; ++c) {
        to.first[c] = to.second[c] = 0;
        if constexpr (kMayOverflow<T>) to.first_lo[c] = to.second_lo[c] = 0;
        if constexpr (!kMayOverflow<T>) to.size[c] = 0;
      }
      Tile<T> first(*operands[0], lines_, outer, column), second(*operands[kOperands - 1], lines_, outer, column);
      for_panels(chunk, column, width, [&](int64_t line, int64_t count, int64_t n) {
        const Panel<T> x = first.read(line, count, n);
        if constexpr (kOperands == 1) add(to, column, count, n, x);
        if constexpr (kOperands == 2) add(to, column, count, n, x, second.read(line, count, n));
      });
    });
    merge_chunks(space);
  }

  const Plan& plan() const { return plan_; }
  const NormArgs<T>& args() const { return args_; }
  const Lines& lines() const { return lines_; }
  int64_t columns() const { return columns_; }
  int64_t rows() const { return rows_; }
  // How far ahead a first reading asks for what comes, in lines; 0 where the nearer caches hold the array anyway.
  int64_t lines_ahead() const { return lines_ahead_; }

 private:
  // first, second, size; and for float64 what the first two have lost
  static constexpr int64_t kRowsOfSums = kMayOverflow<T> ? 5 : 3;

  static void add_sums(const ColumnSums& total, const ColumnSums& part, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
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

  void merge_chunks(double* space) const {
    const ColumnSums total = sums_at(space, 0);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) add_sums(total, sums_at(space, chunk), lines_.length);
    for (int64_t row = 1; row < lines_.fold; ++row) add_sums(total, total + row * columns_, columns_);
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  Lines lines_;
  int64_t columns_, rows_, chunk_lines_, chunks_, tiles_, panel_lines_, lines_ahead_, per_group_, groups_;
  bool across_sets_;
};

// Adds up the values of a panel in trees of eight lines: terms(at) gives, for the columns there, term(at, line).
template <class T, class Terms>
FASTNORM_INLINE void add_in_trees(const ColumnSums& to, int64_t count, int64_t width, const Terms& terms) {
  for_packs(width, [&](auto at) {
    PackSum<T> first(at, to.first, to.first_lo), second(at, to.second, to.second_lo);
    const auto term = terms(at);
    int64_t line = 0;
    for (; line + kSlab <= count; line += kSlab) {
      const auto pair = [&](int64_t i) { return term(at, line + i) + term(at, line + i + 1); };
      PackPair half = pair(0) + pair(2);
      half += pair(4) + pair(6);
      first.add(half.first);
      second.add(half.second);
    }
    if (line < count) {
      PackPair rest = term(at, line);
      while (++line < count) rest += term(at, line);
      first.add(rest.first);
      second.add(rest.second);
    }
    first.store(at, to.first, to.first_lo);
    second.store(at, to.second, to.second_lo);
  });
}

// Sums of x and of x * x of float32 data in plain chains of double (PlainSums, moments.hpp).
FASTNORM_INLINE void add_plainly(const ColumnSums& to, int64_t count, int64_t width, const Panel<float>& x,
                                 int64_t lines_ahead) {
  const int64_t distance = lines_ahead * x.stride * static_cast<int64_t>(sizeof(float));
  for_pack_groups<float>(width, [&](auto at, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    PlainSums sums[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      sums[k].sum = at.template load<double>(to.first + k * kPack);
      sums[k].squares = at.template load<double>(to.second + k * kPack);
    }
    const float* from = x.data;
    for (int64_t line = 0; line < count; ++line, from += x.stride) {
      FASTNORM_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        prefetch(from + at.start + k * kPack, distance);
        sums[k].add(at, from + k * kPack);
      }
    }
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      at.store(to.first + k * kPack, sums[k].sum);
      at.store(to.second + k * kPack, sums[k].squares);
    }
  });
}

// Sums of dy and of dy * x in the same way, and of |dy|.
FASTNORM_INLINE void add_plainly(const ColumnSums& to, int64_t count, int64_t width, const Panel<float>& x,
                                 const Panel<float>& dy, int64_t lines_ahead) {
  const int64_t x_distance = lines_ahead * x.stride * static_cast<int64_t>(sizeof(float));
  const int64_t dy_distance = lines_ahead * dy.stride * static_cast<int64_t>(sizeof(float));
  for_pack_groups<float>(width, [&](auto at, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    PlainGradientSums sums[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      sums[k].dy_sum = at.template load<double>(to.first + k * kPack);
      sums[k].product_sum = at.template load<double>(to.second + k * kPack);
      sums[k].size.sum = at.template load<float>(to.size + k * kPack);
    }
    const float *values = x.data, *gradients = dy.data;
    for (int64_t line = 0; line < count; ++line, values += x.stride, gradients += dy.stride) {
      FASTNORM_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        prefetch(values + at.start + k * kPack, x_distance);
        prefetch(gradients + at.start + k * kPack, dy_distance);
        sums[k].add(at, values + k * kPack, gradients + k * kPack);
      }
    }
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      at.store(to.first + k * kPack, sums[k].dy_sum);
      at.store(to.second + k * kPack, sums[k].product_sum);
      at.store(to.size + k * kPack, sums[k].size.sum);
    }
  });
}

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
inline void first_means(const Columns<T>& columns, int64_t outer, double* pivots) {
  const Plan& plan = columns.plan();
  constexpr int64_t kSample = kMayOverflow<T> ? 8 * kSlab : kSlab;
  const int64_t rows = columns.rows() < kSample ? columns.rows() : kSample, width = plan.columns_per_set;
  const Lines rows_apart(0, columns.columns());  // no folding
  for (int64_t column = 0; column < columns.columns(); column += kTile<T>) {
    const int64_t left = columns.columns() - column, tile = left < kTile<T> ? left : kTile<T>;
    Tile<T> tiles(plan.x, rows_apart, outer, column);
    for (int64_t c = 0; c < tile; ++c) pivots[column + c] = 0;
    for (int64_t first = 0; first < rows; first += kSlab) {
      const int64_t count = rows - first < kSlab ? rows - first : kSlab;
      const Panel<T> x = tiles.read(first, count, tile);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < tile; ++c) pivots[column + c] += static_cast<double>(x.data[r * x.stride + c]);
      }
    }
  }
  const double count = static_cast<double>(rows * width);
  for (int64_t first = 0; first < columns.columns(); first += width) {
    double sum = 0;
    for (int64_t c = first; c < first + width; ++c) sum += pivots[c];
    for (int64_t c = first; c < first + width; ++c) pivots[c] = sum / count;
  }
}

// The first `columns` values of an array, repeated for all places of a line.
template <class V>
inline void repeat(const Lines& lines, V* values) {
  for (int64_t at = lines.columns; at < lines.length; ++at) values[at] = values[at - lines.columns];
}

// Workspace of one group of outer indices, and of what is known of the outer index at hand. Arrays "per place" have
// the length of a line.
template <class T>
struct ColumnSpace {
  double *sums, *pivots, *done;       // done: per set, 1 once its moments are known
  double* centre[4];                  // mean, rstd, and for float64 mean_lo and scale, per place
  double *dy, *dy_xhat, *size;        // sums per column
  T *mean, *mean_lo, *factor, *bias;  // y = ((x - mean) - mean_lo) * factor + bias, per place
  T *rstd, *a, *b;                    // dx = rstd * ((dy * weight - a) - centred * b)
  T* plain;                           // 0 where a place wants double, or a scale
  Statistic* statistics;              // per set
  double *mean_g, *mean_g_xhat;       // per set
  double* careful;                    // per pack of places: some of them are not plain

  static int64_t size_of(const Columns<T>& columns) {
    return columns.sums_space() + 16 * columns.lines().length + 8 * columns.sets_in_outer() +
           columns.lines().length / kPack + 8;
  }
  ColumnSpace(double* space, const Columns<T>& columns) {
    const auto take = [&](int64_t count) {
      double* taken = space;
      space += count;
      return taken;
    };
    const int64_t length = columns.lines().length, sets = columns.sets_in_outer();
    sums = take(columns.sums_space());
    for (double** array : {&pivots, &centre[0], &centre[1], &centre[2], &centre[3], &dy, &dy_xhat, &size}) {
      *array = take(length);
    }
    for (T** array : {&mean, &mean_lo, &factor, &bias, &rstd, &a, &b, &plain}) {
      *array = reinterpret_cast<T*>(take(length));
    }
    done = take(sets);
    statistics = reinterpret_cast<Statistic*>(take(4 * sets));
    mean_g = take(sets);
    mean_g_xhat = take(sets);
    careful = take(length / kPack + 1);
  }

  // To be called when plain[c] is known for all columns.
  void find_careful(const Lines& lines) const {
    bool all = true;
    for (int64_t c = 0; c < lines.columns; ++c) all = all && plain[c] != 0;
    for (int64_t at = 0; at < lines.length; at += kPack) careful[at / kPack] = 0;
    if (all) return;
    repeat(lines, plain);
    for (int64_t at = 0; at < lines.length; ++at) {
      if (plain[at] == 0) careful[at / kPack] = 1;
    }
  }
};

// Moments of the sets of one outer index from plain sums: finish(set, moments) and done = 1 where these will do. True
// if that was everywhere.
template <class Finish>
inline bool plain_moments(const Columns<float>& columns, int64_t outer, const ColumnSpace<float>& space,
                          const Finish& finish) {
  const int64_t width = columns.plan().columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  const Operand* const operands[1] = {&columns.plan().x};
  const int64_t ahead = columns.lines_ahead();
  columns.sum<1>(outer, operands, space.sums,
                 [ahead](const ColumnSums& to, int64_t, int64_t lines, int64_t n, const Panel<float>& x) {
                   add_plainly(to, lines, n, x, ahead);
                 });
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  bool all = true;
  for (int64_t set = 0; set < sets; ++set) {
    PlainTotals totals;
    totals.additions = columns.additions();
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      totals.sum += sums.first[c];
      totals.squares += sums.second[c];
    }
    Moments moments;
    const bool good = moments_of(totals, count, true, moments);
    space.done[set] = good;
    if (good) finish(set, moments);
    all = all && good;
  }
  return all;
}

// Moments of all sets of one outer index: finish(set, moments). `precise`: in any case from deviations.
template <class T, class Finish>
inline void outer_moments(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space, bool precise,
                          const Finish& finish) {
  const Plan& plan = columns.plan();
  const int64_t width = plan.columns_per_set, sets = columns.sets_in_outer();
  const double count = static_cast<double>(columns.rows() * width);
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  if constexpr (!kMayOverflow<T>) {
    if (!precise && plain_moments(columns, outer, space, finish)) return;
  }
  const Operand* const operands[1] = {&plan.x};
  const int64_t ahead = columns.lines_ahead();
  first_means(columns, outer, space.pivots);
  for (const bool again : {false, true}) {
    repeat(columns.lines(), space.pivots);
    columns.template sum<1>(outer, operands, space.sums,
                            [&](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x) {
                              const int64_t distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
                              add_in_trees<T>(to, lines, n, [&](auto place) {
                                return [=, about = place.template load<double>(space.pivots + column)](auto at,
                                                                                                       int64_t line) {
                                  const T* from = x.data + line * x.stride;
                                  prefetch(from + at.start, distance);
                                  const Pack<double> d = at.template load<double>(from) - about;
                                  return PackPair{d, d * d};
                                };
                              });
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

// What normalises each place, from the statistics of its set.
template <class T>
inline void prepare_normalise(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Lines& lines = columns.lines();
  const int64_t width = columns.plan().columns_per_set, param = columns.param(outer, 0),
                step = columns.plan().column_param;
  for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
    const Statistic& s = space.statistics[set];
    const bool set_is_plain = kMayOverflow<T> ? s.scale == 1 : fits(s);
    const T mean = static_cast<T>(s.mean);
    const T mean_lo = static_cast<T>((s.mean - static_cast<double>(mean)) + s.mean_lo);
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      const double factor = s.rstd * (args.weight ? static_cast<double>(args.weight[param + c * step]) : 1);
      const bool plain =
          kMayOverflow<T> ? std::fabs(factor) < 0x1p1000 && std::fabs(factor) > 0x1p-1000 : moderate(factor);
      space.mean[c] = mean;
      space.mean_lo[c] = mean_lo;
      space.factor[c] = static_cast<T>(factor);
      space.bias[c] = args.bias ? args.bias[param + c * step] : T(0);
      space.plain[c] = set_is_plain && plain ? T(1) : T(0);
    }
  }
  for (T* array : {space.mean, space.mean_lo, space.factor, space.bias}) repeat(lines, array);
  space.find_careful(lines);
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

// body(IntoCache or PastCache) for a panel of results.
template <class T, class Body>
FASTNORM_INLINE void with_panel_store(bool past_cache, const Panel<T>& panel, const Body& body) {
  const bool even = panel.stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  with_store(past_cache && even, panel.data, body);
}

// Are all the packs of a group plain?
template <class T>
FASTNORM_INLINE bool all_plain(const ColumnSpace<T>& space, int64_t place, int packs) {
  const double* careful = space.careful + place / kPack;
  for (int k = 0; k < packs; ++k) {
    if (careful[k] != 0) return false;
  }
  return true;
}

template <class T>
inline void normalise_outer(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set;
  columns.for_pieces_of(true, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
    Tile<T> x_tile(plan.x, columns.lines(), outer, column), y_tile(plan.y, columns.lines(), outer, column);
    columns.for_panels(chunk, column, width, [&](int64_t first, int64_t count, int64_t n) {
      const Panel<T> x = x_tile.read(first, count, n), y = y_tile.open(first, count, n);
      const int64_t distance = columns.lines_ahead() * x.stride * static_cast<int64_t>(sizeof(T));
      with_panel_store(args.past_cache, y, [&](auto out) {
        for_bands<T, kMayOverflow<T> ? 2 : kMaxPanelRows>(
            count, n, columns.lines_ahead(), [&](int64_t band, int64_t lines) {
              for_pack_groups<T>(n, [&](auto at, auto packs) {
                constexpr int kPacks = decltype(packs)::value;
                Pack<T> mean[kPacks], mean_lo[kPacks], factor[kPacks], bias[kPacks];
                FASTNORM_UNROLL
                for (int k = 0; k < kPacks; ++k) {
                  const int64_t place = column + k * kPack;
                  mean[k] = at.template load<T>(space.mean + place);
                  mean_lo[k] = at.template load<T>(space.mean_lo + place);
                  factor[k] = at.template load<T>(space.factor + place);
                  bias[k] = at.template load<T>(space.bias + place);
                }
                const auto result = [&](const T* from, int k) {
                  return ((at.template load<T>(from + k * kPack) - mean[k]) - mean_lo[k]) * factor[k] + bias[k];
                };
                const T* from = x.from(band).data;
                T* to = y.from(band).data;
                if (all_plain(space, column + at.start, kPacks)) {
                  for (int64_t line = 0; line < lines; ++line, from += x.stride, to += y.stride) {
                    FASTNORM_UNROLL
                    for (int k = 0; k < kPacks; ++k) {
                      prefetch(from + at.start + k * kPack, distance);
                      out.store(at, to + k * kPack, result(from, k));
                    }
                  }
                  return;
                }
                for (int64_t line = 0; line < lines; ++line, from += x.stride, to += y.stride) {
                  for (int k = 0; k < kPacks; ++k) {
                    const int64_t group = k * kPack;
                    const Pack<T> mended =
                        mend(at, result(from, k), space.plain + column + group, n - group, [&](int64_t lane) {
                          const int64_t c = (column + group + at.start + lane) % columns.columns();
                          return normalised(columns, outer, space.statistics[c / per_set], c,
                                            from[group + at.start + lane]);
                        });
                    out.store(at, to + group, mended);
                  }
                }
              });
            });
      });
      y_tile.commit(y, first, count, n);
    });
  });
}

template <class T>
bool column_moments(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, true, [&](int64_t set, Moments& moments) {
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
  const int64_t size = ColumnSpace<T>::size_of(columns);
  const Workspace<double> workspace(columns.groups() * size);
  if (!workspace) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    outer_moments(columns, outer, space, false, [&](int64_t set, Moments& moments) {
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
  const int64_t size = ColumnSpace<T>::size_of(columns);
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

// Sums of dy and of dy * xhat per column, and of |dy| for float32.
template <class T>
inline void gradient_outer_sums(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const Plan& plan = columns.plan();
  const int64_t per_set = plan.columns_per_set, sets = columns.sets_in_outer(), ahead = columns.lines_ahead();
  const Operand* const operands[2] = {&plan.x, &plan.dy};
  const ColumnSums sums = columns.sums_at(space.sums, 0);
  bool all = !kMayOverflow<T>;
  for (int64_t set = 0; set < sets; ++set) space.done[set] = 0;
  if constexpr (!kMayOverflow<T>) {
    columns.template sum<2>(
        outer, operands, space.sums,
        [ahead](const ColumnSums& to, int64_t, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy) {
          for_bands<T, 2>(lines, n, ahead, [&](int64_t first, int64_t band) {
            add_plainly(to, band, n, x.from(first), dy.from(first), ahead);
          });
        });
    for (int64_t set = 0; set < sets; ++set) {
      const Statistic& s = space.statistics[set];
      const bool plain = sums_plainly(s, columns.args().eps, columns.additions());
      for (int64_t c = set * per_set; c < (set + 1) * per_set; ++c) {
        const double difference = sums.second[c] - s.mean * sums.first[c];
        space.dy[c] = sums.first[c];
        space.dy_xhat[c] = difference * s.rstd;
        space.size[c] = static_cast<double>(sums.size[c]);
      }
      space.done[set] = plain;
      all = all && plain;
    }
  }
  if (all) return;
  double *mean = space.centre[0], *rstd = space.centre[1], *mean_lo = space.centre[2], *scale = space.centre[3];
  for (int64_t c = 0; c < columns.columns(); ++c) {
    const Statistic& s = space.statistics[c / per_set];
    mean[c] = s.mean;
    rstd[c] = s.rstd;
    mean_lo[c] = s.mean_lo;
    scale[c] = s.scale;
  }
  for (double* array : space.centre) repeat(columns.lines(), array);
  columns.template sum<2>(
      outer, operands, space.sums,
      [=](const ColumnSums& to, int64_t column, int64_t lines, int64_t n, const Panel<T>& x, const Panel<T>& dy) {
        const int64_t x_distance = ahead * x.stride * static_cast<int64_t>(sizeof(T));
        const int64_t dy_distance = ahead * dy.stride * static_cast<int64_t>(sizeof(T));
        add_in_trees<T>(to, lines, n, [&](auto place) {
          const auto of = [&](const double* array) { return place.template load<double>(array + column); };
          return [=, m = of(mean), lo = of(mean_lo), k = of(scale), r = of(rstd)](auto at, int64_t line) {
            const T *values = x.data + line * x.stride, *gradients = dy.data + line * dy.stride;
            prefetch(values + at.start, x_distance);
            prefetch(gradients + at.start, dy_distance);
            Pack<double> v = at.template load<double>(values);
            if constexpr (kMayOverflow<T>) v = v * k;
            v = v - m;
            if constexpr (kMayOverflow<T>) v = v - lo;
            const Pack<double> g = at.template load<double>(gradients);
            return PackPair{g, g * (v * r)};
          };
        });
      });
  for (int64_t c = 0; c < columns.columns(); ++c) {
    if (space.done[c / per_set] != 0) continue;
    space.dy[c] = sums.first[c];
    space.dy_xhat[c] = sums.second[c];
  }
}

inline Sum kept_sum(double hi, double lo) {
  Sum sum;
  sum.hi = hi;
  sum.lo = lo;
  return sum;
}

// The sums of one column. What float64 sums have lost is where they were added up.
template <class T>
inline Sum sum_of_dy(const Columns<T>& columns, const ColumnSpace<T>& space, int64_t c) {
  return kept_sum(space.dy[c], kMayOverflow<T> ? columns.sums_at(space.sums, 0).first_lo[c] : 0);
}
template <class T>
inline Sum sum_of_dy_xhat(const Columns<T>& columns, const ColumnSpace<T>& space, int64_t c) {
  return kept_sum(space.dy_xhat[c], kMayOverflow<T> ? columns.sums_at(space.sums, 0).second_lo[c] : 0);
}

// The means of each set, and what makes dx of them in each place.
template <class T>
inline void prepare_gradient(const Columns<T>& columns, int64_t outer, const ColumnSpace<T>& space) {
  const NormArgs<T>& args = columns.args();
  const Lines& lines = columns.lines();
  const int64_t width = columns.plan().columns_per_set, param = columns.param(outer, 0),
                step = columns.plan().column_param;
  const double count = static_cast<double>(columns.rows() * width);
  const auto weight_of = [&](int64_t c) {
    return args.weight ? static_cast<double>(args.weight[param + c * step]) : 1;
  };
  for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
    const Statistic& s = space.statistics[set];
    Sum a, b;
    double size = 0;
    bool plain_weights = true;
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      const double weight = weight_of(c);
      if constexpr (kMayOverflow<T>) {
        a.add(weight * sum_of_dy(columns, space, c).value());
        b.add(weight * sum_of_dy_xhat(columns, space, c).value());
      } else {
        a.hi += weight * space.dy[c];
        b.hi += weight * space.dy_xhat[c];
        size += space.size[c];
      }
      plain_weights = plain_weights && moderate(weight);
    }
    const GradientMeans means = GradientMeans::of<T>(a, b, size, count, true, plain_weights, s);
    const bool plain = !args.constant_stats && (kMayOverflow<T> ? s.scale == 1 : means.in_float);
    space.mean_g[set] = means.a;
    space.mean_g_xhat[set] = means.b;
    const T mean = static_cast<T>(s.mean);
    const T mean_lo = static_cast<T>((s.mean - static_cast<double>(mean)) + s.mean_lo);
    for (int64_t c = set * width; c < (set + 1) * width; ++c) {
      space.mean[c] = mean;
      space.mean_lo[c] = mean_lo;
      space.factor[c] = static_cast<T>(weight_of(c));
      space.a[c] = static_cast<T>(means.a);
      space.b[c] = static_cast<T>(kMayOverflow<T> ? means.b : means.b * s.rstd);
      space.rstd[c] = static_cast<T>(s.rstd);
      space.plain[c] = plain ? T(1) : T(0);
    }
  }
  for (T* array : {space.mean, space.mean_lo, space.factor, space.a, space.b, space.rstd}) repeat(lines, array);
  space.find_careful(lines);
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
    const Lines& lines = columns.lines();
    Tile<T> x_tile(plan.x, lines, outer, column), dy_tile(plan.dy, lines, outer, column),
        dx_tile(plan.dx, lines, outer, column);
    columns.for_panels(chunk, column, width, [&](int64_t first, int64_t count, int64_t n) {
      const Panel<T> x = x_tile.read(first, count, n), dy = dy_tile.read(first, count, n),
                     dx = dx_tile.open(first, count, n);
      const int64_t x_distance = columns.lines_ahead() * x.stride * static_cast<int64_t>(sizeof(T));
      const int64_t dy_distance = columns.lines_ahead() * dy.stride * static_cast<int64_t>(sizeof(T));
      with_panel_store(args.past_cache, dx, [&](auto out) {
        for_bands<T, 2>(count, n, columns.lines_ahead(), [&](int64_t band, int64_t band_lines) {
          for_pack_groups<T>(n, [&](auto at, auto packs) {
            constexpr int kPacks = decltype(packs)::value;
            Pack<T> mean[kPacks], mean_lo[kPacks], weight[kPacks], a[kPacks], b[kPacks], rstd[kPacks];
            FASTNORM_UNROLL
            for (int k = 0; k < kPacks; ++k) {
              const int64_t place = column + k * kPack;
              mean[k] = at.template load<T>(space.mean + place);
              mean_lo[k] = at.template load<T>(space.mean_lo + place);
              weight[k] = at.template load<T>(space.factor + place);
              a[k] = at.template load<T>(space.a + place);
              b[k] = at.template load<T>(space.b + place);
              rstd[k] = at.template load<T>(space.rstd + place);
            }
            const auto result = [&](const T* values, const T* gradients, int k) {
              Pack<T> centred = (at.template load<T>(values + k * kPack) - mean[k]) - mean_lo[k];
              if constexpr (kMayOverflow<T>) centred = centred * rstd[k];  // folded with b it could overflow
              return rstd[k] * ((at.template load<T>(gradients + k * kPack) * weight[k] - a[k]) - centred * b[k]);
            };
            const T *values = x.from(band).data, *gradients = dy.from(band).data;
            T* to = dx.from(band).data;
            if (all_plain(space, column + at.start, kPacks)) {
              for (int64_t line = 0; line < band_lines; ++line) {
                FASTNORM_UNROLL
                for (int k = 0; k < kPacks; ++k) {
                  prefetch(values + at.start + k * kPack, x_distance);
                  prefetch(gradients + at.start + k * kPack, dy_distance);
                  out.store(at, to + k * kPack, result(values, gradients, k));
                }
                values += x.stride, gradients += dy.stride, to += dx.stride;
              }
              return;
            }
            for (int64_t line = 0; line < band_lines; ++line) {
              for (int k = 0; k < kPacks; ++k) {
                const int64_t group = k * kPack;
                const Pack<T> mended =
                    mend(at, result(values, gradients, k), space.plain + column + group, n - group, [&](int64_t lane) {
                      const int64_t i = group + at.start + lane, c = (column + i) % columns.columns(),
                                    set = c / per_set;
                      const double w = args.weight ? static_cast<double>(args.weight[columns.param(outer, c)]) : 1;
                      return input_gradient(args, space.statistics[set], static_cast<double>(gradients[i]) * w,
                                            space.mean_g[set], space.mean_g_xhat[set], values[i]);
                    });
                out.store(at, to + group, mended);
              }
              values += x.stride, gradients += dy.stride, to += dx.stride;
            }
          });
        });
      });
      dx_tile.commit(dx, first, count, n);
    });
  });
}

template <class T>
bool column_backward(const Plan& plan, const NormArgs<T>& args) {
  const Columns<T> columns(plan, args);
  const int64_t size = ColumnSpace<T>::size_of(columns), width = columns.columns();
  const bool want_params = args.dweight || args.dbias;
  const Workspace<double> workspace(columns.groups() * size);
  // Sums of the outer indices of a group that share parameters; those with parameters of their own share none.
  bool owns = false;
  for (int axis = 0; axis < plan.set_param.rank; ++axis) owns = owns || plan.set_param.stride[axis] != 0;
  const int64_t own = owns ? plan.sets : columns.groups();
  const Workspace<SegmentSums> partial(want_params ? own * width : 0), totals(want_params ? plan.params : 0);
  if (!workspace || !partial || !totals) return false;
  columns.for_outer([&](int64_t group, int64_t outer) {
    const ColumnSpace<T> space(&workspace[group * size], columns);
    for (int64_t set = 0; set < columns.sets_in_outer(); ++set) {
      space.statistics[set] = kept_column_statistic(columns, outer, set);
    }
    gradient_outer_sums(columns, outer, space);
    prepare_gradient(columns, outer, space);
    if (want_params) {
      SegmentSums* to = &partial[(owns ? outer : group) * width];
      for (int64_t c = 0; c < width; ++c) {
        to[c].dy.add(sum_of_dy(columns, space, c));
        to[c].dy_xhat.add(sum_of_dy_xhat(columns, space, c));
      }
    }
    gradient_outer(columns, outer, space);
  });
  reduce_parameter_gradients(
      plan, args, partial.data(), want_params ? own : 0, width, plan.column_param,
      [&](int64_t i) { return columns.param(owns ? i : 0, 0); }, totals.data());
  return true;
}

}  // namespace
}  // namespace fastnorm
