// How the column kernels come to their values: lines (rows, or several short rows read as one) in panels that fit the
// nearest cache, in place where they are evenly spaced and contiguous, through a buffer where they are not.
#pragma once

#include <initializer_list>

#include "isa/channel_norm.hpp"

namespace fastnorm {
namespace {

constexpr int kSlab = 8;                    // rows summed in a tree
constexpr int64_t kChunkBytes = 128 << 10;  // of a tile of x, whose sums are kept apart: what one thread takes
constexpr int64_t kMinChunkRows = 128, kMaxChunkRows = 4096;
constexpr int64_t kMaxGroups = 64;  // of outer indices: what one thread takes
template <class T>
constexpr int64_t kTile = 4096 / sizeof(T);  // values of a line worked on together
template <class T>
constexpr int64_t kPanel = 32768 / sizeof(T);  // values of an operand at hand at a time
constexpr int64_t kMaxPanelRows = 64;          // a multiple of kSlab, as is kPanel / kTile
constexpr int64_t kLongLine = 1024;            // bytes; longer ones are read in order where they come from memory
// Bytes of an array that is asked for ahead (20 x 20 with channels last: asking from 3 MB on took 7 to 20 % of the
// time; of long lines, in whose order memory is read then, not asking takes 10 to 20 % longer).
constexpr int64_t kLarge = 6 << 20, kLargeOfLongLines = 3 << 20;
constexpr int64_t kFewColumns = 48;  // fewer are read several rows at a time

// Narrow rows are read as long ones: `fold` rows of `columns` values make one line, in which every column comes `fold`
// times. The statistics of a set add up what its columns' places have gathered.
struct Lines {
  int64_t columns, fold, length, count, last;  // last: values in the last line
  bool many;                                   // worth some work to have them lie in whole lines of the cache

  Lines(int64_t rows, int64_t columns_in_row) : columns(columns_in_row), fold(1) {
    if (columns < kFewColumns) {
      while (fold * columns % kPack != 0) fold *= 2;
      if (rows < 8 * fold) fold = 1;
    }
    length = fold * columns;
    count = (rows + fold - 1) / fold;
    last = (rows - (count - 1) * fold) * columns;
    many = count >= 128;
  }
};

template <class T>
struct Panel {
  T* data;
  int64_t stride;  // from line to line

  Panel from(int64_t line) const { return {data + line * stride, stride}; }
  Panel moved(int64_t values) const { return {data + values, stride}; }
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

  // Does every panel lie in place, its lines equally far apart?
  bool in_place() const { return together_ && operand_.element.rank <= 1; }

  // Values of a line before the first one at which whole lines of the cache begin, if they begin there in every line
  // and all lines, of which there are many, follow each other without a gap; else -1.
  int64_t values_before_cache_line() const {
    const int64_t bytes = lines_.length * static_cast<int64_t>(sizeof(T));
    if (!lines_.many || !in_place() || step_ != bytes || bytes % kLineBytes != 0) return -1;
    return unaligned_values(reinterpret_cast<const T*>(base_));
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
  const bool banded = lines_ahead != 0 && width * static_cast<int64_t>(sizeof(T)) > kLongLine;
  const int64_t band = banded ? kBand : count;
  for (int64_t first = 0; first < count; first += band) visit(first, count - first < band ? count - first : band);
}

// call(true or false, as a constant): is memory to be asked ahead?
template <class Call>
FASTNORM_INLINE void with_ahead(bool ahead, const Call& call) {
  if (ahead) {
    call(std::true_type{});
  } else {
    call(std::false_type{});
  }
}

// The place some values after another one.
FASTNORM_INLINE Whole moved(Whole at, int64_t values) { return {at.start + values}; }
FASTNORM_INLINE Partial moved(Partial at, int64_t values) { return {at.start + values, at.count}; }

// Values at the front of the lines of n of a panel that are worked on by themselves, for the others to lie in whole
// lines of the cache: 12 in arrays of NumPy's, which would else take two lines for each pack. Not where the lines of
// the panel lie differently, nor where they have fewer than `shortest` bytes: the parts of packs at either end cost
// more then.
template <class T>
FASTNORM_INLINE int64_t unaligned_front(const Panel<T>& panel, int64_t n, int64_t shortest) {
  const int64_t size = sizeof(T);
  if (n * size < shortest || panel.stride * size % kLineBytes != 0) return 0;
  return unaligned_values(panel.data);
}

// body(place, packs) along a line of n values: `front` values, places of as many whole packs as registers hold, then of
// fewer.
template <int kPacks>
using Packs = std::integral_constant<int, kPacks>;

template <class T, class Body>
FASTNORM_INLINE void for_pack_groups(int64_t front, int64_t n, const Body& body) {
  int64_t i = front;
  if (front > 0) body(Partial{0, front}, Packs<1>{});
  if constexpr (kManyRegisters) {
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; i + 4 * kPack <= n; i += 4 * kPack) body(Whole{i}, Packs<4>{});
    }
    for (; i + 2 * kPack <= n; i += 2 * kPack) body(Whole{i}, Packs<2>{});
  }
  for (; i + kPack <= n; i += kPack) body(Whole{i}, Packs<1>{});
  if (i < n) body(Partial{i, n - i}, Packs<1>{});
}

// How far ahead a loop over a group of the packs of lines of n asks, from how far a loop over whole lines does. With
// few registers a group is one pack, and soon done with (56 x 56 on AVX2, channels last: batch norm 2.7 ms to 2.1,
// group norm 3.3 to 2.1). Long lines are read in bands.
template <class T>
FASTNORM_INLINE int64_t ahead_of_group(int64_t distance, int64_t n) {
  if (kManyRegisters || n < kPack || n * static_cast<int64_t>(sizeof(T)) > kLongLine) return distance;
  return distance * (n / kPack);
}

}  // namespace
}  // namespace fastnorm
