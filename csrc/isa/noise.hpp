// Gaussian noise over any strides: elements are walked as they lie in memory. Promises the same bits for every cut of
// the range, layout and level. Compiled once per instruction-set level, inside an anonymous namespace; no standard
// containers.
#pragma once

#include "isa/normal.hpp"
#include "isa/walk_runs.hpp"

namespace fastnorm {
namespace {

// The variates around the place last asked for.
class NormalWindow {
 public:
  explicit NormalWindow(const PhiloxStream& stream) : stream_(stream) {}

  const double* at(int64_t index, int64_t* length) {
    if (index < first_ || index >= first_ + size) {
      first_ = index - index % size;
      normal_group(z_, static_cast<uint64_t>(first_) / 2, stream_);
    }
    const int64_t start = index - first_;
    if (*length > size - start) *length = size - start;
    return z_ + start;
  }

 private:
  static constexpr int64_t size = 2 * kGroupBlocks;
  PhiloxStream stream_;
  int64_t first_ = -size;
  double z_[size];
};

template <class T>
void gaussian_noise(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                    const PhiloxStream& stream, double std) {
  const InnerStrides inner(walk);
  NormalWindow window(stream);
  for_each_run(walk, first, count, [&](int64_t length, int64_t yo, int64_t xo, int64_t mask) {
    while (length > 0) {
      int64_t part = length;
      const double* z = window.at(mask, &part);
      map_run<T>(y + yo, x + xo, inner.result, inner.input, part,
                 [=](T value, int64_t i) { return static_cast<T>(static_cast<double>(value) + std * z[i]); });
      length -= part;
      mask += part;
      yo += part * inner.result;
      xo += part * inner.input;
    }
  });
}

// Tiles first .. first + count of a walk that is tiled: some rows of variates at a time, used column by column.
template <class T>
void noise_tiles(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count,
                 const PhiloxStream& stream, double std) {
  constexpr int64_t rows = 16, row_size = 2 * kGroupBlocks * ((kTileColumns + 2 * kGroupBlocks) / (2 * kGroupBlocks));
  static_assert(row_size > kTileColumns, "whole groups hold a row, wherever it starts");
  const int row_axis = walk.axes - 1, column_axis = walk.axes - 2;
  const int64_t pitch = walk.stride[ElementWalk::mask][row_axis];
  double z[rows][row_size];
  for_each_tile(walk, first, count, [&](const DrawTile& tile) {
    for (int64_t r = 0; r < tile.rows; r += rows) {
      const int64_t used = tile.rows - r < rows ? tile.rows - r : rows;
      const int64_t index = tile.at[ElementWalk::mask] + r * pitch;
      for (int64_t i = 0; i < used; ++i) {
        const int64_t start = index + i * pitch;
        for (int64_t c = 0; c < start % 2 + tile.columns; c += 2 * kGroupBlocks) {
          normal_group(z[i] + c, static_cast<uint64_t>(start + c) / 2, stream);
        }
      }
      const auto place = [&](ElementWalk::Operand k, int64_t c) {
        return tile.at[k] + r * walk.stride[k][row_axis] + c * walk.stride[k][column_axis];
      };
      for (int64_t c = 0; c < tile.columns; ++c) {
        const auto variate = [&](int64_t i) { return z[i][c + (index + i * pitch) % 2]; };
        map_run<T>(y + place(ElementWalk::result, c), x + place(ElementWalk::input, c),
                   walk.stride[ElementWalk::result][row_axis], walk.stride[ElementWalk::input][row_axis], used,
                   [&](T value, int64_t i) { return static_cast<T>(static_cast<double>(value) + std * variate(i)); });
      }
    }
  });
}

}  // namespace
}  // namespace fastnorm
