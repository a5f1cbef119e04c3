// Dropout and noise for Python: turns arrays into walks, cuts the work into fixed blocks and releases the GIL for large
// ones. Checks what memory safety needs (dtypes, shapes, writeable results, axes); messages for users are
// fastnorm/_check.py's. Results are filled, never allocated here, so that nothing can fail once a stream's offset has
// been taken.
#include <cmath>

#include "arrays.hpp"
#include "caches.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

using Extents = std::vector<int64_t>;

constexpr int64_t kLeastBlock = 16384, kMostBlock = 1 << 20;  // multiples of every chunk of draws
constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kNoiseWeight = 4;  // a normal variate costs about as much as this many draws of a mask
constexpr double kTwo32 = 4294967296.0;
constexpr uint64_t kKeepAll = uint64_t{1} << 32;

uint64_t keep_threshold(double p) {
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error("p must lie in [0, 1]");
  return static_cast<uint64_t>(std::nearbyint((1.0 - p) * kTwo32));
}

// 2^32 / threshold rounded once to T. Rounding to double and then to float would round twice: the inexact double is
// moved to the neighbour with an odd last bit (round to odd), which the second rounding cannot mistake for a tie.
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

// Strides of the draws: C order over the axes that are not shared, 0 along those that are.
Extents draw_strides(const Extents& shape, const Extents& shared_axes) {
  Extents strides(shape.size(), 1);
  for (const int64_t axis : shared_axes) {
    if (axis < 0 || axis >= static_cast<int64_t>(shape.size())) throw py::value_error("shared_axes out of range");
    strides[axis] = 0;
  }
  // Without elements no stride is ever used, and the extents of the other axes may be absurd.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return Extents(shape.size(), 0);
  int64_t next = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    if (strides[axis] == 0) continue;
    strides[axis] = next;
    next *= shape[axis];
  }
  return strides;
}

Extents shape_of(const py::array& a) { return Extents(a.shape(), a.shape() + a.ndim()); }

void require_same_shape(const py::array& a, const py::array& b) {
  if (shape_of(a) != shape_of(b)) throw py::value_error("arrays of different shapes");
}

void require_result(const py::array& y, const py::array& x) {
  if (!y.writeable()) throw py::value_error("the result is read-only");
  require_same_shape(y, x);
}

ElementWalk walk_of(const py::array& y, const py::array& x, const Extents& mask_strides,
                    const std::vector<int>& order) {
  ElementWalk walk;
  for (const int axis : order) walk.append(x.shape(axis), y.strides(axis), x.strides(axis), mask_strides[axis]);
  return walk;
}

std::vector<int> c_order(const py::array& x) {
  std::vector<int> order(static_cast<size_t>(x.ndim()));
  for (size_t axis = 0; axis < order.size(); ++axis) order[axis] = static_cast<int>(axis);
  return order;
}

// The axes as they lie in the result's memory, the innermost last.
std::vector<int> memory_order(const py::array& y) {
  std::vector<int> order = c_order(y);
  if (y.flags() & py::array::c_style) return order;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return std::llabs(y.strides(a)) > std::llabs(y.strides(b)); });
  return order;
}

constexpr int64_t kShortRow = 8;  // rows of fewer elements are not worth a tile

// A walk along memory, where the draws can follow it: in rows of draws, of one draw each, or in tiles.
ElementWalk walk_of_draws(const py::array& y, const py::array& x, const Extents& draws) {
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

char* result_data(const py::array& y) { return static_cast<char*>(const_cast<void*>(y.data())); }
const char* input_data(const py::array& x) { return static_cast<const char*>(x.data()); }

template <class T>
bool holds(const py::array& a) {
  return py::isinstance<py::array_t<T>>(a);
}

// f(T()) for the element type that y and x share.
template <class Function>
void for_dtype(const py::array& y, const py::array& x, const Function& f) {
  if (holds<float>(x) && holds<float>(y)) return f(float());
  if (holds<double>(x) && holds<double>(y)) return f(double());
  throw py::type_error("arrays must be float32 or float64, all of the same dtype");
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

template <class T>
void run_drop(const py::array& y, const py::array& x, const MaskDraw& draw, const Extents& shared_axes, T factor) {
  char* to = result_data(y);
  const char* from = input_data(x);
  const DropoutKernels<T>& kernels = dropout_kernels<T>();
  if (draw.threshold == 0 || draw.threshold == kKeepAll) {
    const ElementWalk walk = walk_of(y, x, Extents(static_cast<size_t>(x.ndim()), 0), memory_order(y));
    run_blocks(x.size(), 1,
               [&](int64_t first, int64_t count) { kernels.drop(to, from, walk, first, count, draw, factor, false); });
    return;
  }
  const ElementWalk walk = walk_of_draws(y, x, draw_strides(shape_of(x), shared_axes));
  if (is_tiled(walk)) {
    if (x.size() == 0) return;
    const ReleaseForLargeWork unlocked(x.size());
    parallel_for(threads_for(x.size()), tiles_of(walk),
                 [&](int64_t i) { kernels.drop_tiles(to, from, walk, i, 1, draw, factor); });
    return;
  }
  // In place, x has brought the lines to the caches.
  const bool past_caches = to != from && 2 * x.nbytes() > last_level_cache() / 2;
  run_blocks(x.size(), 1, [&](int64_t first, int64_t count) {
    kernels.drop(to, from, walk, first, count, draw, factor, past_caches);
  });
}

void drop(const py::array& y, const py::array& x, double p, uint64_t seed, uint64_t offset, const Extents& shared_axes,
          bool inverted) {
  require_result(y, x);
  const MaskDraw draw{{seed, offset}, keep_threshold(p)};
  for_dtype(y, x, [&](auto zero) {
    using T = decltype(zero);
    run_drop<T>(y, x, draw, shared_axes, inverted ? keep_scale<T>(draw.threshold) : T(1));
  });
}

// Every element times 1 - p; p = 1 selects zeros.
void weight_scaling(const py::array& y, const py::array& x, double p) {
  require_result(y, x);
  keep_threshold(p);
  const MaskDraw draw{{0, 0}, p == 1.0 ? 0 : kKeepAll};
  for_dtype(y, x, [&](auto zero) {
    using T = decltype(zero);
    run_drop<T>(y, x, draw, {}, static_cast<T>(1.0 - p));
  });
}

void apply_mask(const py::array& y, const py::array& x, const py::array_t<bool>& keep, double p) {
  require_result(y, x);
  require_same_shape(keep, x);
  const uint64_t threshold = keep_threshold(p);
  const ElementWalk walk = walk_of(y, x, Extents(keep.strides(), keep.strides() + keep.ndim()), memory_order(y));
  char* to = result_data(y);
  const char* from = input_data(x);
  const char* mask = input_data(keep);
  for_dtype(y, x, [&](auto zero) {
    using T = decltype(zero);
    if (threshold == 0) return run_drop<T>(y, x, MaskDraw{{0, 0}, 0}, {}, T(0));
    const T factor = keep_scale<T>(threshold);
    const auto kernel = dropout_kernels<T>().apply_mask;
    run_blocks(x.size(), 1, [&](int64_t first, int64_t count) { kernel(to, from, mask, walk, first, count, factor); });
  });
}

void gaussian_noise(const py::array& y, const py::array& x, double std, uint64_t seed, uint64_t offset) {
  require_result(y, x);
  const PhiloxStream stream{seed, offset};
  const ElementWalk walk = walk_of(y, x, draw_strides(shape_of(x), {}), c_order(x));
  char* to = result_data(y);
  const char* from = input_data(x);
  for_dtype(y, x, [&](auto zero) {
    const auto kernel = dropout_kernels<decltype(zero)>().gaussian_noise;
    run_blocks(x.size(), kNoiseWeight,
               [&](int64_t first, int64_t count) { kernel(to, from, walk, first, count, stream, std); });
  });
}

// Elements start .. start + len(keep) of the flattened mask of an array of `shape`.
void keep_mask(const py::array_t<bool>& keep, const Extents& shape, int64_t start, double p, uint64_t seed,
               uint64_t offset, const Extents& shared_axes) {
  if (!keep.writeable() || keep.ndim() != 1 || (keep.size() > 1 && keep.strides(0) != 1)) {
    throw py::value_error("the mask must be one-dimensional, contiguous and writeable");
  }
  if (shape.size() > static_cast<size_t>(kMaxAxes)) throw py::value_error("too many axes");
  int64_t total = 1;
  for (const int64_t n : shape) {
    if (n < 0 || (n > 0 && total > INT64_MAX / n)) throw py::value_error("shape out of range");
    total *= n;
  }
  if (start < 0 || start > total || keep.size() > total - start) throw py::value_error("range outside the mask");
  const Extents strides = draw_strides(shape, shared_axes);
  ElementWalk walk;
  for (size_t axis = 0; axis < shape.size(); ++axis) walk.append(shape[axis], 0, 0, strides[axis]);
  const MaskDraw draw{{seed, offset}, keep_threshold(p)};
  auto* to = reinterpret_cast<uint8_t*>(result_data(keep));
  const auto kernel = dropout_kernels<float>().keep_mask;
  run_blocks(keep.size(), 1,
             [&](int64_t first, int64_t count) { kernel(to + first, walk, start + first, count, draw); });
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

void bind_dropout(py::module_& m) {
  using namespace py::literals;
  m.def("drop", &drop, "y"_a.noconvert(), "x"_a.noconvert(), "p"_a, "seed"_a, "offset"_a, "shared_axes"_a, "inverted"_a,
        "y = keep ? x * factor : 0, the mask drawn from (seed, offset).");
  m.def("weight_scaling", &weight_scaling, "y"_a.noconvert(), "x"_a.noconvert(), "p"_a, "y = x * (1 - p).");
  m.def("apply_mask", &apply_mask, "y"_a.noconvert(), "x"_a.noconvert(), "keep"_a.noconvert(), "p"_a,
        "y = keep ? x * factor : 0, the mask given.");
  m.def("gaussian_noise", &gaussian_noise, "y"_a.noconvert(), "x"_a.noconvert(), "std"_a, "seed"_a, "offset"_a,
        "y = x + std * z, z normal and drawn from (seed, offset).");
  m.def("keep_mask", &keep_mask, "keep"_a.noconvert(), "shape"_a, "start"_a, "p"_a, "seed"_a, "offset"_a,
        "shared_axes"_a, "Fills keep with the elements of the flattened mask from start on.");
  m.def("philox4x32", &philox4x32, "counters"_a.noconvert(), "key0"_a, "key1"_a, "rounds"_a = 10,
        "The generator itself: the words of (n, 4) counters under one key.");
}

}  // namespace fastnorm
