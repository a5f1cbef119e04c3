// The norms: accepts the common call, lays out its plan, allocates results through NumPy, runs the kernel without the
// interpreter lock. Every entry returns None for a call it does not accept, before anything is written; `checked` says
// that the Python layer has already looked at the call (overlaps included), so that only memory safety is asked here.
#include <cmath>
#include <new>
#include <optional>
#include <string>

#include "arrays.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

enum class Kind { layer, rms, group, instance, batch };

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::layer:
      return "layer_norm";
    case Kind::rms:
      return "rms_norm";
    case Kind::group:
      return "group_norm";
    case Kind::instance:
      return "instance_norm";
    default:
      return "batch_norm";
  }
}

// What a call normalises over. `axis` is the first normalised axis (layer, rms) or the channel axis.
struct Spec {
  Kind kind;
  int axis = 0;
  int64_t groups = 1;

  bool by_row() const { return kind == Kind::layer || kind == Kind::rms; }
  int batch_axis() const { return axis == 0 ? 1 : 0; }
};

std::optional<Spec> make_spec(Kind kind, const Array& x, py::handle axis_object, py::handle groups_object) {
  Spec spec{kind};
  int64_t axis = 0;
  if (!x.is_float() || !as_integer(axis_object, &axis)) return {};
  if (axis < 0) axis += x.rank();
  if (axis < 0 || axis >= x.rank()) return {};
  spec.axis = static_cast<int>(axis);
  if (!spec.by_row() && x.rank() < (kind == Kind::instance ? 3 : 2)) return {};
  if (kind == Kind::group) {
    const int64_t channels = x.size(spec.axis);
    if (!as_integer(groups_object, &spec.groups) || spec.groups < 1 || spec.groups > channels) return {};
    if (channels % spec.groups != 0) return {};
    if (x.rank() == kMaxRank) return {};  // the channel axis is split in two
  }
  return spec;
}

bool is_param(const Spec& spec, const Array& x, const Array& param) {
  if (!param.is_float() || param.dtype() != x.dtype()) return false;
  if (!spec.by_row()) return param.rank() == 1 && param.size(0) == x.size(spec.axis);
  if (param.rank() != x.rank() - spec.axis) return false;
  for (int i = 0; i < param.rank(); ++i) {
    if (param.size(i) != x.size(spec.axis + i)) return false;
  }
  return true;
}

// An optional array argument: absent (None), accepted, or a reason to decline the call.
struct Optional {
  Array array;
  bool given = false, accepted = true;
};

Optional optional_param(const Spec& spec, const Array& x, py::handle object) {
  Optional param;
  if (object.is_none()) return param;
  param.array = Array(object);
  param.given = true;
  param.accepted = is_param(spec, x, param.array);
  return param;
}

// A 1-D float32 or float64 array of one value per channel: statistics may be kept more precisely than x.
Optional optional_channels(const Spec& spec, const Array& x, py::handle object) {
  Optional channels;
  if (object.is_none()) return channels;
  channels.array = Array(object);
  channels.given = true;
  const Array& a = channels.array;
  channels.accepted = a.is_float() && (a.dtype() == x.dtype() || a.dtype() == Dtype::float64) && a.rank() == 1 &&
                      a.size(0) == x.size(spec.axis);
  return channels;
}

double load(const Array& a, int64_t i) {
  const char* from = a.data() + i * a.stride(0);
  if (a.dtype() == Dtype::float64) {
    double value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store(const Array& a, int64_t i, double value) {
  char* to = a.data() + i * a.stride(0);
  if (a.dtype() == Dtype::float64) {
    std::memcpy(to, &value, sizeof value);
  } else {
    const float rounded = static_cast<float>(value);
    std::memcpy(to, &rounded, sizeof rounded);
  }
}

// (1 - momentum) * running + momentum * batch; a weight of 0 leaves no trace of what it weighs, infinite or not.
double mix(double momentum, double running, double batch) {
  const double kept = momentum == 1 ? 0 : (1 - momentum) * running;
  return momentum == 0 ? running : kept + momentum * batch;
}

struct Sizes {
  int64_t sets = 1;     // sets normalised
  int64_t per_set = 1;  // values in each
  int64_t batch = 1;    // sets for a row norm, batch size otherwise
  int64_t total = 1;
};

Sizes sizes_of(const Spec& spec, const Array& x) {
  Sizes sizes;
  sizes.total = x.count();
  int64_t lead = 1, tail = 1;
  for (int axis = 0; axis < x.rank(); ++axis) {
    const int64_t size = x.size(axis);
    if (spec.by_row()) {
      (axis < spec.axis ? lead : tail) *= size;
    } else if (axis == spec.axis || (axis == spec.batch_axis() && spec.kind != Kind::batch)) {
      lead *= size;
    } else {
      tail *= size;
    }
  }
  sizes.sets = lead;
  sizes.per_set = tail;
  if (spec.kind == Kind::group) {
    const int64_t channels = x.size(spec.axis);
    sizes.sets = x.size(spec.batch_axis()) * spec.groups;
    sizes.per_set = tail * (channels / spec.groups);
  }
  sizes.batch = spec.by_row() ? lead : x.size(spec.batch_axis());
  return sizes;
}

// Nothing to normalise in a batch of something: there are no statistics to give.
bool has_empty_sets(const Sizes& sizes) { return sizes.batch > 0 && sizes.sets > 0 && sizes.per_set == 0; }

// Sets are numbered in C order, samples before channels or groups wherever the channel axis is.
void number_sets(PlanInput& in) {
  int64_t sets = 1;
  for (const bool owning : {true, false}) {
    for (int axis = in.rank - 1; axis >= 0; --axis) {
      if (in.role[axis] != Role::set || in.set_owns_param[axis] != owning) continue;
      in.set_stride[axis] = sets;
      sets *= in.size[axis];
    }
  }
}

PlanInput describe(const Spec& spec, const Array& x) {
  PlanInput in;
  in.itemsize = x.itemsize();
  in.centred = spec.kind != Kind::rms;
  for (int axis = 0; axis < x.rank(); ++axis) {
    const int64_t size = x.size(axis);
    Role role = Role::reduce;
    bool owns = false;
    if (spec.by_row()) {
      role = axis < spec.axis ? Role::set : Role::param;
    } else if (axis == spec.axis) {
      role = Role::set;
      owns = true;
      if (spec.kind == Kind::group) {
        in.size[in.rank] = spec.groups;
        in.role[in.rank] = Role::set;
        in.set_owns_param[in.rank++] = true;
        in.size[in.rank] = size / spec.groups;
        in.role[in.rank] = Role::param;
        in.set_owns_param[in.rank++] = false;
        continue;
      }
    } else if (axis == spec.batch_axis() && spec.kind != Kind::batch) {
      role = Role::set;
    }
    in.size[in.rank] = size;
    in.role[in.rank] = role;
    in.set_owns_param[in.rank++] = owns;
  }
  number_sets(in);
  return in;
}

void place(const Spec& spec, const Array& array, PlanInput::Array& to) {
  to.data = array.data();
  int out = 0;
  for (int axis = 0; axis < array.rank(); ++axis) {
    if (spec.kind == Kind::group && axis == spec.axis) {
      to.stride[out++] = array.stride(axis) * (array.size(axis) / spec.groups);
    }
    to.stride[out++] = array.stride(axis);
  }
}

// Weights as the kernels read them: contiguous, in the order in which x's memory walks the PARAM axes.
template <class T>
class Params {
 public:
  Params(const Optional& param, const Plan& plan) {
    if (!param.given) return;
    const Array& a = param.array;
    if (plan.params_in_order() && a.c_contiguous() && a.aligned()) {
      values_ = reinterpret_cast<const T*>(a.data());
      return;
    }
    Walk walk;
    for (int axis = 0; axis < a.rank(); ++axis) walk.push(a.size(axis), a.stride(axis));
    buffer_.resize(static_cast<size_t>(plan.params));
    for (int64_t i = 0; i < plan.params; ++i)
      std::memcpy(&buffer_[i], a.data() + walk.offset(c_index(plan, i)), sizeof(T));
    values_ = buffer_.data();
  }
  const T* get() const { return values_; }

  static int64_t c_index(const Plan& plan, int64_t i) {
    const int64_t per_set = plan.params_per_set;
    return i / per_set * per_set + plan.param_order.offset(i % per_set);
  }

 private:
  const T* values_ = nullptr;
  std::vector<T> buffer_;
};

// A parameter's gradient: written in the kernels' order, brought into C order where the two differ.
template <class T>
py::object in_c_order(std::vector<T>&& values, py::array target, const Plan& plan) {
  T* to = static_cast<T*>(target.mutable_data());
  for (int64_t i = 0; i < plan.params; ++i) to[Params<T>::c_index(plan, i)] = values[i];
  return std::move(target);
}

// What a forward call leaves for its backward. Read-only from Python.
struct NormCache {
  Spec spec;
  py::object x, weight, bias, mean, rstd, batch_var;
  py::array mean_lo;  // mean + mean_lo is the mean to twice the precision of float64
  double eps = 0;
  int64_t count = 0;
  bool training = true;
  Dtype dtype = Dtype::other;  // of x, as it was: an array can be given another shape or dtype in place
  std::vector<int64_t> shape;

  void remember(const Array& array) {
    dtype = array.dtype();
    for (int axis = 0; axis < array.rank(); ++axis) shape.push_back(array.size(axis));
  }
};

py::array float64_vector(int64_t size, double fill) {
  py::array_t<double> vector(size);
  std::fill_n(vector.mutable_data(), size, fill);
  return std::move(vector);
}

double* data_of(const py::object& array) {
  return array.is_none() || !array ? nullptr : reinterpret_cast<double*>(py::detail::array_proxy(array.ptr())->data);
}

// Statistics arrays of a call; the plain forward keeps them in a vector, `_forward` in arrays that its cache will own.
struct Statistics {
  py::object mean = py::none(), mean_lo, rstd, var = py::none();

  void allocate(const Spec& spec, int64_t sets, bool is_double) {
    if (spec.kind != Kind::rms) mean = float64_vector(sets, 0);
    if (spec.kind != Kind::rms && is_double) mean_lo = float64_vector(sets, 0);
    if (spec.kind == Kind::batch) var = float64_vector(sets, 0);
    rstd = float64_vector(sets, 0);
  }
};

py::object make_cache(const Spec& spec, py::handle x, py::handle weight, py::handle bias, double eps, int64_t count,
                      const Statistics& statistics, bool training = true) {
  NormCache cache{spec};
  cache.x = py::reinterpret_borrow<py::object>(x);
  cache.weight = py::reinterpret_borrow<py::object>(weight);
  cache.bias = py::reinterpret_borrow<py::object>(bias);
  cache.mean = statistics.mean;
  cache.rstd = statistics.rstd;
  cache.mean_lo = statistics.mean_lo ? py::array(statistics.mean_lo) : py::array();
  cache.batch_var = training ? statistics.var : py::object(py::none());
  cache.eps = eps;
  cache.count = count;
  cache.training = training;
  cache.remember(Array(x));
  for (const py::object& array : {cache.mean, cache.rstd, cache.batch_var}) {
    if (!array.is_none()) make_read_only(py::reinterpret_borrow<py::array>(array));
  }
  return py::cast(std::move(cache));
}

enum class Pass { forward, apply };

template <class T>
void run_forward(const Spec& spec, Pass pass, const Array& x, const Array& y, const Optional& weight,
                 const Optional& bias, double eps, const Statistics& statistics) {
  PlanInput in = describe(spec, x);
  place(spec, x, in.x);
  place(spec, y, in.y);
  const int64_t total = x.count();
  Plan plan = make_plan(in);
  plan.threads = threads_for(total);
  const Params<T> weights(weight, plan), biases(bias, plan);
  NormArgs<T> args;
  args.weight = weights.get();
  args.bias = biases.get();
  args.eps = eps;
  args.centred = spec.kind != Kind::rms;
  args.mean = data_of(statistics.mean);
  args.mean_lo = data_of(statistics.mean_lo);
  args.var = data_of(statistics.var);
  args.rstd = data_of(statistics.rstd);
  const NormKernels<T>& kernel = norm_kernels<T>();
  const ReleaseForLargeWork release(total);
  if (!(pass == Pass::forward ? kernel.forward : kernel.apply)(plan, args)) throw std::bad_alloc();
}

void run_forward(const Spec& spec, Pass pass, const Array& x, const Array& y, const Optional& weight,
                 const Optional& bias, double eps, const Statistics& statistics) {
  (x.dtype() == Dtype::float32 ? run_forward<float> : run_forward<double>)(spec, pass, x, y, weight, bias, eps,
                                                                           statistics);
}

enum class InPlace { allowed, refused };

// Is `out` fit for the result of a call on x? The same view as x is fine where in_place allows it.
bool accepts_out(const Array& x, py::handle out_object, InPlace in_place, bool checked,
                 std::initializer_list<const Optional*> others) {
  const Array out(out_object);
  if (!out.is_float() || out.dtype() != x.dtype() || !out.same_shape(x) || !out.writeable() ||
      out.may_overlap_itself()) {
    return false;
  }
  if (checked) return true;
  if (out.may_overlap(x) && !(in_place == InPlace::allowed && out.same_view(x))) return false;
  for (const Optional* other : others) {
    if (other->given && out.may_overlap(other->array)) return false;
  }
  return true;
}

bool accepts_eps(py::handle object, double* eps) { return as_number(object, eps) && *eps >= 0; }

py::object forward(Kind kind, bool want_cache, py::handle x_object, py::handle weight_object, py::handle bias_object,
                   py::handle axis_object, py::handle groups_object, py::handle eps_object, py::handle out_object,
                   bool checked) {
  if (verifying() && !checked) return py::none();
  const Array x(x_object);
  const std::optional<Spec> spec = make_spec(kind, x, axis_object, groups_object);
  double eps = 0;
  if (!spec || !accepts_eps(eps_object, &eps)) return py::none();
  const Sizes sizes = sizes_of(*spec, x);
  const Optional weight = optional_param(*spec, x, weight_object), bias = optional_param(*spec, x, bias_object);
  if (!weight.accepted || !bias.accepted || has_empty_sets(sizes)) return py::none();
  const InPlace in_place = want_cache ? InPlace::refused : InPlace::allowed;
  if (!out_object.is_none() && !accepts_out(x, out_object, in_place, checked, {&weight, &bias})) return py::none();

  py::object y = out_object.is_none() ? py::object(new_like(x)) : py::reinterpret_borrow<py::object>(out_object);
  Statistics statistics;
  if (want_cache) statistics.allocate(*spec, sizes.sets, x.dtype() == Dtype::float64);
  if (sizes.total > 0) run_forward(*spec, Pass::forward, x, Array(y), weight, bias, eps, statistics);
  if (!want_cache) return y;

  return py::make_tuple(y, make_cache(*spec, x_object, weight_object, bias_object, eps, sizes.per_set, statistics));
}

// rstd of given variances; false where one of them is negative.
bool given_statistics(const Array& mean, const Array& var, double eps, const Statistics& to) {
  double *mean_to = data_of(to.mean), *rstd_to = data_of(to.rstd);
  for (int64_t c = 0; c < mean.size(0); ++c) {
    const double v = load(var, c);
    if (v < 0) return false;
    mean_to[c] = load(mean, c);
    // Quarters: the sum of two finite numbers can overflow.
    rstd_to[c] = v + eps == 0 ? 0 : 0.5 / std::sqrt(0.25 * v + 0.25 * eps);
  }
  return true;
}

py::object batch_norm(py::handle x_object, py::handle mean_object, py::handle var_object, py::handle weight_object,
                      py::handle bias_object, py::handle axis_object, py::handle eps_object, py::handle out_object,
                      bool checked) {
  if (verifying() && !checked) return py::none();
  const Array x(x_object);
  const std::optional<Spec> spec = make_spec(Kind::batch, x, axis_object, py::none());
  double eps = 0;
  if (!spec || !accepts_eps(eps_object, &eps)) return py::none();
  const Optional weight = optional_param(*spec, x, weight_object), bias = optional_param(*spec, x, bias_object);
  const Optional mean = optional_channels(*spec, x, mean_object), var = optional_channels(*spec, x, var_object);
  if (!mean.given || !var.given || !mean.accepted || !var.accepted || !weight.accepted || !bias.accepted)
    return py::none();
  if (!out_object.is_none() && !accepts_out(x, out_object, InPlace::allowed, checked, {&weight, &bias, &mean, &var})) {
    return py::none();
  }
  Statistics statistics;
  statistics.allocate(*spec, mean.array.size(0), false);
  if (!given_statistics(mean.array, var.array, eps, statistics)) return py::none();
  py::object y = out_object.is_none() ? py::object(new_like(x)) : py::reinterpret_borrow<py::object>(out_object);
  if (x.count() > 0) run_forward(*spec, Pass::apply, x, Array(y), weight, bias, eps, statistics);
  return y;
}

py::object batch_norm_forward(py::handle x_object, py::handle weight_object, py::handle bias_object,
                              py::handle mean_object, py::handle var_object, py::handle momentum_object,
                              py::handle axis_object, py::handle eps_object, py::handle training_object,
                              py::handle out_object, bool checked) {
  if (verifying() && !checked) return py::none();
  if (!PyBool_Check(training_object.ptr())) return py::none();
  const bool training = training_object.ptr() == Py_True;
  const Array x(x_object);
  const std::optional<Spec> spec = make_spec(Kind::batch, x, axis_object, py::none());
  double eps = 0, momentum = 0;
  if (!spec || !accepts_eps(eps_object, &eps)) return py::none();
  const bool update = !momentum_object.is_none();
  if (update && !(as_number(momentum_object, &momentum) && momentum >= 0 && momentum <= 1)) return py::none();
  const Sizes sizes = sizes_of(*spec, x);
  const Optional weight = optional_param(*spec, x, weight_object), bias = optional_param(*spec, x, bias_object);
  const Optional mean = optional_channels(*spec, x, mean_object), var = optional_channels(*spec, x, var_object);
  if (!weight.accepted || !bias.accepted || !mean.accepted || !var.accepted) return py::none();
  if (training ? sizes.per_set == 1 && sizes.sets > 0 : !mean.given || !var.given) return py::none();
  if (training && has_empty_sets(sizes)) return py::none();
  if (training) {
    for (const Optional* running : {&mean, &var}) {
      if (!running->given) continue;
      if (!running->array.writeable() || running->array.may_overlap_itself()) return py::none();
      if (checked) continue;
      for (const Optional* other : {&weight, &bias, running == &mean ? &var : &mean}) {
        if (other->given && running->array.may_overlap(other->array)) return py::none();
      }
      if (running->array.may_overlap(x)) return py::none();
    }
  }
  if (!out_object.is_none() && !accepts_out(x, out_object, InPlace::refused, checked, {&weight, &bias, &mean, &var})) {
    return py::none();
  }

  Statistics statistics;
  statistics.allocate(*spec, sizes.sets, training && x.dtype() == Dtype::float64);
  if (!training && !given_statistics(mean.array, var.array, eps, statistics)) return py::none();
  py::object y = out_object.is_none() ? py::object(new_like(x)) : py::reinterpret_borrow<py::object>(out_object);
  if (sizes.total > 0) {
    run_forward(*spec, training ? Pass::forward : Pass::apply, x, Array(y), weight, bias, eps, statistics);
    if (training && update) {
      const double count = static_cast<double>(sizes.per_set), unbiased = count / (count - 1);
      const double *batch_mean = data_of(statistics.mean), *batch_var = data_of(statistics.var);
      for (int64_t c = 0; c < sizes.sets; ++c) {
        if (mean.given) store(mean.array, c, mix(momentum, load(mean.array, c), batch_mean[c]));
        if (var.given) store(var.array, c, mix(momentum, load(var.array, c), batch_var[c] * unbiased));
      }
    }
  }

  return py::make_tuple(
      y, make_cache(*spec, x_object, weight_object, bias_object, eps, sizes.per_set, statistics, training));
}

template <class T>
py::object run_backward(const NormCache& cache, const Array& x, const Array& dy, const Array& dx,
                        const Optional& weight, bool want_bias) {
  const Spec& spec = cache.spec;
  const auto like = [](const py::object& param) {
    const Array a(param);
    std::vector<py::ssize_t> shape(a.rank());
    for (int axis = 0; axis < a.rank(); ++axis) shape[axis] = a.size(axis);
    return py::array(dtype_object(a.dtype()), std::move(shape));
  };
  py::object dweight = weight.given ? py::object(like(cache.weight)) : py::none();
  py::object dbias = want_bias ? py::object(like(cache.bias)) : py::none();
  T* dweight_to = weight.given ? static_cast<T*>(py::array(dweight).mutable_data()) : nullptr;
  T* dbias_to = want_bias ? static_cast<T*>(py::array(dbias).mutable_data()) : nullptr;
  if (x.count() == 0) {
    if (dweight_to) std::fill_n(dweight_to, py::array(dweight).size(), T(0));
    if (dbias_to) std::fill_n(dbias_to, py::array(dbias).size(), T(0));
    return py::make_tuple(dweight, dbias);
  }

  PlanInput in = describe(spec, x);
  place(spec, x, in.x);
  place(spec, dy, in.dy);
  place(spec, dx, in.dx);
  std::vector<T> dweight_walk, dbias_walk;
  Plan plan = make_plan(in);
  plan.threads = threads_for(x.count());
  const bool in_order = plan.params_in_order();
  if (!in_order) {
    dweight_walk.resize(dweight_to ? plan.params : 0);
    dbias_walk.resize(dbias_to ? plan.params : 0);
  }
  const Params<T> weights(weight, plan);
  NormArgs<T> args;
  args.weight = weights.get();
  args.eps = cache.eps;
  args.centred = spec.kind != Kind::rms;
  args.constant_stats = !cache.training;
  args.mean = data_of(cache.mean);
  args.mean_lo = cache.mean_lo.size() > 0 ? data_of(cache.mean_lo) : nullptr;
  args.rstd = data_of(cache.rstd);
  args.dweight = in_order || !dweight_to ? dweight_to : dweight_walk.data();
  args.dbias = in_order || !dbias_to ? dbias_to : dbias_walk.data();
  {
    const ReleaseForLargeWork release(x.count());
    if (!norm_kernels<T>().backward(plan, args)) throw std::bad_alloc();
  }
  if (!dweight_walk.empty()) dweight = in_c_order(std::move(dweight_walk), py::array(dweight), plan);
  if (!dbias_walk.empty()) dbias = in_c_order(std::move(dbias_walk), py::array(dbias), plan);
  return py::make_tuple(dweight, dbias);
}

// Are the arrays of the cache still those that the forward saw, as far as memory safety can tell? A shape or dtype can
// be changed in place, and so can an array's length.
bool still_fits(const NormCache& cache) {
  const Array x(cache.x);
  if (!x.is_float() || x.dtype() != cache.dtype || x.rank() != static_cast<int>(cache.shape.size())) return false;
  for (int axis = 0; axis < x.rank(); ++axis) {
    if (x.size(axis) != cache.shape[axis]) return false;
  }
  const int64_t sets = sizes_of(cache.spec, x).sets;
  for (const py::object& statistic : {cache.mean, cache.rstd, py::object(cache.mean_lo)}) {
    if (!statistic || statistic.is_none()) continue;
    const Array a(statistic);
    if (a.dtype() != Dtype::float64 || a.rank() != 1 || (a.size(0) != sets && !statistic.is(cache.mean_lo)))
      return false;
    if (statistic.is(cache.mean_lo) && a.size(0) != 0 && a.size(0) != sets) return false;
  }
  for (const py::object& param : {cache.weight, cache.bias}) {
    if (!param.is_none() && !is_param(cache.spec, x, Array(param))) return false;
  }
  return true;
}

// (dx, dweight, dbias), or None. A cache of another function is declined.
py::object backward(Kind kind, py::handle dy_object, py::handle cache_object, py::handle out_object, bool checked) {
  if (verifying() && !checked) return py::none();
  if (!py::isinstance<NormCache>(cache_object)) return py::none();
  const NormCache& cache = cache_object.cast<const NormCache&>();
  if (cache.spec.kind != kind) return py::none();
  const Array x(cache.x), dy(dy_object);
  if (!dy.is_float() || dy.dtype() != x.dtype() || !dy.same_shape(x) || !still_fits(cache)) return py::none();
  Optional x_given{x, true, true}, weight;
  if (!cache.weight.is_none()) weight = Optional{Array(cache.weight), true, true};
  if (!out_object.is_none() && !accepts_out(dy, out_object, InPlace::allowed, checked, {&x_given, &weight}))
    return py::none();

  py::object dx = out_object.is_none() ? py::object(new_like(x)) : py::reinterpret_borrow<py::object>(out_object);
  const bool want_bias = !cache.bias.is_none();
  const py::tuple params = x.dtype() == Dtype::float32
                               ? run_backward<float>(cache, x, dy, Array(dx), weight, want_bias)
                               : run_backward<double>(cache, x, dy, Array(dx), weight, want_bias);
  return py::make_tuple(dx, params[0], params[1]);
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
  in.rank = x.rank();
  in.x.data = x.data();
  number_sets(in);
  py::array mean = float64_vector(sets, 0), m2 = float64_vector(sets, 0);
  if (sets > 0 && count > 0) {
    ReleaseForLargeWork release(sets * count);
    Plan plan = make_plan(in);
    plan.threads = threads_for(sets * count);
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      NormArgs<T> args;
      args.mean = data_of(mean);
      args.var = data_of(m2);
      return norm_kernels<T>().moments(plan, args);
    };
    if (!(x.dtype() == Dtype::float32 ? run(0.0f) : run(0.0))) throw std::bad_alloc();
  } else if (sets > 0) {
    return py::none();
  }
  return py::make_tuple(count, mean, m2);
}

template <Kind kind>
void bind_by_axis(py::module_& m) {
  const std::string name = name_of(kind);
  for (const bool want_cache : {false, true}) {
    m.def((name + (want_cache ? "_forward" : "")).c_str(),
          [want_cache](py::handle x, py::handle weight, py::handle bias, py::handle axis, py::handle eps,
                       py::handle out, bool checked) {
            return forward(kind, want_cache, x, weight, bias, axis, py::none(), eps, out, checked);
          },
          py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("axis"), py::arg("eps"), py::arg("out"),
          py::arg("checked") = false);
  }
}

template <Kind kind>
void bind_backward(py::module_& m) {
  m.def((std::string(name_of(kind)) + "_backward").c_str(),
        [](py::handle dy, py::handle cache, py::handle out, bool checked) {
          return backward(kind, dy, cache, out, checked);
        },
        py::arg("dy"), py::arg("cache"), py::arg("out"), py::arg("checked") = false);
}

constexpr const char* kCacheDoc = R"(What a norm's forward keeps for its backward: references, no copies. Read-only.

Attributes
----------
x, weight, bias : ndarray
    The arrays of the call; weight and bias may be None.
mean, rstd : ndarray
    float64, 1-D over the sets in C order, samples first; mean is None for rms_norm.
eps : float
    As given.
function : str
    The name of the norm.
axis : int or None
    The first normalised axis of layer_norm and rms_norm.
channel_axis, num_groups : int or None
    As given, not negative; None where the norm has none.
batch_var, training : ndarray, bool or None
    Of batch_norm: the biased variance of the batch, and whether it was used.
count : int
    Values in each set.
intact : bool
    Whether x and the parameters still have the shapes they had.)";

void bind_cache(py::module_& m) {
  const auto number_or_none = [](bool given, int64_t value) {
    return given ? py::object(py::int_(value)) : py::none();
  };
  py::class_<NormCache> cache(m, "NormCache", kCacheDoc);
  // Only a forward makes one: `NormCache.__new__(NormCache)` would be an object without a C++ part.
  reinterpret_cast<PyTypeObject*>(cache.ptr())->tp_new = nullptr;
  cache.def_property_readonly("function", [](const NormCache& c) { return std::string(name_of(c.spec.kind)); })
      .def_readonly("x", &NormCache::x)
      .def_readonly("weight", &NormCache::weight)
      .def_readonly("bias", &NormCache::bias)
      .def_readonly("mean", &NormCache::mean)
      .def_readonly("rstd", &NormCache::rstd)
      .def_readonly("eps", &NormCache::eps)
      .def_property_readonly("axis", [=](const NormCache& c) { return number_or_none(c.spec.by_row(), c.spec.axis); })
      .def_property_readonly("channel_axis",
                             [=](const NormCache& c) { return number_or_none(!c.spec.by_row(), c.spec.axis); })
      .def_property_readonly(
          "num_groups", [=](const NormCache& c) { return number_or_none(c.spec.kind == Kind::group, c.spec.groups); })
      .def_readonly("batch_var", &NormCache::batch_var)
      .def_property_readonly("count", [](const NormCache& c) { return c.count; })
      .def_property_readonly("training",
                             [](const NormCache& c) {
                               return c.spec.kind == Kind::batch ? py::object(py::bool_(c.training)) : py::none();
                             })
      .def_property_readonly("intact", &still_fits)
      .def("__repr__", [](const NormCache& c) {
        return std::string("<fastnorm ") + name_of(c.spec.kind) + " cache, x of shape " +
               py::repr(c.x.attr("shape")).cast<std::string>() + ">";
      });
}

}  // namespace

void bind_norm(py::module_& m) {
  bind_cache(m);
  bind_by_axis<Kind::layer>(m);
  bind_by_axis<Kind::rms>(m);
  bind_by_axis<Kind::instance>(m);
  for (const bool want_cache : {false, true}) {
    m.def(
        want_cache ? "group_norm_forward" : "group_norm",
        [want_cache](py::handle x, py::handle num_groups, py::handle weight, py::handle bias, py::handle channel_axis,
                     py::handle eps, py::handle out, bool checked) {
          return forward(Kind::group, want_cache, x, weight, bias, channel_axis, num_groups, eps, out, checked);
        },
        py::arg("x"), py::arg("num_groups"), py::arg("weight"), py::arg("bias"), py::arg("channel_axis"),
        py::arg("eps"), py::arg("out"), py::arg("checked") = false);
  }
  m.def("batch_norm", batch_norm, py::arg("x"), py::arg("mean"), py::arg("var"), py::arg("weight"), py::arg("bias"),
        py::arg("channel_axis"), py::arg("eps"), py::arg("out"), py::arg("checked") = false);
  m.def("batch_norm_forward", batch_norm_forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("momentum"), py::arg("channel_axis"), py::arg("eps"),
        py::arg("training"), py::arg("out"), py::arg("checked") = false);
  bind_backward<Kind::layer>(m);
  bind_backward<Kind::rms>(m);
  bind_backward<Kind::group>(m);
  bind_backward<Kind::instance>(m);
  bind_backward<Kind::batch>(m);
  m.def("moments", moments, py::arg("x"), py::arg("reduced"));
}

}  // namespace fastnorm
