// NumPy arrays as the bindings see them: no conversion, no message, only what can be asked in a few nanoseconds, and
// new arrays made by NumPy itself. An entry that meets anything but the common case returns None, and the Python layer
// explains or converts.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "plan.hpp"

namespace fastnorm {

namespace py = pybind11;

enum class Dtype { float32, float64, other };

// What is asked of NumPy in every call. Looked up while the module is imported: a static variable of a function would
// be made under a lock of C++'s, and its maker, which may give the interpreter's lock away, would then wait for a
// thread that has that one and waits for the first.
struct NumPy {
  const py::detail::npy_api* api = nullptr;
  PyTypeObject* ndarray = nullptr;
  PyObject *float32 = nullptr, *float64 = nullptr;

  void load() {
    api = &py::detail::npy_api::get();
    ndarray = api->PyArray_Type_;
    float32 = py::dtype::of<float>().release().ptr();
    float64 = py::dtype::of<double>().release().ptr();
  }
};

inline NumPy numpy;

// A view of an ndarray's fields. Subclasses (masked arrays above all) are left to the Python layer.
class Array {
 public:
  Array() = default;
  explicit Array(py::handle object) : object_(object) {
    is_array_ = Py_TYPE(object.ptr()) == numpy.ndarray;
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
  const py::ssize_t* shape() const { return fields_->dimensions; }
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
    if (c_contiguous() || f_contiguous() || count() == 0) return false;
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

// A new array in C order, or with the given strides, of undefined values.
inline py::object new_array(Dtype dtype, int rank, const py::ssize_t* shape, const py::ssize_t* strides = nullptr) {
  PyObject* descr = dtype == Dtype::float32 ? numpy.float32 : numpy.float64;
  Py_INCREF(descr);  // taken over by the array
  PyObject* made = numpy.api->PyArray_NewFromDescr_(numpy.ndarray, descr, rank, shape, strides, nullptr, 0, nullptr);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// A new array of x's shape and dtype whose axes lie in memory in x's order (NumPy's "K" order).
inline py::object new_like(const Array& x) {
  if (x.c_contiguous()) return new_array(x.dtype(), x.rank(), x.shape());
  int order[kMaxRank];
  for (int axis = 0; axis < x.rank(); ++axis) order[axis] = x.f_contiguous() ? x.rank() - 1 - axis : axis;
  std::stable_sort(order, order + x.rank(),
                   [&](int a, int b) { return std::llabs(x.stride(a)) > std::llabs(x.stride(b)); });
  py::ssize_t strides[kMaxRank];
  py::ssize_t step = x.itemsize();
  for (int i = x.rank() - 1; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<py::ssize_t>(x.size(order[i]), 1);
  }
  return new_array(x.dtype(), x.rank(), x.shape(), strides);
}

// A read-only view of doubles that `owner` keeps.
inline py::object view_of(const double* values, py::ssize_t count, PyObject* owner) {
  Py_INCREF(numpy.float64);
  const py::ssize_t step = sizeof(double);
  PyObject* made = numpy.api->PyArray_NewFromDescr_(numpy.ndarray, numpy.float64, 1, &count, &step,
                                                    const_cast<double*>(values), 0, nullptr);
  if (made == nullptr) throw py::error_already_set();
  py::object view = py::reinterpret_steal<py::object>(made);
  Py_INCREF(owner);
  if (numpy.api->PyArray_SetBaseObject_(made, owner) != 0) throw py::error_already_set();
  return view;
}

}  // namespace fastnorm
