// What the parts of dropout's bindings share: the work itself (dropout.cpp) and the entries that recognise the
// common call (dropout_entries.cpp, dropout_add_norm.cpp).
#pragma once

#include "arrays.hpp"
#include "dropout_kernels.hpp"
#include "interpreter.hpp"

namespace fastnorm {

constexpr uint64_t kKeepAll = uint64_t{1} << 32;

// Axes that share one draw.
class SharedAxes {
 public:
  void add(int axis) { bits_ |= uint64_t{1} << axis; }
  bool has(int axis) const { return (bits_ >> axis & 1) != 0; }

 private:
  static_assert(kMaxRank <= 64, "an axis is a bit");
  uint64_t bits_ = 0;
};

// The nearest integer to (1 - p) * 2^32, for p in [0, 1].
uint64_t keep_threshold(double p);

// 2^32 / threshold rounded once to T.
template <class T>
T keep_scale(uint64_t threshold);

// y = keep ? x * factor : 0 for two arrays of one shape and dtype, float32 or float64. `reused`: y is an array of the
// caller's, not a new one.
void run_dropout(const Array& y, const Array& x, const MaskDraw& draw, const SharedAxes& shared, bool inverted,
                 bool reused);

// What the entries accept as p (a number in [0, 1]), as a word of 64 bits, and as rng (a seed or a stream).
bool accepts_probability(py::handle object, double* p);
bool as_word(py::handle object, uint64_t* value);
bool accepts_rng(py::handle rng);

// The draws of this call; a stream moves on. To be called when nothing else can fail.
PhiloxStream take(py::handle rng);

void bind_dropout_entries(py::module_& m);
void bind_dropout_add_norm(py::module_& m);

}  // namespace fastnorm
