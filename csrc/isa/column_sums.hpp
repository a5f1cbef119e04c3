// Two sums per column, over all rows: cut into chunks by the shape alone; added in plain lanes of double (float32
// moments), in trees of eight rows of float32 (float32 gradients) or of double (all else). Nothing here knows what is
// summed.
#pragma once

#include <cstdlib>

#include "isa/column_lines.hpp"

namespace fastnorm {
namespace {

// Two sums per column. Float64 sums keep what they lose to rounding.
struct ColumnSums {
  double *first, *second, *first_lo, *second_lo;

  ColumnSums operator+(int64_t c) const { return {first + c, second + c, first_lo + c, second_lo + c}; }
};

inline void add_exactly(double* hi, double* lo, int64_t c, double value) {
  const TwoTerm sum = two_sum(hi[c], value);
  hi[c] = sum.hi;
  lo[c] += sum.lo;
}

template <class T>
inline void add_sums(const ColumnSums& total, const ColumnSums& part, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    if constexpr (kMayOverflow<T>) {
      add_exactly(total.first, total.first_lo, c, part.first[c]);
      add_exactly(total.second, total.second_lo, c, part.second[c]);
      total.first_lo[c] += part.first_lo[c];
      total.second_lo[c] += part.second_lo[c];
    } else {
      total.first[c] += part.first[c];
      total.second[c] += part.second[c];
    }
  }
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

// Arrays of a workspace begin at whole lines: places for `count` numbers.
inline int64_t padded(int64_t count) { return (count + kPack - 1) / kPack * kPack; }

// Memory that nothing is known of.
class RawSpace {
 public:
  explicit RawSpace(int64_t count) : data_(std::malloc(static_cast<size_t>(count) * sizeof(double) + 64)) {}
  ~RawSpace() { std::free(data_); }
  RawSpace(const RawSpace&) = delete;
  RawSpace& operator=(const RawSpace&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  double* data() const {
    char* at = static_cast<char*>(data_);
    return reinterpret_cast<double*>(at + (-reinterpret_cast<uintptr_t>(at) & 63));
  }

 private:
  void* data_;
};

template <class T>
class Columns {
 public:
  Columns(const Plan& plan, const NormArgs<T>& args)
      : plan_(plan), args_(args), lines_(plan.elements, plan.columns), columns_(plan.columns), rows_(plan.elements) {
    constexpr int64_t kBytes = sizeof(T);
    const int64_t tile = lines_.length < kTile<T> ? lines_.length : kTile<T>;
    const int64_t wanted = kChunkBytes / (tile * kBytes) / kSlab * kSlab;
    const int64_t most = wanted < kMinChunkRows ? kMinChunkRows : wanted > kMaxChunkRows ? kMaxChunkRows : wanted;
    // Two, or a multiple of four, which differ by one slab at most: equal parts for two threads and for four.
    chunks_ = (lines_.count + most - 1) / most;
    if (chunks_ > 2) chunks_ = (chunks_ + 3) / 4 * 4;
    const int64_t slabs = (lines_.count + kSlab - 1) / kSlab;
    chunk_slabs_ = slabs / chunks_;
    longer_chunks_ = slabs % chunks_;
    const int64_t front = unaligned_values(reinterpret_cast<const T*>(plan.x.data));
    bool alike = !kMayOverflow<T>;  // float64 is added up from the beginning of its lines
    for (const Operand* operand : {&plan.y, &plan.dy, &plan.dx}) {
      const int64_t other = unaligned_values(reinterpret_cast<const T*>(operand->data));
      alike = alike && (operand->data == nullptr || other == front);
    }
    lead_ = alike && (lines_.many || lines_.length * kBytes > kLongLine) ? (kPack - front % kPack) % kPack : 0;
    tiles_ = (lines_.length + kTile<T> - 1) / kTile<T>;
    const int64_t fitting = kPanel<T> / tile / kSlab * kSlab;
    panel_lines_ = fitting < kMaxPanelRows ? fitting : kMaxPanelRows;
    const int64_t large = lines_.length * kBytes > kLongLine ? kLargeOfLongLines : kLarge;
    const bool far = plan.far || plan.sets * rows_ * columns_ * kBytes >= large;
    lines_ahead_ = far ? (kAheadBytes + tile * kBytes - 1) / (tile * kBytes) : 0;
    per_group_ = (plan.sets + kMaxGroups - 1) / kMaxGroups;
    groups_ = (plan.sets + per_group_ - 1) / per_group_;
    across_sets_ = plan.threads == 1 || groups_ >= 2 * plan.threads;
  }

  int64_t groups() const { return groups_; }
  // One for each group where groups go to threads. More than are needed take room in the caches (group norm's backward
  // of 7 x 7 with channels last, one thread: 10 % of the time).
  int64_t workspaces() const { return plan_.threads > 1 && across_sets_ ? groups_ : 1; }
  int64_t sets_in_outer() const { return columns_ / plan_.columns_per_set; }
  // Doubles that the sums of one outer index take, chunk by chunk.
  int64_t sums_space() const { return chunks_ * kRowsOfSums * space_per_line(); }
  // Arrays of a workspace that have the length of a line lie as x does in lines of the cache: doubles for one of them,
  // and where its values begin.
  int64_t space_per_line() const { return padded(lead_ + lines_.length + kPack); }
  template <class V>
  V* line_at(double* space) const {
    return reinterpret_cast<V*>(space) + lead_;
  }

  ColumnSums sums_at(double* space, int64_t chunk) const {
    const int64_t length = space_per_line();
    constexpr int64_t kLost = kMayOverflow<T> ? 2 : 0;
    double* const at = line_at<double>(space + chunk * kRowsOfSums * length);
    return {at, at + length, at + kLost * length, at + (kLost + 1) * length};
  }
  int64_t stat(int64_t outer, int64_t set) const { return plan_.set_stat.offset(outer) + set * plan_.column_stat; }
  int64_t param(int64_t outer, int64_t column) const {
    return plan_.set_param.offset(outer) + column * plan_.column_param;
  }
  // The longest chain of additions behind a plain sum of a set.
  double additions() const {
    return static_cast<double>(longest_chunk() + chunks_ + lines_.fold + plan_.columns_per_set);
  }

  // body(group, outer) for all outer indices: the groups go to threads, or each outer index to all of them.
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
    const auto body = [&](int64_t index) {
      const int64_t column = index % tiles_ * kTile<T>;
      piece(index / tiles_, column, length - column < kTile<T> ? length - column : kTile<T>);
      if (args_.past_cache) finish_stores();
    };
    parallel_for(across_sets_ ? 1 : plan_.threads, count, body, backwards);
  }

  // visit(first line, lines, shift, width) for the panels of a chunk; only the last line may be shorter than the
  // others. Where results lie without gaps, lines may begin `shift` values late, for them to be whole lines of the
  // cache, and end in the next one; what the very first leaves comes by itself, with no shift.
  template <class Visit>
  FASTNORM_INLINE void for_panels(int64_t chunk, int64_t column, int64_t width, int64_t shift,
                                  const Visit& visit) const {
    const int64_t begin = chunk_begin(chunk), end = chunk_begin(chunk + 1);
    const auto room = [&](int64_t line) { return rows_ * columns_ - (line * lines_.length + column + shift); };
    bool left = shift > 0 && begin == 0 && column == 0;
    for (int64_t first = begin; left || first < end;) {
      int64_t count = end - first < panel_lines_ ? end - first : panel_lines_;
      while (count > 1 && room(first + count - 1) < width) --count;
      const int64_t n = left ? shift : room(first + count - 1) < width ? room(first) : width;
      if (n > 0) visit(first, left ? 1 : count, left ? 0 : shift, n);
      first += left ? 0 : count;
      left = false;
    }
  }

  // Sums over the lines of all chunks, per column, into space: add(sums, lines, width, panels) adds those of a panel of
  // each operand. Chunk 0 ends up with the totals, its first `columns` places with those of all folds.
  template <int kOperands, class Add>
  void sum(int64_t outer, const Operand* const (&operands)[kOperands], double* space, const Add& add) const {
    for_pieces_of(false, [&](int64_t chunk, int64_t column, int64_t width) FASTNORM_LOOPS {
      const ColumnSums to = sums_at(space, chunk) + column;
      for_packs(width, [&](auto at) {  // in packs: `rep stos`, which is what compilers make of loops, starts slowly
        for (double* sums : {to.first, to.second}) at.store(sums, Pack<double>(0.0));
        if constexpr (kMayOverflow<T>) {
          for (double* sums : {to.first_lo, to.second_lo}) at.store(sums, Pack<double>(0.0));
        }
      });
      Tile<T> first(*operands[0], lines_, outer, column), second(*operands[kOperands - 1], lines_, outer, column);
      for_panels(chunk, column, width, 0, [&](int64_t line, int64_t count, int64_t, int64_t n) {
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
  // first and second, and of float64 what they have lost
  static constexpr int64_t kRowsOfSums = kMayOverflow<T> ? 4 : 2;

  int64_t chunk_begin(int64_t chunk) const {
    const int64_t longer = chunk < longer_chunks_ ? chunk : longer_chunks_;
    const int64_t line = (chunk * chunk_slabs_ + longer) * kSlab;
    return line < lines_.count ? line : lines_.count;
  }
  int64_t longest_chunk() const { return (chunk_slabs_ + (longer_chunks_ > 0)) * kSlab; }

  void merge_chunks(double* space) const {
    const ColumnSums total = sums_at(space, 0);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) add_sums<T>(total, sums_at(space, chunk), lines_.length);
    for (int64_t row = 1; row < lines_.fold; ++row) add_sums<T>(total, total + row * columns_, columns_);
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  Lines lines_;
  int64_t columns_, rows_, chunks_, chunk_slabs_, longer_chunks_, tiles_, panel_lines_, lines_ahead_, lead_, per_group_,
      groups_;
  bool across_sets_;
};

// The sum of term(at, line) over kLines lines, a power of two, as a tree, one branch after the other.
template <int kLines, class At, class Term>
FASTNORM_INLINE PackPair tree_of_lines(At at, int64_t line, const Term& term) {
  PackPair sum = term(at, line);
  if constexpr (kLines >= 2) sum += term(at, line + 1);
  if constexpr (kLines >= 4) sum += tree_of_lines<2>(at, line + 2, term);
  if constexpr (kLines >= 8) sum += tree_of_lines<4>(at, line + 4, term);
  return sum;
}

// Those left of fewer than eight.
template <class At, class Term>
FASTNORM_INLINE PackPair last_lines(At at, int64_t line, int64_t count, const Term& term) {
  const int64_t left = count - line;
  if (left == 1) return term(at, line);
  PackPair rest = tree_of_lines<2>(at, line, term);
  if (left >= 4) rest += tree_of_lines<2>(at, line + 2, term);
  PackPair last;
  if (left % 2 != 0) last = term(at, count - 1);
  if (left >= 6) {
    PackPair pair = tree_of_lines<2>(at, line + 4, term);
    if (left % 2 != 0) pair += last;
    rest += pair;
  } else if (left % 2 != 0) {
    rest += last;
  }
  return rest;
}

// Of so few terms in float64 the roundings do not cancel: those of every addition, and of squares, have to be kept
// (batch norm of 7 rows: 5.6 u of 4 without; from 17 rows on 3.6).
constexpr int64_t kFewLines = 16;

// Adds up the values of a panel in trees of eight lines: terms(at) gives, for the columns there, term(at, line). Packs
// of columns that are not `wanted` are left out. What float64 loses between trees is kept; within them, where there are
// `few` lines altogether.
template <class T, class Terms>
FASTNORM_INLINE void add_in_trees(const ColumnSums& to, int64_t count, int64_t width, const double* wanted, bool few,
                                  const Terms& terms) {
  for_packs(width, [&](auto at) FASTNORM_LOOPS {
    if (wanted[at.start / kPack] == 0) return;
    PackSum<T> first(at, to.first, to.first_lo), second(at, to.second, to.second_lo);
    const auto term = terms(at);
    const auto add = [&](const PackPair& sums) {
      first.add(sums.first);
      second.add(sums.second);
    };
    int64_t line = 0;
    if (kMayOverflow<T> && few) {
      for (; line < count; ++line) add(term(at, line));
    } else {
      for (; line + kSlab <= count; line += kSlab) add(tree_of_lines<kSlab>(at, line, term));
      if (line < count) add(last_lines(at, line, count, term));
    }
    first.store(at, to.first, to.first_lo);
    second.store(at, to.second, to.second_lo);
  });
}

// Sums of x and of x * x of float32 data in plain chains of double (PlainSums, moments.hpp).
template <bool kAhead>
FASTNORM_INLINE void add_plainly(const ColumnSums& to, int64_t count, int64_t width, const Panel<float>& x,
                                 int64_t distance) {
  for_pack_groups<float>(unaligned_front(x, width, kLongLine + 1), width, [&](auto at, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    PlainSums<> sums[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      sums[k].sum = at.template load<double>(to.first + k * kPack);
      sums[k].squares = at.template load<double>(to.second + k * kPack);
    }
    const float* from = x.data;
    const int64_t step = x.stride, lines = count, far = ahead_of_group<float>(distance, width);
    for (int64_t line = 0; line < lines; ++line, from += step) {
      FASTNORM_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        if constexpr (kAhead) prefetch(from + at.start + k * kPack, far);
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

// Terms of the two sums in float32.
using FloatTerms = LanePair<Pack<float>, Pack<float>>;

// The two sums of the trees that are not complete, per place of a tile.
struct TreeParts {
  alignas(64) float first[kTile<float> + kPack], second[kTile<float> + kPack];
};

// Which lines of its trees a call adds: all, or the first, some, or the last ones.
enum class TreePart { whole, first, middle, last };

// Adds terms(place, line, pivot) over kLines lines to `trees` trees of each column.
template <TreePart kPart, int kLines, class Terms>
FASTNORM_INLINE void add_tree_lines(const ColumnSums& to, int64_t trees, int64_t front, int64_t width,
                                    const float* pivots, const Terms& panel, TreeParts& parts) {
  constexpr bool kStarts = kPart == TreePart::whole || kPart == TreePart::first;
  constexpr bool kEnds = kPart == TreePart::whole || kPart == TreePart::last;
  for_pack_groups<float>(front, width, [&](auto place, auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    const ColumnSums sums = to + place.start;
    const int64_t part = (kPack - front) % kPack + place.start;  // packs of the parts in whole lines of the cache too
    Terms terms = panel;
    terms.move(place.start);
    const auto at = [&](int k) FASTNORM_LOOPS { return moved(place, k * kPack - place.start); };
    Pack<double> first[kPacks], second[kPacks];
    Pack<float> pivot[kPacks];
    FASTNORM_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      if constexpr (kEnds) {
        first[k] = at(k).template load<double>(sums.first);
        second[k] = at(k).template load<double>(sums.second);
      }
      pivot[k] = at(k).template load<float>(pivots + place.start);
    }
    for (int64_t tree = 0; tree < trees; ++tree) {
      FASTNORM_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        const auto pair = [&](int64_t line) FASTNORM_LOOPS {
          FloatTerms sum = terms(at(k), line, pivot[k]);
          if constexpr (kLines > 1) sum = terms(at(k), line + 1, pivot[k], sum);
          return sum;
        };
        FloatTerms sum = pair(0);
        if constexpr (!kStarts) {
          sum.first += at(k).template load<float>(parts.first + part);
          sum.second += at(k).template load<float>(parts.second + part);
        }
        FASTNORM_UNROLL
        for (int line = 2; line < kLines; line += 2) sum = sum + pair(line);
        if constexpr (kEnds) {
          first[k] += widen(sum.first);
          second[k] += widen(sum.second);
        } else {
          at(k).store(parts.first + part, sum.first);
          at(k).store(parts.second + part, sum.second);
        }
      }
      terms.next(kLines);
    }
    if constexpr (kEnds) {
      FASTNORM_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        at(k).store(sums.first, first[k]);
        at(k).store(sums.second, second[k]);
      }
    }
  });
}

// The same for float32 data whose terms may be rounded to float32: eight lines are added in float32, as a chain of
// pairs, and widened once. Every term then goes through four additions that round, at most, and the sum is off by no
// more than that of the sum of their magnitudes; conversions, which are what double sums spend their time on, are an
// eighth. A term may need a number of its column, its `pivot`: terms(place, line, pivot), and terms(place, line, pivot,
// other) with those of another line added, in one step, for few registers spill otherwise (AVX2: batch norm's backward
// with channels last takes a third less). Lines that come from memory (`in_order`) are read two at a time: more of
// them, a page apart, would push each other out of the nearest cache.
template <class Terms>
FASTNORM_INLINE void add_in_short_trees(const ColumnSums& to, int64_t count, int64_t front, int64_t width,
                                        bool in_order, const float* pivots, const Terms& panel) {
  TreeParts parts;
  Terms terms = panel;
  const int64_t trees = count / kSlab;
  if (in_order) {
    for (int64_t pair = 0; pair < trees * kSlab; pair += 2, terms.next(2)) {
      if (pair % kSlab == 0) {
        add_tree_lines<TreePart::first, 2>(to, 1, front, width, pivots, terms, parts);
      } else if (pair % kSlab < kSlab - 2) {
        add_tree_lines<TreePart::middle, 2>(to, 1, front, width, pivots, terms, parts);
      } else {
        add_tree_lines<TreePart::last, 2>(to, 1, front, width, pivots, terms, parts);
      }
    }
  } else {
    add_tree_lines<TreePart::whole, kSlab>(to, trees, front, width, pivots, terms, parts);
    terms.next(trees * kSlab);
  }
  if (count % kSlab != 0) add_tree_lines<TreePart::whole, 1>(to, count % kSlab, front, width, pivots, terms, parts);
}

}  // namespace
}  // namespace fastnorm
