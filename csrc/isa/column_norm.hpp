// Family::column: neighbouring values belong to neighbouring sets (batch norm on (N, C), batch and instance norm with
// channels last). A tile of columns is worked on row by row, with one accumulator per column; blocks of kColumnRows
// rows are merged by Chan's formula into chunks, chunks in order into the set.
//
//   x, y, dy, dx: (sets, rows, columns) with any strides;  statistics: (sets * columns);  weight, bias: (params)
#pragma once

#include "isa/channel_norm.hpp"

namespace fastnorm {
namespace {

constexpr int kStrip = 16;                  // columns whose accumulators are in registers together
constexpr int64_t kRowGroup = 8;            // rows summed without recursion
constexpr int64_t kRowChunk = 8192;         // rows whose blocks are merged before chunks are
constexpr int64_t kFusedBytes = 256 << 10;  // a tile up to this size is still in cache when it is read again

struct Tile {
  int64_t set, column, width;  // columns [column, column + width) of a set
};

inline int64_t tiles_per_set(const Plan& plan) { return (plan.columns + kColumnTile - 1) / kColumnTile; }
inline int64_t row_chunks(const Plan& plan) { return (plan.elements + kRowChunk - 1) / kRowChunk; }
inline Tile tile_at(const Plan& plan, int64_t index) {
  const int64_t column = index % tiles_per_set(plan) * kColumnTile;
  const int64_t left = plan.columns - column;
  return {index / tiles_per_set(plan), column, left < kColumnTile ? left : kColumnTile};
}
inline int64_t stat_of(const Plan& plan, const Tile& tile, int64_t c) {
  return plan.set_stat.offset(tile.set) + (tile.column + c) * plan.column_stat;
}
inline int64_t param_of(const Plan& plan, const Tile& tile, int64_t c) {
  return plan.set_param.offset(tile.set) + (tile.column + c) * plan.column_param;
}

// Rows [first, first + rows) of a tile of one operand: pointers into the array where columns are contiguous, else
// copies.
template <class T>
class Rows {
 public:
  Rows(const Operand& operand, const Tile& tile, int64_t first, int64_t rows)
      : rows_(rows),
        width_(tile.width),
        stride_(operand.column_stride),
        direct_(operand.aligned && (operand.column_stride == static_cast<int64_t>(sizeof(T)) || tile.width == 1)) {
    char* base = operand.data + operand.set.offset(tile.set) + tile.column * operand.column_stride;
    for_pieces(base, operand.element, first, rows, [this](char* from, int64_t stride, int64_t start, int64_t count) {
      for (int64_t i = 0; i < count; ++i) home_[start + i] = from + i * stride;
    });
  }
  void load() {
    if (direct_) return;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) std::memcpy(buffer_[r] + c, home_[r] + c * stride_, sizeof(T));
    }
  }
  void store() const {
    if (direct_) return;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) std::memcpy(home_[r] + c * stride_, buffer_[r] + c, sizeof(T));
    }
  }
  T* operator[](int64_t r) { return direct_ ? reinterpret_cast<T*>(home_[r]) : buffer_[r]; }

 private:
  int64_t rows_, width_, stride_;
  bool direct_;
  char* home_[kColumnRows];
  alignas(64) T buffer_[kColumnRows][kColumnTile];
};

// lanes[lane] = sum over rows [first, first + rows) of row(r)(column + lane), for `count` lanes. The lanes here are
// columns, and rows are added in a tree, for the reason given in lane_sum.hpp.
template <class Lanes, class Row>
inline void strip_sums(int64_t first, int64_t rows, int64_t column, int count, Lanes& lanes, const Row& row) {
  if (rows <= kRowGroup) {
    for (int lane = 0; lane < kStrip; ++lane) lanes.clear(lane);
    int64_t r = first;
    for (; r + 2 <= first + rows; r += 2) {
      const auto a = row(r), b = row(r + 1);
#pragma omp simd
      for (int lane = 0; lane < count; ++lane) lanes.add_pair(lane, a(column + lane), b(column + lane));
    }
    if (r < first + rows) {
      const auto a = row(r);
#pragma omp simd
      for (int lane = 0; lane < count; ++lane) lanes.add(lane, a(column + lane));
    }
    return;
  }
  const int64_t half = (rows / 2 + kRowGroup - 1) / kRowGroup * kRowGroup;
  Lanes right;
  strip_sums(first, half, column, count, lanes, row);
  strip_sums(first + half, rows - half, column, count, right, row);
#pragma omp simd
  for (int lane = 0; lane < kStrip; ++lane) lanes.add(lane, right, lane);
}

// sums[c] = sum over rows of row(r)(c), columns independent of each other.
template <class Lanes, class Row>
inline void column_sums(int64_t rows, int64_t width, typename Lanes::Term* sums, const Row& row) {
  for (int64_t c = 0; c < width; c += kStrip) {
    Lanes lanes;
    int count = kStrip;
    if (c + kStrip <= width) {
      strip_sums(0, rows, c, kStrip, lanes, row);
    } else {
      count = static_cast<int>(width - c);
      strip_sums(0, rows, c, count, lanes, row);
    }
    for (int lane = 0; lane < count; ++lane) sums[c + lane] = lanes.get(lane);
  }
}

// Statistics and parameters of a tile's columns, one array each so that loops over columns vectorise.
template <class T>
struct TileStatistics {
  double mean[kColumnTile], mean_lo[kColumnTile], rstd[kColumnTile], scale[kColumnTile];

  void set(int64_t c, const Statistic& s) {
    mean[c] = s.mean;
    mean_lo[c] = s.mean_lo;
    rstd[c] = s.rstd;
    scale[c] = s.scale;
  }
  double xhat(T x, int64_t c) const {
    if (kMayOverflow<T>) return ((static_cast<double>(x) * scale[c] - mean[c]) - mean_lo[c]) * rstd[c];
    return (static_cast<double>(x) - mean[c]) * rstd[c];
  }
  T gradient(double dxhat, int64_t c) const {
    if (kMayOverflow<T>) return static_cast<T>(rstd[c] * dxhat * scale[c]);
    return static_cast<T>(rstd[c] * dxhat);
  }
};

template <class T>
inline void load_params(const Plan& plan, const Tile& tile, const T* params, double otherwise, double* to) {
  for (int64_t c = 0; c < tile.width; ++c) {
    to[c] = params ? static_cast<double>(params[param_of(plan, tile, c)]) : otherwise;
  }
}

// visit(first, rows) for the row blocks of one chunk.
template <class Visit>
inline void for_chunk_rows(const Plan& plan, int64_t chunk, const Visit& visit) {
  const int64_t end = (chunk + 1) * kRowChunk < plan.elements ? (chunk + 1) * kRowChunk : plan.elements;
  for (int64_t first = chunk * kRowChunk; first < end; first += kColumnRows) {
    visit(first, end - first < kColumnRows ? end - first : kColumnRows);
  }
}

// Moments of a tile's columns over a block of rows.
template <class T>
inline void block_column_moments(const Plan& plan, const Tile& tile, int64_t first, int64_t rows, Moments* moments) {
  const double count = static_cast<double>(rows);
  Rows<T> x(plan.x, tile, first, rows);
  x.load();
  double pivot[kColumnTile];
  Pair sums[kColumnTile];
  column_sums<One<kStrip>>(rows, tile.width, pivot, [&](int64_t r) {
    return [from = x[r]](int64_t c) { return static_cast<double>(from[c]); };
  });
  for (int64_t c = 0; c < tile.width; ++c) pivot[c] /= count;
  column_sums<Two<kStrip>>(rows, tile.width, sums, [&](int64_t r) {
    return [from = x[r], about = &pivot[0]](int64_t c) {
      const double d = static_cast<double>(from[c]) - about[c];
      return Pair{d, d * d};
    };
  });
  for (int64_t c = 0; c < tile.width; ++c) moments[c] = moments_about(pivot[c], count, sums[c].first, sums[c].second);
}

// left[c] = left[c] and right[c] merged, for all columns of a tile.
template <class T>
inline void merge_columns(Moments* left, const Moments* right) {
  for (int64_t c = 0; c < kColumnTile; ++c) left[c].template merge<kMayOverflow<T>>(right[c]);
}

// Moments of a tile's columns over rows [first, end), blocks merged in a tree (set_moments.hpp says why).
template <class T>
inline void tile_moments(const Plan& plan, const Tile& tile, int64_t first, int64_t end, Moments* moments) {
  const int64_t blocks = (end - first + kColumnRows - 1) / kColumnRows;
  if (blocks == 1) {
    block_column_moments<T>(plan, tile, first, end - first, moments);
    return;
  }
  const int64_t middle = first + blocks / 2 * kColumnRows;
  Moments right[kColumnTile];
  tile_moments<T>(plan, tile, first, middle, moments);
  tile_moments<T>(plan, tile, middle, end, right);
  merge_columns<T>(moments, right);
}

template <class T>
inline void chunk_column_moments(const Plan& plan, const Tile& tile, int64_t chunk, Moments* moments) {
  const int64_t first = chunk * kRowChunk;
  tile_moments<T>(plan, tile, first, first + kRowChunk < plan.elements ? first + kRowChunk : plan.elements, moments);
}

// The same tree over chunks that threads have measured: the first of [first, end) gets the result.
template <class T>
inline void merge_chunks(Moments* chunks, int64_t first, int64_t end) {
  if (end - first == 1) return;
  const int64_t middle = first + (end - first) / 2;
  merge_chunks<T>(chunks, first, middle);
  merge_chunks<T>(chunks, middle, end);
  merge_columns<T>(chunks + first * kColumnTile, chunks + middle * kColumnTile);
}

template <class T>
inline void tile_sums(const Plan& plan, const Tile& tile, int64_t chunk, const TileStatistics<T>& s,
                      SegmentSums* totals) {
  for_chunk_rows(plan, chunk, [&](int64_t first, int64_t rows) {
    Rows<T> x(plan.x, tile, first, rows), dy(plan.dy, tile, first, rows);
    x.load();
    dy.load();
    Pair sums[kColumnTile];
    column_sums<Two<kStrip>>(rows, tile.width, sums, [&](int64_t r) {
      return [values = x[r], gradient = dy[r], statistics = &s](int64_t c) {
        const double g = static_cast<double>(gradient[c]);
        return Pair{g, g * statistics->xhat(values[c], c)};
      };
    });
    for (int64_t c = 0; c < tile.width; ++c) {
      totals[c].dy.add(sums[c].first);
      totals[c].dy_xhat.add(sums[c].second);
    }
  });
}

template <class T>
inline void tile_normalise(const Plan& plan, const NormArgs<T>& args, const Tile& tile, int64_t chunk,
                           const TileStatistics<T>& s) {
  double weight[kColumnTile], bias[kColumnTile];
  load_params(plan, tile, args.weight, 1, weight);
  load_params(plan, tile, args.bias, 0, bias);
  for_chunk_rows(plan, chunk, [&](int64_t first, int64_t rows) {
    Rows<T> x(plan.x, tile, first, rows), y(plan.y, tile, first, rows);
    x.load();
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x[r];
      T* to = y[r];
#pragma omp simd
      for (int64_t c = 0; c < tile.width; ++c) to[c] = static_cast<T>(s.xhat(from[c], c) * weight[c] + bias[c]);
    }
    y.store();
  });
}

// a and b are the means of dy and dy * xhat over the set, before the weight: it is the same for the whole column.
template <class T>
inline void tile_gradient(const Plan& plan, const NormArgs<T>& args, const Tile& tile, int64_t chunk,
                          const TileStatistics<T>& s, const double* a, const double* b) {
  double weight[kColumnTile];
  load_params(plan, tile, args.weight, 1, weight);
  for_chunk_rows(plan, chunk, [&](int64_t first, int64_t rows) {
    Rows<T> x(plan.x, tile, first, rows), dy(plan.dy, tile, first, rows), dx(plan.dx, tile, first, rows);
    x.load();
    dy.load();
    for (int64_t r = 0; r < rows; ++r) {
      const T *values = x[r], *g = dy[r];
      T* to = dx[r];
      if (args.constant_stats) {
#pragma omp simd
        for (int64_t c = 0; c < tile.width; ++c) to[c] = s.gradient(static_cast<double>(g[c]) * weight[c], c);
      } else {
#pragma omp simd
        for (int64_t c = 0; c < tile.width; ++c) {
          const double mine = static_cast<double>(g[c]) * weight[c];
          to[c] = s.gradient((mine - weight[c] * a[c]) - s.xhat(values[c], c) * (weight[c] * b[c]), c);
        }
      }
    }
    dx.store();
  });
}

// One column as a set of its own, for the rare second measurements.
inline Plan single_column(const Plan& plan, const Tile& tile, int64_t c) {
  Plan single = plan;
  single.x.data += (tile.column + c) * plan.x.column_stride;
  return single;
}

template <class T>
inline Statistic column_statistic(const Plan& plan, const NormArgs<T>& args, const Tile& tile, int64_t c,
                                  Moments& moments) {
  if (!needs_scale<T>(moments, args.eps)) return statistic_of(moments, args.eps, 1);
  return set_statistic(single_column(plan, tile, c), tile.set, args, moments);
}

// Does a tile stay with one thread from its sums to its results?
inline bool fuse_tiles(const Plan& plan, int64_t itemsize) {
  const int64_t width = plan.columns < kColumnTile ? plan.columns : kColumnTile;
  if (row_chunks(plan) > 1 || plan.elements * width * itemsize > kFusedBytes) return false;
  return plan.threads == 1 || plan.sets * tiles_per_set(plan) >= 2 * plan.threads;
}

// Moments of all columns; finish(tile, moments) runs once per tile, in parallel.
template <class T, class Finish>
inline bool for_column_moments(const Plan& plan, const Finish& finish) {
  const int64_t tiles = plan.sets * tiles_per_set(plan), chunks = row_chunks(plan);
  if (chunks == 1) {
    parallel_for(plan.threads, tiles, [&](int64_t i) {
      Moments moments[kColumnTile];
      chunk_column_moments<T>(plan, tile_at(plan, i), 0, moments);
      finish(i, moments);
    });
    return true;
  }
  const Workspace<Moments> partial(tiles * chunks * kColumnTile);
  if (!partial) return false;
  parallel_for(plan.threads, tiles * chunks, [&](int64_t i) {
    chunk_column_moments<T>(plan, tile_at(plan, i / chunks), i % chunks, &partial[i * kColumnTile]);
  });
  parallel_for(plan.threads, tiles, [&](int64_t i) {
    Moments* first = &partial[i * chunks * kColumnTile];
    merge_chunks<T>(first, 0, chunks);
    finish(i, first);
  });
  return true;
}

template <class T>
bool column_moments(const Plan& plan, const NormArgs<T>& args) {
  return for_column_moments<T>(plan, [&](int64_t i, Moments* moments) {
    const Tile tile = tile_at(plan, i);
    for (int64_t c = 0; c < tile.width; ++c) {
      const Statistic s = column_statistic(plan, args, tile, c, moments[c]);
      store_statistic(args, stat_of(plan, tile, c), moments[c], s);
      args.var[stat_of(plan, tile, c)] *= moments[c].count;
    }
  });
}

template <class T>
bool column_forward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t tiles = plan.sets * tiles_per_set(plan), chunks = row_chunks(plan);
  const bool fuse = fuse_tiles(plan, sizeof(T));
  const Workspace<TileStatistics<T>> statistics(fuse ? 0 : tiles);
  if (!statistics) return false;
  const bool done = for_column_moments<T>(plan, [&](int64_t i, Moments* moments) {
    const Tile tile = tile_at(plan, i);
    TileStatistics<T> own;
    TileStatistics<T>& s = fuse ? own : statistics[i];
    for (int64_t c = 0; c < tile.width; ++c) {
      const Statistic column = column_statistic(plan, args, tile, c, moments[c]);
      store_statistic(args, stat_of(plan, tile, c), moments[c], column);
      s.set(c, column);
    }
    if (fuse) tile_normalise(plan, args, tile, 0, s);
  });
  if (done && !fuse) {
    parallel_for(plan.threads, tiles * chunks, [&](int64_t i) {
      tile_normalise(plan, args, tile_at(plan, i / chunks), i % chunks, statistics[i / chunks]);
    });
  }
  return done;
}

template <class T>
inline TileStatistics<T> given_tile_statistics(const Plan& plan, const NormArgs<T>& args, const Tile& tile) {
  TileStatistics<T> s;
  for (int64_t c = 0; c < tile.width; ++c) {
    const int64_t stat = stat_of(plan, tile, c);
    if (args.constant_stats || !lost<T>(args.rstd[stat])) {
      s.set(c, given_statistic(args, stat));
    } else {
      const Plan single = single_column(plan, tile, c);
      Moments moments = set_moments<T>(single, tile.set, true, 1);
      s.set(c, set_statistic(single, tile.set, args, moments));
    }
  }
  return s;
}

template <class T>
bool column_apply(const Plan& plan, const NormArgs<T>& args) {
  const int64_t chunks = row_chunks(plan);
  parallel_for(plan.threads, plan.sets * tiles_per_set(plan) * chunks, [&](int64_t i) {
    const Tile tile = tile_at(plan, i / chunks);
    tile_normalise(plan, args, tile, i % chunks, given_tile_statistics(plan, args, tile));
  });
  return true;
}

template <class T>
bool column_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t tiles = plan.sets * tiles_per_set(plan), chunks = row_chunks(plan);
  const bool fuse = fuse_tiles(plan, sizeof(T));
  const Workspace<SegmentSums> partial(tiles * chunks * kColumnTile);
  if (!partial) return false;
  const auto gradient = [&](int64_t i, int64_t chunk, const TileStatistics<T>& s) {
    double a[kColumnTile], b[kColumnTile];
    const double count = static_cast<double>(plan.elements);
    for (int64_t c = 0; c < kColumnTile; ++c) {
      a[c] = partial[i * chunks * kColumnTile + c].dy.value() / count;
      b[c] = partial[i * chunks * kColumnTile + c].dy_xhat.value() / count;
    }
    tile_gradient(plan, args, tile_at(plan, i), chunk, s, a, b);
  };
  parallel_for(plan.threads, tiles * chunks, [&](int64_t i) {
    const Tile tile = tile_at(plan, i / chunks);
    const TileStatistics<T> s = given_tile_statistics(plan, args, tile);
    tile_sums(plan, tile, i % chunks, s, &partial[i * kColumnTile]);
    if (fuse) gradient(i, 0, s);
  });
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t c = 0; c < kColumnTile; ++c) {
        partial[i * chunks * kColumnTile + c].add(partial[(i * chunks + chunk) * kColumnTile + c]);
      }
    }
  }
  if (!fuse) {
    parallel_for(plan.threads, tiles * chunks, [&](int64_t i) {
      gradient(i / chunks, i % chunks, given_tile_statistics(plan, args, tile_at(plan, i / chunks)));
    });
  }
  const auto tile_of = [&](int64_t i) {
    return i / plan.columns * tiles_per_set(plan) + i % plan.columns / kColumnTile;
  };
  const auto column_of = [&](int64_t i) { return i % plan.columns % kColumnTile; };
  return reduce_parameter_gradients(
      plan, args, plan.all_sets(), [&](int64_t i) { return partial[tile_of(i) * chunks * kColumnTile + column_of(i)]; },
      [&](int64_t i) { return param_of(plan, tile_at(plan, tile_of(i)), column_of(i)); });
}

}  // namespace
}  // namespace fastnorm
