// Dropout and noise for Python: turns arrays into walks, cuts the work into blocks, releases the GIL for large ones.
// The functions that fill a result check what memory safety needs (dtypes, shapes, writeable results, axes); messages
// for users are fastnorm/_check.py's.
#include "dropout.hpp"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "cpu_features.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

constexpr int64_t kLeastBlock = 16384, kMostBlock = 1 << 20;  // multiples of every chunk of draws
constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kNoiseWeight = 4;  // a normal variate costs about as much as this many draws of a mask
constexpr double kTwo32 = 4294967296.0;

using Strides = std::array<int64_t, kMaxRank>;

// Strides of the draws: C order over the axes that are not shared, 0 along those that are.
void draw_strides(int rank, const py::ssize_t* shape, const SharedAxes& shared, int64_t* strides) {
  int64_t next = 1;
  bool empty = false;
  for (int axis = rank - 1; axis >= 0; --axis) {
    empty = empty || shape[axis] == 0;
    strides[axis] = shared.has(axis) || empty ? 0 : next;
    if (strides[axis] != 0) next *= shape[axis];
  }
  // Without elements no stride is ever used, and the extents of the other axes may be absurd.
  if (empty) std::fill_n(strides, rank, 0);
}

struct AxisOrder {
  int axis[kMaxRank];
};

AxisOrder c_order(const Array& x) {
  AxisOrder order;
  for (int axis = 0; axis < x.rank(); ++axis) order.axis[axis] = axis;
  return order;
}

// The axes as they lie in the result's memory, the innermost last.
AxisOrder memory_order(const Array& y) {
  AxisOrder order = c_order(y);
  if (y.c_contiguous()) return order;
  std::stable_sort(order.axis, order.axis + y.rank(),
                   [&](int a, int b) { return std::llabs(y.stride(a)) > std::llabs(y.stride(b)); });
  return order;
}

ElementWalk walk_of(const Array& y, const Array& x, const int64_t* mask_strides, const AxisOrder& order) {
  ElementWalk walk;
  for (int i = 0; i < x.rank(); ++i) {
    const int axis = order.axis[i];
    walk.append(x.size(axis), y.stride(axis), x.stride(axis), mask_strides[axis]);
  }
  return walk;
}

constexpr int64_t kShortRow = 8;  // rows of fewer elements are not worth a tile

// A walk along memory, where the draws can follow it: in rows of draws, of one draw each, or in tiles.
ElementWalk walk_of_draws(const Array& y, const Array& x, const int64_t* draws) {
  ElementWalk walk = walk_of(y, x, draws, memory_order(y));
  if (!is_tiled(walk)) return walk;
  const int64_t* strides = walk.stride[ElementWalk::mask];
  const int along = static_cast<int>(std::find(strides, strides + walk.axes, 1) - strides);
  if (along == walk.axes || walk.extent[walk.axes - 1] < kShortRow) return walk_of(y, x, draws, c_order(x));
  const auto to_last_but_one = [&](int64_t* values) {
    std::rotate(values + along, values + along + 1, values + walk.axes - 1);
  };
  to_last_but_one(walk.extent);
  for (int64_t* const values : walk.stride) to_last_but_one(values);
  return walk;
}

// body(first, count) over blocks of [0, total), an element being worth `weight` for the choice of threads. Any cut
// gives the same bits, so this one is made for the threads there are.
template <class Body>
void run_blocks(int64_t total, int64_t weight, const Body& body) {
  if (total == 0) return;
  const ReleaseForLargeWork unlocked(total);
  const int threads = threads_for(total < INT64_MAX / weight ? total * weight : total);
  const int64_t share = total / (threads * kBlocksPerThread) / kLeastBlock * kLeastBlock;
  const int64_t block = std::min(std::max(share, kLeastBlock), kMostBlock);
  parallel_for(threads, (total + block - 1) / block, [&](int64_t i) {
    const int64_t first = i * block;
    body(first, std::min(total - first, block));
  });
}

// The same over tiles, taken together where they are small.
template <class Body>
void run_tiles(const ElementWalk& walk, int64_t total, int64_t weight, const Body& body) {
  if (total == 0) return;
  const ReleaseForLargeWork unlocked(total);
  const int64_t tiles = tiles_of(walk), each = total / tiles;
  const int64_t block = std::max<int64_t>(kLeastBlock / std::max<int64_t>(each, 1), 1);
  parallel_for(threads_for(total * weight), (tiles + block - 1) / block,
               [&](int64_t i) { body(i * block, std::min(tiles - i * block, block)); });
}

template <class T>
void run_drop(const Array& y, const Array& x, const MaskDraw& draw, const SharedAxes& shared, T factor, bool reused) {
  const DropoutKernels<T>& kernels = dropout_kernels<T>();
  char* const to = y.data();
  const char* const from = x.data();
  const int64_t total = x.count();
  int64_t strides[kMaxRank];
  if (draw.threshold == 0 || draw.threshold == kKeepAll) {
    std::fill_n(strides, x.rank(), 0);
    const ElementWalk walk = walk_of(y, x, strides, memory_order(y));
    run_blocks(total, 1,
               [&](int64_t first, int64_t count) { kernels.drop(to, from, walk, first, count, draw, factor, {}); });
    return;
  }
  draw_strides(x.rank(), x.shape(), shared, strides);
  const ElementWalk walk = walk_of_draws(y, x, strides);
  if (is_tiled(walk)) {
    return run_tiles(walk, total, 1, [&](int64_t first, int64_t count) {
      kernels.drop_tiles(to, from, walk, first, count, draw, factor);
    });
  }
  const bool far = exceeds_cache(2 * total * x.itemsize());
  const Reach reach{far, far && reused && to != from};  // in place, x has brought the lines to the caches
  run_blocks(total, 1,
             [&](int64_t first, int64_t count) { kernels.drop(to, from, walk, first, count, draw, factor, reach); });
}

uint64_t checked_threshold(double p) {
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error("p must lie in [0, 1]");
  return keep_threshold(p);
}

Array checked_array(py::handle object) {
  const Array array(object);
  if (!array.is_float()) throw py::type_error("arrays must be float32 or float64, all of the same dtype");
  return array;
}

void require_result(const Array& y, const Array& x) {
  if (!y.writeable()) throw py::value_error("the result is read-only");
  if (!y.same_shape(x)) throw py::value_error("arrays of different shapes");
  if (y.dtype() != x.dtype()) throw py::type_error("arrays must be float32 or float64, all of the same dtype");
}

SharedAxes checked_axes(const std::vector<int64_t>& axes, size_t rank) {
  SharedAxes shared;
  for (const int64_t axis : axes) {
    if (axis < 0 || axis >= static_cast<int64_t>(rank)) throw py::value_error("shared_axes out of range");
    shared.add(static_cast<int>(axis));
  }
  return shared;
}

// f(T()) for the element type of x.
template <class Function>
void for_dtype(const Array& x, const Function& f) {
  if (x.dtype() == Dtype::float32) return f(float());
  f(double());
}

void drop(py::handle y_object, py::handle x_object, double p, uint64_t seed, uint64_t offset,
          const std::vector<int64_t>& shared_axes, bool inverted) {
  const Array y = checked_array(y_object), x = checked_array(x_object);
  require_result(y, x);
  const MaskDraw draw{{seed, offset}, checked_threshold(p)};
  run_dropout(y, x, draw, checked_axes(shared_axes, static_cast<size_t>(x.rank())), inverted, false);
}

// Every element times 1 - p; p = 1 selects zeros.
void weight_scaling(py::handle y_object, py::handle x_object, double p) {
  const Array y = checked_array(y_object), x = checked_array(x_object);
  require_result(y, x);
  checked_threshold(p);
  const MaskDraw draw{{0, 0}, p == 1.0 ? 0 : kKeepAll};
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_drop<T>(y, x, draw, {}, static_cast<T>(1.0 - p), false);
  });
}

void apply_mask(py::handle y_object, py::handle x_object, const py::array_t<bool>& keep, double p) {
  const Array y = checked_array(y_object), x = checked_array(x_object);
  require_result(y, x);
  if (keep.ndim() != x.rank() || !std::equal(x.shape(), x.shape() + x.rank(), keep.shape())) {
    throw py::value_error("arrays of different shapes");
  }
  const uint64_t threshold = checked_threshold(p);
  Strides strides;
  std::copy(keep.strides(), keep.strides() + keep.ndim(), strides.begin());
  const ElementWalk walk = walk_of(y, x, strides.data(), memory_order(y));
  char* to = y.data();
  const char* from = x.data();
  const char* mask = reinterpret_cast<const char*>(keep.data());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    if (threshold == 0) return run_drop<T>(y, x, MaskDraw{{0, 0}, 0}, {}, T(0), false);
    const T factor = keep_scale<T>(threshold);
    const auto kernel = dropout_kernels<T>().apply_mask;
    run_blocks(x.count(), 1, [&](int64_t first, int64_t count) { kernel(to, from, mask, walk, first, count, factor); });
  });
}

void gaussian_noise(py::handle y_object, py::handle x_object, double std, uint64_t seed, uint64_t offset) {
  const Array y = checked_array(y_object), x = checked_array(x_object);
  require_result(y, x);
  const PhiloxStream stream{seed, offset};
  int64_t strides[kMaxRank];
  draw_strides(x.rank(), x.shape(), {}, strides);
  const ElementWalk walk = walk_of_draws(y, x, strides);
  char* to = y.data();
  const char* from = x.data();
  for_dtype(x, [&](auto zero) {
    const auto& kernels = dropout_kernels<decltype(zero)>();
    if (is_tiled(walk)) {
      run_tiles(walk, x.count(), kNoiseWeight,
                [&](int64_t first, int64_t count) { kernels.noise_tiles(to, from, walk, first, count, stream, std); });
    } else {
      run_blocks(x.count(), kNoiseWeight, [&](int64_t first, int64_t count) {
        kernels.gaussian_noise(to, from, walk, first, count, stream, std);
      });
    }
  });
}

// `count` elements from `start` on of the flattened mask of an array of `shape`, one byte each or eight in one.
void keep_mask(const py::array& keep, const std::vector<py::ssize_t>& shape, int64_t start, int64_t count, double p,
               uint64_t seed, uint64_t offset, const std::vector<int64_t>& shared_axes, bool packed) {
  if (!keep.writeable() || keep.ndim() != 1 || keep.itemsize() != 1 || (keep.size() > 1 && keep.strides(0) != 1)) {
    throw py::value_error("the mask must be of bytes, one-dimensional, contiguous and writeable");
  }
  if (shape.size() > static_cast<size_t>(kMaxRank)) throw py::value_error("too many axes");
  int64_t total = 1;
  for (const int64_t n : shape) {
    if (n < 0 || (n > 0 && total > INT64_MAX / n)) throw py::value_error("shape out of range");
    total *= n;
  }
  if (start < 0 || start > total || count < 0 || count > total - start) throw py::value_error("range outside the mask");
  if (keep.size() != (packed ? count / 8 + (count % 8 != 0) : count)) throw py::value_error("a mask of another size");
  Strides strides;
  draw_strides(static_cast<int>(shape.size()), shape.data(), checked_axes(shared_axes, shape.size()), strides.data());
  ElementWalk walk;
  for (size_t axis = 0; axis < shape.size(); ++axis) walk.append(shape[axis], 0, 0, strides[axis]);
  const MaskDraw draw{{seed, offset}, checked_threshold(p)};
  auto* const to = static_cast<uint8_t*>(const_cast<void*>(keep.data()));
  const DropoutKernels<float>& kernels = dropout_kernels<float>();
  if (!packed) {
    run_blocks(count, 1,
               [&](int64_t first, int64_t n) { kernels.keep_mask(to + first, walk, start + first, n, draw); });
    return;
  }
  constexpr int64_t kBytes = 4096;
  static_assert(kLeastBlock % kBytes == 0 && kBytes % 8 == 0, "blocks begin with a byte");
  run_blocks(count, 1, [&](int64_t first, int64_t n) {
    uint8_t bytes[kBytes];
    for (int64_t i = first; i < first + n; i += kBytes) {
      const int64_t part = std::min(kBytes, first + n - i);
      kernels.keep_mask(bytes, walk, start + i, part, draw);
      kernels.pack_bits(to + i / 8, bytes, part);
    }
  });
}

py::array_t<uint32_t> philox4x32(const py::array_t<uint32_t, py::array::c_style>& counters, uint32_t key0,
                                 uint32_t key1, int rounds) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) throw py::value_error("counters must have shape (n, 4)");
  if (rounds != 7 && rounds != 10) throw py::value_error("rounds must be 7 or 10");
  py::array_t<uint32_t> words({counters.shape(0), counters.shape(1)});
  const uint32_t key[2] = {key0, key1};
  dropout_kernels<float>().philox4x32(words.mutable_data(), counters.data(), counters.shape(0), key, rounds);
  return words;
}

}  // namespace

uint64_t keep_threshold(double p) { return static_cast<uint64_t>(std::nearbyint((1.0 - p) * kTwo32)); }

// Rounding to double and then to float would round twice: the inexact double is moved to the neighbour with an odd last
// bit (round to odd), which the second rounding cannot mistake for a tie.
template <class T>
T keep_scale(uint64_t threshold) {
  if (threshold == 0) return T(0);
  const double divisor = static_cast<double>(threshold);
  double quotient = kTwo32 / divisor;
  if (sizeof(T) == sizeof(double)) return static_cast<T>(quotient);
  const double error = std::fma(-quotient, divisor, kTwo32);
  if (error < 0.0) quotient = std::nextafter(quotient, 0.0);
  if (error != 0.0) {
    uint64_t bits;
    std::memcpy(&bits, &quotient, sizeof bits);
    bits |= 1;
    std::memcpy(&quotient, &bits, sizeof bits);
  }
  return static_cast<T>(quotient);
}
template float keep_scale<float>(uint64_t);
template double keep_scale<double>(uint64_t);

void run_dropout(const Array& y, const Array& x, const MaskDraw& draw, const SharedAxes& shared, bool inverted,
                 bool reused) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_drop<T>(y, x, draw, shared, inverted ? keep_scale<T>(draw.threshold) : T(1), reused);
  });
}

void bind_dropout(py::module_& m) {
  using namespace py::literals;
  m.def("drop", &drop, "y"_a, "x"_a, "p"_a, "seed"_a, "offset"_a, "shared_axes"_a, "inverted"_a,
        "y = keep ? x * factor : 0, the mask drawn from (seed, offset).");
  m.def("weight_scaling", &weight_scaling, "y"_a, "x"_a, "p"_a, "y = x * (1 - p).");
  m.def("apply_mask", &apply_mask, "y"_a, "x"_a, "keep"_a.noconvert(), "p"_a,
        "y = keep ? x * factor : 0, the mask given.");
  m.def("gaussian_noise", &gaussian_noise, "y"_a, "x"_a, "std"_a, "seed"_a, "offset"_a,
        "y = x + std * z, z normal and drawn from (seed, offset).");
  m.def("keep_mask", &keep_mask, "keep"_a.noconvert(), "shape"_a, "start"_a, "count"_a, "p"_a, "seed"_a, "offset"_a,
        "shared_axes"_a, "packed"_a, "Fills keep with elements of the flattened mask, as bytes or as bits.");
  m.def("philox4x32", &philox4x32, "counters"_a.noconvert(), "key0"_a, "key1"_a, "rounds"_a = 10,
        "The generator itself: the words of (n, 4) counters under one key.");
  bind_dropout_entries(m);
  bind_dropout_add_norm(m);
}

}  // namespace fastnorm
