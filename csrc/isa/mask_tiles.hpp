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

constexpr int64_t kAhead = 8;  // columns

// keep[c][r] of a tile: whether the element at column c and row r is kept.
class TileMask {
 public:
  static constexpr int64_t rows = kTileRows, columns = kTileColumns;

  // Row r has the draws from index + r * pitch on.
  void make(int64_t index, int64_t pitch, const DrawTile& tile, const MaskDraw& draw) {
    const int16_t below = HalfThreshold(draw.threshold).below;
    const int64_t last = index + (tile.rows - 1) * pitch + tile.columns;
    const bool one_reach = (last / 8 + kDrawChunk / 8) >> 32 == index / 8 >> 32;
    MaskDraws draws(draw, static_cast<uint64_t>(index) / 8);
    // Rows that are short and follow one another in the draws are made together, as many as fit.
    const int64_t fitting = 8 * columns / pitch / 8 * 8;
    const int64_t together = fitting < 8 ? 8 : fitting < rows ? fitting : rows;
    const bool in_one = pitch < columns;
    for (int64_t r = 0; r < tile.rows; r += in_one ? together : 8) {
      const int64_t most = in_one ? together : 8, count = tile.rows - r < most ? tile.rows - r : most;
      const int64_t first = index + r * pitch;
      if (in_one) {
        fill(halves_, first, (count - 1) * pitch + tile.columns, draws, draw, one_reach);
        for (int64_t i = 0; i < count; i += 8) {
          for (int64_t j = i; j < i + 8 && j < count; ++j) {
            compare(j - i, halves_ + first % 8 + j * pitch, tile.columns, below);
          }
          turn(r + i, tile.columns);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          fill(halves_ + i * row_size, first + i * pitch, tile.columns, draws, draw, one_reach);
        }
        for (int64_t i = 0; i < count; ++i) {
          compare(i, halves_ + i * row_size + (first + i * pitch) % 8, tile.columns, below);
        }
        turn(r, tile.columns);
      }
    }
  }

  const uint8_t* column(int64_t c) const { return keep_[c]; }

 private:
  [[gnu::always_inline]] void fill(int16_t* to, int64_t first, int64_t count, MaskDraws& draws, const MaskDraw& draw,
                                   bool one_reach) {
    const int64_t chunks = (first % 8 + count + kDrawChunk - 1) / kDrawChunk;
    if (!one_reach) return fill_halves(to, static_cast<uint64_t>(first) / 8, chunks, draw);
    draws.seek(static_cast<uint64_t>(first) / 8);
    for (int64_t i = 0; i < chunks; ++i) draws.next(to + i * kDrawChunk, [](int) {});
  }

  void compare(int64_t i, const int16_t* halves, int64_t count, int16_t below) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) eight_[i][c] = halves[c] < below;
  }

  void turn(int64_t r, int64_t count) {
    for (int64_t c = 0; c < count; c += 8) {
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
  }

  static constexpr int64_t row_size = columns + 8;
  static_assert(rows % 8 == 0 && columns % 8 == 0, "a tile is turned in squares of eight");
  static_assert(row_size % kDrawChunk == 0, "whole chunks hold a row, wherever it starts");
  alignas(64) int16_t halves_[8 * row_size + kDrawChunk];
  uint8_t eight_[8][columns] = {};
  uint8_t keep_[columns][rows];
};

// Tiles first .. first + count of a walk that is tiled.
template <class T>
void drop_tiles(char* y, const char* x, const ElementWalk& walk, int64_t first, int64_t count, const MaskDraw& draw,
                T factor) {
  const int row_axis = walk.axes - 1, column_axis = walk.axes - 2;
  const int64_t* const y_stride = walk.stride[ElementWalk::result];
  const int64_t* const x_stride = walk.stride[ElementWalk::input];
  TileMask mask;
  for_each_tile(walk, first, count, [&](const DrawTile& tile) {
    mask.make(tile.at[ElementWalk::mask], walk.stride[ElementWalk::mask][row_axis], tile, draw);
    char* const to = y + tile.at[ElementWalk::result];
    const char* const from = x + tile.at[ElementWalk::input];
    for (int64_t c = 0; c < tile.columns; ++c) {
      // Columns are far apart: nothing but this asks for the next ones in time.
      for (int64_t r = 0; r < tile.rows; r += static_cast<int64_t>(64 / sizeof(T))) {
        __builtin_prefetch(from + (c + kAhead) * x_stride[column_axis] + r * x_stride[row_axis]);
        __builtin_prefetch(to + (c + kAhead) * y_stride[column_axis] + r * y_stride[row_axis], 1);
      }
      const uint8_t* keep = mask.column(c);
      map_run<T>(to + c * y_stride[column_axis], from + c * x_stride[column_axis], y_stride[row_axis],
                 x_stride[row_axis], tile.rows, [=](T value, int64_t r) { return kept(keep[r] != 0, value * factor); });
    }
  });
}

}  // namespace
}  // namespace fastnorm
