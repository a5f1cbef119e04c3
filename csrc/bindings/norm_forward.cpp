// Forward of the norms: accepts the common call, lays out its plan, takes results from NumPy, runs the kernel.
#include <new>

#include "cpu_features.hpp"
#include "interpreter.hpp"
#include "kernel_table.hpp"
#include "norm_cache.hpp"
#include "norm_entries.hpp"
#include "operands.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

enum class Pass { forward, apply };

// One thread is as fast past the cache as soon as a result can be written there; two, one array of which is read and
// one written, then want more of memory than it brings (layer norm, float32, 32 MB of cache: arrays of 10 MB take 136
// us through it and 241 past it, of 16 MB 431 and 385). Not so the three arrays of the backward.
bool forward_exceeds_cache(int64_t bytes, int threads) {
  return threads > 1 ? bytes >= cache_bytes() / 3 * 2 : exceeds_cache(bytes);
}

template <class T>
void run(const Settings& settings, Pass pass, const Array& x, const Array& y, const Optional& weight,
         const Optional& bias, const Statistics& statistics, int64_t total, bool reused) {
  const Spec& spec = settings.spec;
  PlanInput in;
  describe(spec, x, in);
  place(spec, x, in.x);
  place(spec, y, in.y);
  Plan& plan = plan_of_call(in);
  plan.threads = threads_for(total);
  const Params<T> weights(weight, plan), biases(bias, plan);
  NormArgs<T> args;
  args.weight = weights.get();
  args.bias = biases.get();
  args.eps = settings.eps;
  args.centred = spec.kind != Kind::rms;
  // In place, x has brought the lines to the caches.
  const int64_t bytes = 2 * total * x.itemsize();
  plan.take_size(bytes, forward_exceeds_cache(bytes, plan.threads));
  args.past_cache = reused && y.data() != x.data() && plan.far;
  args.mean = statistics.mean;
  args.mean_lo = statistics.mean_lo;
  args.var = statistics.var;
  args.rstd = statistics.rstd;
  args.rstd_lo = statistics.rstd_lo;
  const NormKernels<T>& kernel = norm_kernels<T>();
  const ReleaseForLargeWork release(total);
  if (!(pass == Pass::forward ? kernel.forward : kernel.apply)(plan, args)) throw std::bad_alloc();
}

void run(const Settings& settings, Pass pass, const Array& x, const Array& y, const Optional& weight,
         const Optional& bias, const Statistics& statistics, int64_t total, bool reused) {
  if (total == 0) return;
  (x.dtype() == Dtype::float32 ? run<float> : run<double>)(settings, pass, x, y, weight, bias, statistics, total,
                                                           reused);
}

py::object result_for(const Array& x, py::handle out) {
  return out.is_none() ? new_like(x) : py::reinterpret_borrow<py::object>(out);
}

py::object pair(const py::object& first, const py::object& second) {
  py::object made = py::reinterpret_steal<py::object>(PyTuple_Pack(2, first.ptr(), second.ptr()));
  if (!made) throw py::error_already_set();
  return made;
}

bool accepts_eps(py::handle object, double* eps) { return as_number(object, eps) && *eps >= 0; }

// mean, and rstd of the variances; false where one of these is negative.
bool given_statistics(const Array& mean, const Array& var, double eps, const Statistics& to) {
  load_all(mean, to.mean);
  load_all(var, to.rstd);
  return kernels().given_rstds(to.rstd, mean.size(0), eps, to.rstd);
}

// (1 - momentum) * running + momentum * batch; a weight of 0 leaves no trace of what it weighs, infinite or not.
double mix(double momentum, double running, double batch) {
  const double kept = momentum == 1 ? 0 : (1 - momentum) * running;
  return momentum == 0 ? running : kept + momentum * batch;
}

// May the running statistics be updated in place while the other arrays are read?
bool accepts_updates(const Array& x, const Optional& weight, const Optional& bias, const Optional& mean,
                     const Optional& var, bool checked) {
  for (const Optional* running : {&mean, &var}) {
    if (!running->given) continue;
    if (!running->array.writeable() || running->array.may_overlap_itself()) return false;
    if (checked) continue;
    for (const Optional* other : {&weight, &bias, running == &mean ? &var : &mean}) {
      if (other->given && running->array.may_overlap(other->array)) return false;
    }
    if (running->array.may_overlap(x)) return false;
  }
  return true;
}

void update_running(const Optional& mean, const Optional& var, double momentum, const Sizes& sizes,
                    const Statistics& batch) {
  const double count = static_cast<double>(sizes.per_set), unbiased = count / (count - 1);
  for (int64_t c = 0; mean.given && c < sizes.sets; ++c) {
    store(mean.array, c, mix(momentum, load(mean.array, c), batch.mean[c]));
  }
  for (int64_t c = 0; var.given && c < sizes.sets; ++c) {
    store(var.array, c, mix(momentum, load(var.array, c), batch.var[c] * unbiased));
  }
}

}  // namespace

py::object forward(Kind kind, bool want_cache, const ForwardCall& call, bool checked) {
  if (verifying() && !checked) return py::none();
  const Array x(call.x);
  Settings settings{{kind}, 0, 0};
  Spec& spec = settings.spec;
  if (!make_spec(kind, x, call.axis, call.groups, &spec) || !accepts_eps(call.eps, &settings.eps)) return py::none();
  const Sizes sizes = sizes_of(spec, x);
  const Optional weight = optional_param(spec, x, call.weight), bias = optional_param(spec, x, call.bias);
  if (!weight.accepted || !bias.accepted || has_empty_sets(sizes)) return py::none();
  const InPlace in_place = want_cache ? InPlace::refused : InPlace::allowed;
  if (!call.out.is_none() && !accepts_out(x, call.out, in_place, checked, {&weight, &bias})) return py::none();

  py::object y = result_for(x, call.out);
  Statistics statistics;
  if (want_cache) statistics.allocate(kind, sizes.sets, x.dtype() == Dtype::float64, false, sizes.total == 0);
  run(settings, Pass::forward, x, Array(y), weight, bias, statistics, sizes.total, !call.out.is_none());
  if (!want_cache) return y;
  settings.count = sizes.per_set;
  return pair(y, make_cache(settings, x, call.weight, call.bias, statistics, sizes.sets));
}

py::object batch_norm(const BatchNormCall& call, bool checked) {
  if (verifying() && !checked) return py::none();
  const Array x(call.x);
  Settings settings{{Kind::batch}, 0, 0};
  Spec& spec = settings.spec;
  if (!make_spec(Kind::batch, x, call.axis, py::none(), &spec)) return py::none();
  if (!accepts_eps(call.eps, &settings.eps)) return py::none();
  const Optional mean = optional_channels(spec, x, call.mean), var = optional_channels(spec, x, call.var);
  const Optional weight = optional_param(spec, x, call.weight), bias = optional_param(spec, x, call.bias);
  if (!mean.given || !var.given || !mean.accepted || !var.accepted || !weight.accepted || !bias.accepted) {
    return py::none();
  }
  if (!call.out.is_none() && !accepts_out(x, call.out, InPlace::allowed, checked, {&weight, &bias, &mean, &var})) {
    return py::none();
  }

  const int64_t channels = x.size(spec.axis);
  Scratch<double, 256> memory;
  Statistics statistics;
  statistics.mean = memory.reserve(2 * channels);
  statistics.rstd = statistics.mean + channels;
  if (!given_statistics(mean.array, var.array, settings.eps, statistics)) return py::none();
  py::object y = result_for(x, call.out);
  run(settings, Pass::apply, x, Array(y), weight, bias, statistics, x.count(), !call.out.is_none());
  return y;
}

py::object batch_norm_forward(const BatchNormCall& call, py::handle momentum_object, py::handle training_object,
                              bool checked) {
  if (verifying() && !checked) return py::none();
  const Array x(call.x);
  Settings settings{{Kind::batch}, 0, 0};
  Spec& spec = settings.spec;
  if (!make_spec(Kind::batch, x, call.axis, py::none(), &spec)) return py::none();
  if (!accepts_eps(call.eps, &settings.eps) || !PyBool_Check(training_object.ptr())) return py::none();
  const bool training = training_object.ptr() == Py_True, update = !momentum_object.is_none();
  double momentum = 0;
  if (update && !(as_number(momentum_object, &momentum) && momentum >= 0 && momentum <= 1)) return py::none();
  const Sizes sizes = sizes_of(spec, x);
  const Optional weight = optional_param(spec, x, call.weight), bias = optional_param(spec, x, call.bias);
  const Optional mean = optional_channels(spec, x, call.mean), var = optional_channels(spec, x, call.var);
  if (!weight.accepted || !bias.accepted || !mean.accepted || !var.accepted) return py::none();
  if (training ? sizes.per_set == 1 && sizes.sets > 0 : !mean.given || !var.given) return py::none();
  if (training && (has_empty_sets(sizes) || !accepts_updates(x, weight, bias, mean, var, checked))) return py::none();
  if (!call.out.is_none() && !accepts_out(x, call.out, InPlace::refused, checked, {&weight, &bias, &mean, &var})) {
    return py::none();
  }

  Statistics statistics;
  statistics.allocate(Kind::batch, sizes.sets, training && x.dtype() == Dtype::float64, training, sizes.total == 0);
  if (!training && !given_statistics(mean.array, var.array, settings.eps, statistics)) return py::none();
  py::object y = result_for(x, call.out);
  run(settings, training ? Pass::forward : Pass::apply, x, Array(y), weight, bias, statistics, sizes.total,
      !call.out.is_none());
  settings.count = sizes.per_set;
  settings.training = training;
  py::object result = pair(y, make_cache(settings, x, call.weight, call.bias, statistics, sizes.sets));
  // Nothing can fail any more.
  if (training && update && sizes.total > 0) update_running(mean, var, momentum, sizes, statistics);
  return result;
}

}  // namespace fastnorm
