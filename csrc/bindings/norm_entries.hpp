// The entries of the norms. Each returns None for a call it does not accept, before anything is written; `checked` says
// that the Python layer has already looked at the call (overlaps included), so that only memory safety is asked here.
#pragma once

#include "spec.hpp"

namespace fastnorm {

struct ForwardCall {
  py::handle x, weight, bias, axis, groups, eps, out;
};

// y, or (y, cache).
py::object forward(Kind kind, bool want_cache, const ForwardCall& call, bool checked);

struct BatchNormCall {
  py::handle x, mean, var, weight, bias, axis, eps, out;
};

// y of given statistics.
py::object batch_norm(const BatchNormCall& call, bool checked);

// (y, cache); mean and var of the call are the running statistics.
py::object batch_norm_forward(const BatchNormCall& call, py::handle momentum, py::handle training, bool checked);

// NormGrads. A cache of another function is declined.
py::object backward(Kind kind, py::handle dy, py::handle cache, py::handle out, bool checked);

void bind_backward(py::module_& m);
void bind_moments(py::module_& m);

}  // namespace fastnorm
