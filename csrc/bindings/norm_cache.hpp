// What a norm's forward keeps for its backward: references to the call's arrays and the statistics of its sets. Python
// sees it read-only. Its class is written against the C API, since a call makes one and pybind11's instances cost as
// much as a small norm.
#pragma once

#include "spec.hpp"

namespace fastnorm {

// Statistics of a call's sets, all in one bytes object: immutable for Python, and a tenth of an array's cost each.
struct Statistics {
  py::object owner;
  double* mean = nullptr;  // nullptr: the norm has none
  double* mean_lo = nullptr;
  double* var = nullptr;  // biased
  double* rstd = nullptr;
  double* rstd_lo = nullptr;

  // both_parts: mean + mean_lo is the mean to twice the precision of float64, and so is rstd + rstd_lo. Zeros where
  // there will be no kernel to write them.
  void allocate(Kind kind, int64_t sets, bool both_parts, bool want_var, bool zeros);
};

struct NormCache {
  PyObject_VAR_HEAD  // as many extents in `shape` as x had axes
      PyObject* weakrefs;
  PyObject *x, *weight, *bias;  // weight, bias: may be None
  PyObject* owner;              // of the statistics
  PyObject* views[3];           // mean, rstd, batch_var as arrays, once they have been asked for
  double *mean, *mean_lo, *var, *rstd, *rstd_lo;
  double eps;
  int64_t sets, count;  // count: values in each set
  Spec spec;
  bool training;
  Dtype dtype;           // of x, as it was: an array can be given another shape or dtype in place
  py::ssize_t shape[1];  // of x, as it was
};

// What a cache remembers of its call beside the arrays.
struct Settings {
  Spec spec;
  double eps;
  int64_t count;
  bool training = true;
};

py::object make_cache(const Settings& settings, const Array& x, py::handle weight, py::handle bias,
                      const Statistics& statistics, int64_t sets);

// The cache in `object`, or nullptr.
const NormCache* as_cache(py::handle object);

// Are the arrays of the cache still those that the forward saw, as far as memory safety can tell?
bool still_fits(const NormCache& cache);

void bind_cache(py::module_& m);

}  // namespace fastnorm
