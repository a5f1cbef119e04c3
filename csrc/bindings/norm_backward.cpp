// Backward of the norms: reads the cache, takes the gradients' arrays from NumPy, runs the kernel.
#include <new>
#include <type_traits>
#include <vector>

#include "cpu_features.hpp"
#include "interpreter.hpp"
#include "kernel_table.hpp"
#include "norm_cache.hpp"
#include "norm_entries.hpp"
#include "noted.hpp"
#include "operands.hpp"
#include "parallel.hpp"
#include "wide_gradient.hpp"

namespace fastnorm {
namespace {

PyTypeObject* grads_type = &PyTuple_Type;  // until the package names its own

// A parameter's gradient: written in the kernels' order, brought into C order where the two differ.
template <class T>
class ParamGradient {
 public:
  ParamGradient(const Optional& param) {
    if (!param.given) return;
    const Array& a = param.array;
    array_ = new_array(a.dtype(), a.rank(), a.shape());
    result_ = reinterpret_cast<T*>(Array(array_).data());
  }
  // Where the kernel is to write.
  T* target(const Plan& plan) {
    if (result_ == nullptr || plan.params_in_order()) return result_;
    return walked_ = buffer_.reserve(plan.params);
  }
  void finish(const Plan& plan) {
    if (walked_ == nullptr) return;
    for (int64_t i = 0; i < plan.params; ++i) result_[c_index(plan, i)] = walked_[i];
  }
  T* values() const { return result_; }
  void clear() {
    if (result_) std::fill_n(result_, Array(array_).count(), T(0));
  }
  py::object release() { return result_ ? std::move(array_) : py::none(); }

 private:
  py::object array_;
  T *result_ = nullptr, *walked_ = nullptr;
  Scratch<T, 64> buffer_;
};

// NormGrads(dx, dweight, dbias), as its own constructor builds it.
py::object make_grads(py::object dx, py::object dweight, py::object dbias) {
  PyObject* made = grads_type->tp_alloc(grads_type, 3);
  if (made == nullptr) throw py::error_already_set();
  PyTuple_SET_ITEM(made, 0, dx.release().ptr());
  PyTuple_SET_ITEM(made, 1, dweight.release().ptr());
  PyTuple_SET_ITEM(made, 2, dbias.release().ptr());
  return py::reinterpret_steal<py::object>(made);
}

// `dweight` and `dbias` in C order.
[[gnu::noinline]] void mend_overflow(const PlanInput& in, const Plan& plan, const NormArgs<double>& args,
                                     double* dweight, double* dbias) {
  std::vector<double> weight(static_cast<size_t>(plan.params), 1.0);
  for (int64_t i = 0; args.weight && i < plan.params; ++i) {
    weight[static_cast<size_t>(c_index(plan, i))] = args.weight[i];
  }
  WideGradient(in, args, weight.data(), dweight, dbias).mend();
}

template <class T>
py::object run(const NormCache& cache, const Array& x, const Array& dy, py::object dx, const Optional& weight,
               const Optional& bias, bool reused) {
  const Spec& spec = cache.spec;
  ParamGradient<T> dweight(weight), dbias(bias);
  const int64_t total = x.count();
  if (total == 0) {
    dweight.clear();
    dbias.clear();
    return make_grads(std::move(dx), dweight.release(), dbias.release());
  }
  PlanInput in;
  describe(spec, x, in);
  place(spec, x, in.x);
  place(spec, dy, in.dy);
  const Array result(dx);
  place(spec, result, in.dx);
  Plan& plan = plan_of_call(in);
  plan.threads = threads_for(total);
  const Params<T> weights(weight, plan);
  NormArgs<T> args;
  args.weight = weights.get();
  args.eps = cache.eps;
  args.centred = spec.kind != Kind::rms;
  args.constant_stats = !cache.training;
  const int64_t bytes = 3 * total * x.itemsize();
  plan.take_size(bytes, exceeds_cache(bytes));
  args.past_cache = reused && result.data() != dy.data() && plan.far;
  args.from_memory = args.past_cache && exceeds_cache(total * x.itemsize());
  args.mean = cache.mean;
  args.mean_lo = cache.mean_lo;
  args.rstd = cache.rstd;
  args.rstd_lo = cache.rstd_lo;
  args.dweight = dweight.target(plan);
  args.dbias = dbias.target(plan);
  {
    const ReleaseForLargeWork release(total);
    constexpr bool kMends = std::is_same_v<T, double> && WideGradient::kReachesFurther;
    if constexpr (kMends) Overflow::clear();
    if (!norm_kernels<T>().backward(plan, args)) throw std::bad_alloc();
    dweight.finish(plan);
    dbias.finish(plan);
    if constexpr (kMends) {
      if (Overflow::any() && !plan.dx_in_place()) mend_overflow(in, plan, args, dweight.values(), dbias.values());
    }
  }
  return make_grads(std::move(dx), dweight.release(), dbias.release());
}

Optional kept(PyObject* param) { return param == Py_None ? Optional{} : Optional{Array(param), true, true}; }

}  // namespace

py::object backward(Kind kind, py::handle dy_object, py::handle cache_object, py::handle out, bool checked) {
  if (verifying() && !checked) return py::none();
  const NormCache* cache = as_cache(cache_object);
  if (cache == nullptr || cache->spec.kind != kind) return py::none();
  const Array x(cache->x), dy(dy_object);
  if (!dy.is_float() || dy.dtype() != cache->dtype || !still_fits(*cache) || !dy.same_shape(x)) return py::none();
  const Optional x_given{x, true, true}, weight = kept(cache->weight), bias = kept(cache->bias);
  if (!out.is_none() && !accepts_out(dy, out, InPlace::allowed, checked, {&x_given, &weight})) return py::none();

  py::object dx = out.is_none() ? new_like(x) : py::reinterpret_borrow<py::object>(out);
  return (x.dtype() == Dtype::float32 ? run<float> : run<double>)(*cache, x, dy, std::move(dx), weight, bias,
                                                                  !out.is_none());
}

void bind_backward(py::module_& m) {
  m.def(
      "set_grads_type",
      [](const py::type& type) {
        if (!PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()), &PyTuple_Type)) {
          throw py::type_error("the gradients' type must be a tuple");
        }
        grads_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
      },
      py::arg("type"), "The named tuple that backward returns.");
}

}  // namespace fastnorm
