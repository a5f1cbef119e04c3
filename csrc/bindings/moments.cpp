// Count, mean and sum of squared deviations over any axes.
#include <pybind11/stl.h>

#include <new>
#include <vector>

#include "cpu_features.hpp"
#include "interpreter.hpp"
#include "kernel_table.hpp"
#include "norm_entries.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

py::object vector_of(int64_t size) {
  const py::ssize_t shape = size;
  return new_array(Dtype::float64, 1, &shape);
}

// (count, mean, m2): mean and m2 are 1-D over the kept axes in C order. `reduced` has one bool per axis of x.
py::object moments(py::handle x_object, const std::vector<bool>& reduced) {
  const Array x(x_object);
  if (!x.is_float() || static_cast<int>(reduced.size()) != x.rank()) return py::none();
  PlanInput in;
  in.itemsize = x.itemsize();
  int64_t sets = 1, count = 1;
  for (int axis = 0; axis < x.rank(); ++axis) {
    in.size[axis] = x.size(axis);
    in.role[axis] = reduced[axis] ? Role::reduce : Role::set;
    in.set_owns_param[axis] = false;
    in.x.stride[axis] = x.stride(axis);
    (reduced[axis] ? count : sets) *= x.size(axis);
  }
  if (sets > 0 && count == 0) return py::none();
  in.rank = x.rank();
  in.x.data = x.data();
  number_sets(in);
  const py::object mean = vector_of(sets), m2 = vector_of(sets);
  if (sets > 0) {
    Plan plan = make_plan(in);
    plan.threads = threads_for(sets * count);
    plan.far = exceeds_cache(sets * count * x.itemsize());
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      NormArgs<T> args;
      args.mean = reinterpret_cast<double*>(Array(mean).data());
      args.var = reinterpret_cast<double*>(Array(m2).data());
      const ReleaseForLargeWork release(sets * count);
      return norm_kernels<T>().moments(plan, args);
    };
    if (!(x.dtype() == Dtype::float32 ? run(0.0f) : run(0.0))) throw std::bad_alloc();
  }
  return py::make_tuple(count, mean, m2);
}

}  // namespace

void bind_moments(py::module_& m) { m.def("moments", moments, py::arg("x"), py::arg("reduced")); }

}  // namespace fastnorm
