// Dropout where memory runs along another axis than the draws do (Fortran order, channels last): tiles of the plane of
// both axes, whose draws are made along the one and turned for the other. Promises the bits of isa/dropout.hpp.
// Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cstring>

#include "isa/mask_draws.hpp"
#include "isa/walk_runs.hpp"

namespace fastnorm {
namespace {

// b[r] byte c <-> b[c] byte r
[[gnu::always_inline]] inline void turn_bytes(uint64_t b[8]) {
  const auto exchange = [&](int distance, uint64_t mask) {
    for (int r = 0; r < 8; ++r) {
      if (r & distance) continue;
      const uint64_t t = ((b[r] >> 8 * distance) ^ b[r + distance]) & mask;
      b[r + distance] ^= t;
      b[r] ^= t << 8 * distance;
    }
  };
  exchange(4, 0x00000000FFFFFFFFu);
  exchange(2, 0x0000FFFF0000FFFFu);
  exchange(1, 0x00FF00FF00FF00FFu);
}

// keep[c][r] of a tile: whether the element at column c (along the draws) and row r (along memory) is kept.
class TileMask {
 public:
  static constexpr int64_t rows = kTileRows, columns = kTileColumns;

  // Row r has the draws from index + r * pitch on.
  void make(int64_t index, int64_t pitch, int64_t used_rows, int64_t used_columns, const MaskDraw& draw) {
    const int16_t below = HalfThreshold(draw.threshold).below;
    for (int64_t r = 0; r < used_rows; r += 8) {
      const int64_t eight = used_rows - r < 8 ? used_rows - r : 8;
      if (pitch < columns) {
        // Rows that are short and follow one another in the draws: all eight at once.
        const int64_t first = index + r * pitch, start = first % 8;
        fill(first, (eight - 1) * pitch + used_columns, draw);
        for (int64_t i = 0; i < eight; ++i) compare(i, halves_ + start + i * pitch, used_columns, below);
      } else {
        for (int64_t i = 0; i < eight; ++i) {
          const int64_t first = index + (r + i) * pitch;
          fill(first, used_columns, draw);
          compare(i, halves_ + first % 8, used_columns, below);
        }
      }
      for (int64_t c = 0; c < used_columns; c += 8) turn(r, c);
    }
  }

  const uint8_t* column(int64_t c) const { return keep_[c]; }

 private:
  void fill(int64_t first, int64_t count, const MaskDraw& draw) {
    fill_halves(halves_, static_cast<uint64_t>(first) / 8, (first % 8 + count + kDrawChunk - 1) / kDrawChunk, draw);
  }

  void compare(int64_t i, const int16_t* halves, int64_t count, int16_t below) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) eight_[i][c] = halves[c] < below;
  }

  void turn(int64_t r, int64_t c) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t b[8];
    for (int i = 0; i < 8; ++i) std::memcpy(&b[i], &eight_[i][c], sizeof b[i]);
    turn_bytes(b);
    for (int i = 0; i < 8; ++i) std::memcpy(&keep_[c + i][r], &b[i], sizeof b[i]);
#else
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) keep_[c + i][r + j] = eight_[j][c + i];
    }
#endif
  }

  static_assert(rows % 8 == 0 && columns % 8 == 0, "a tile is turned in squares of eight");
  alignas(64) int16_t halves_[8 * columns + kDrawChunk + 8];
  uint8_t eight_[8][columns] = {};
  uint8_t keep_[columns][rows];
};

// Tiles first .. first + count of a walk that is tiled.
template <class T>
void drop_tiles(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw,
                T factor) {
  const int row_axis = walk.axes - 1, column_axis = walk.axes - 2;
  const int64_t all_rows = walk.extent[row_axis], all_columns = walk.extent[column_axis];
  const int64_t pitch = walk.stride[ElementWalk::mask][row_axis];
  TileMask tile;
  for (int64_t i = first; i < first + count; ++i) {
    int64_t rest = i;
    const int64_t row = rest % row_tiles(walk) * TileMask::rows;
    rest /= row_tiles(walk);
    const int64_t column = rest % column_tiles(walk) * TileMask::columns;
    rest /= column_tiles(walk);
    int64_t at[ElementWalk::operands];
    for (int k = 0; k < ElementWalk::operands; ++k) {
      at[k] = row * walk.stride[k][row_axis] + column * walk.stride[k][column_axis];
    }
    for (int axis = column_axis - 1; axis >= 0; --axis) {
      for (int k = 0; k < ElementWalk::operands; ++k) at[k] += rest % walk.extent[axis] * walk.stride[k][axis];
      rest /= walk.extent[axis];
    }
    const int64_t rows = all_rows - row < TileMask::rows ? all_rows - row : TileMask::rows;
    const int64_t columns = all_columns - column < TileMask::columns ? all_columns - column : TileMask::columns;
    tile.make(at[ElementWalk::mask], pitch, rows, columns, draw);
    for (int64_t c = 0; c < columns; ++c) {
      const uint8_t* keep = tile.column(c);
      map_run<T>(y + at[ElementWalk::result] + c * walk.stride[ElementWalk::result][column_axis],
                 x + at[ElementWalk::input] + c * walk.stride[ElementWalk::input][column_axis],
                 walk.stride[ElementWalk::result][row_axis], walk.stride[ElementWalk::input][row_axis], rows,
                 [=](T value, int64_t r) { return kept(keep[r] != 0, value * factor); });
    }
  }
}

}  // namespace
}  // namespace fastnorm
