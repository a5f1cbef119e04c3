// NumPy arrays as the bindings see them: no conversion, no message, only what can be asked in a few nanoseconds.
// A function that meets anything but the common case returns None, and the Python layer explains or converts.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include "plan.hpp"

namespace fastnorm {

namespace py = pybind11;

enum class Dtype { float32, float64, other };

// A view of an ndarray's fields. Subclasses (masked arrays above all) are left to the Python layer.
class Array {
 public:
  Array() = default;
  explicit Array(py::handle object) : object_(object) {
    is_array_ = Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
    if (!is_array_) return;
    fields_ = py::detail::array_proxy(object.ptr());
    const auto* descr = py::detail::array_descriptor1_proxy(fields_->descr);
    if (descr->byteorder == '=' || descr->byteorder == '|' || descr->byteorder == kNative) {
      if (descr->type_num == py::detail::npy_api::NPY_FLOAT_) dtype_ = Dtype::float32;
      if (descr->type_num == py::detail::npy_api::NPY_DOUBLE_) dtype_ = Dtype::float64;
    }
  }

  bool is_float() const { return is_array_ && dtype_ != Dtype::other && rank() <= kMaxRank; }
  Dtype dtype() const { return dtype_; }
  int64_t itemsize() const { return dtype_ == Dtype::float32 ? 4 : 8; }
  int rank() const { return fields_->nd; }
  int64_t size(int axis) const { return fields_->dimensions[axis]; }
  int64_t stride(int axis) const { return fields_->strides[axis]; }
  char* data() const { return fields_->data; }
  bool writeable() const { return fields_->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_; }
  bool c_contiguous() const { return fields_->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_; }
  bool f_contiguous() const { return fields_->flags & py::detail::npy_api::NPY_ARRAY_F_CONTIGUOUS_; }
  bool aligned() const { return fields_->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_; }
  py::handle object() const { return object_; }

  int64_t count() const {
    int64_t total = 1;
    for (int axis = 0; axis < rank(); ++axis) total *= size(axis);
    return total;
  }
  bool same_shape(const Array& other) const {
    return rank() == other.rank() &&
           std::equal(fields_->dimensions, fields_->dimensions + rank(), other.fields_->dimensions);
  }
  bool same_view(const Array& other) const {
    return data() == other.data() && same_shape(other) &&
           std::equal(fields_->strides, fields_->strides + rank(), other.fields_->strides);
  }
  // May the two arrays share a byte? Compares the ranges they span.
  bool may_overlap(const Array& other) const {
    const Range mine = range(), theirs = other.range();
    return mine.begin < theirs.end && theirs.begin < mine.end;
  }
  // May two elements of this array share a byte? (NumPy gives an array without elements any strides.)
  bool may_overlap_itself() const {
    if (count() == 0) return false;
    std::pair<int64_t, int64_t> axes[kMaxRank];
    int used = 0;
    for (int axis = 0; axis < rank(); ++axis) {
      if (size(axis) > 1) axes[used++] = {std::llabs(stride(axis)), size(axis)};
    }
    std::sort(axes, axes + used);
    int64_t extent = itemsize();
    for (int i = 0; i < used; ++i) {
      if (axes[i].first < extent) return true;
      extent += axes[i].first * (axes[i].second - 1);
    }
    return false;
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  Range range() const {
    const char *begin = data(), *end = data();
    for (int axis = 0; axis < rank(); ++axis) {
      if (size(axis) == 0) return {begin, begin};
      (stride(axis) < 0 ? begin : end) += stride(axis) * (size(axis) - 1);
    }
    return {begin, end + itemsize()};
  }

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  static constexpr char kNative = '>';
#else
  static constexpr char kNative = '<';
#endif

  py::handle object_;
  const py::detail::PyArray_Proxy* fields_ = nullptr;
  bool is_array_ = false;
  Dtype dtype_ = Dtype::other;
};

inline py::dtype dtype_object(Dtype dtype) {
  return dtype == Dtype::float32 ? py::dtype::of<float>() : py::dtype::of<double>();
}

// A new array of x's shape and dtype whose axes lie in memory in x's order (NumPy's "K" order).
inline py::array new_like(const Array& x) {
  std::vector<py::ssize_t> shape(x.rank());
  for (int axis = 0; axis < x.rank(); ++axis) shape[axis] = x.size(axis);
  if (x.c_contiguous()) return py::array(dtype_object(x.dtype()), std::move(shape));
  std::vector<int> order(x.rank());
  for (int axis = 0; axis < x.rank(); ++axis) order[axis] = x.f_contiguous() ? x.rank() - 1 - axis : axis;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return std::llabs(x.stride(a)) > std::llabs(x.stride(b)); });
  std::vector<py::ssize_t> strides(x.rank());
  py::ssize_t step = x.itemsize();
  for (int i = x.rank() - 1; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<py::ssize_t>(shape[order[i]], 1);
  }
  return py::array(dtype_object(x.dtype()), std::move(shape), std::move(strides));
}

inline void make_read_only(const py::array& array) {
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
}

// A number that needs no conversion with a message: a float or an int, and not a bool.
inline bool as_number(py::handle object, double* value) {
  if (PyFloat_Check(object.ptr())) {
    *value = PyFloat_AS_DOUBLE(object.ptr());
    return true;
  }
  if (!PyLong_CheckExact(object.ptr())) return false;
  *value = PyLong_AsDouble(object.ptr());
  if (*value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

inline bool as_integer(py::handle object, int64_t* value) {
  if (!PyLong_CheckExact(object.ptr())) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  return overflow == 0;
}

// While verification is on, every fast entry declines, so that the Python layer sees the call.
bool verifying();

// Below this a call is over before another thread could take the interpreter lock.
constexpr int64_t kReleaseElements = 32768;

// The interpreter ends a thread that asks for its lock after the end of the program, by unwinding it. There is nothing
// to unwind to here: results belong to an interpreter that is gone. Such a thread stops where it is, and goes with the
// process.
inline void take_lock_back(PyThreadState* state) {
#ifdef __GLIBCXX__
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state);
#endif
}

class ReleaseForLargeWork {
 public:
  explicit ReleaseForLargeWork(int64_t elements)
      : state_(elements >= kReleaseElements ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseForLargeWork() {
    if (state_) take_lock_back(state_);
  }
  ReleaseForLargeWork(const ReleaseForLargeWork&) = delete;
  ReleaseForLargeWork& operator=(const ReleaseForLargeWork&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastnorm
