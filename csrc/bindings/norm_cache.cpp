// The class fastnorm.NormCache: made by a forward or by pickle, never changed.
#include "norm_cache.hpp"

#include <structmember.h>

#include <cstddef>
#include <string>

#include "interpreter.hpp"
#include "operands.hpp"

namespace fastnorm {

static_assert(offsetof(PyBytesObject, ob_sval) % alignof(double) == 0, "statistics lie in a bytes object");

void Statistics::allocate(Kind kind, int64_t sets, bool both_parts, bool want_var, bool zeros) {
  const bool want_mean = kind != Kind::rms;
  const int64_t rows = (1 + want_mean) * (1 + both_parts) + want_var;
  const auto bytes = static_cast<py::ssize_t>(rows * sets * static_cast<int64_t>(sizeof(double)));
  owner = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, bytes));
  if (!owner) throw py::error_already_set();
  char* memory = PyBytes_AS_STRING(owner.ptr());
  if (zeros) std::memset(memory, 0, static_cast<size_t>(bytes));
  double* next = reinterpret_cast<double*>(memory);
  const auto take = [&](bool wanted) {
    double* const row = next;
    next += wanted ? sets : 0;
    return wanted ? row : nullptr;
  };
  rstd = take(true);
  mean = take(want_mean);
  var = take(want_var);
  mean_lo = take(want_mean && both_parts);
  rstd_lo = take(both_parts);
}

namespace {

PyTypeObject* cache_type = nullptr;
PyObject* restore_function = nullptr;

NormCache* self_of(PyObject* object) { return reinterpret_cast<NormCache*>(object); }

PyObject* owned(PyObject* object) {
  Py_INCREF(object);
  return object;
}

void deallocate(PyObject* object) {
  NormCache* self = self_of(object);
  if (self->weakrefs) PyObject_ClearWeakRefs(object);
  for (PyObject* held : {self->x, self->weight, self->bias, self->owner}) Py_XDECREF(held);
  for (PyObject* view : self->views) Py_XDECREF(view);
  PyTypeObject* const type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

enum View : int { mean, rstd, batch_var };

template <View which>
PyObject* get_view(PyObject* object, void*) {
  NormCache* self = self_of(object);
  const double* const values = which == mean ? self->mean : which == rstd ? self->rstd : self->var;
  if (values == nullptr) Py_RETURN_NONE;
  PyObject*& view = self->views[which];
  if (view == nullptr) {
    try {
      view = view_of(values, static_cast<py::ssize_t>(self->sets), self->owner).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    }
  }
  return owned(view);
}

PyObject* number_or_none(bool given, int64_t value) {
  if (!given) Py_RETURN_NONE;
  return PyLong_FromLongLong(value);
}

PyObject* get_function(PyObject* self, void*) { return PyUnicode_FromString(name_of(self_of(self)->spec.kind)); }
PyObject* get_axis(PyObject* self, void*) {
  return number_or_none(self_of(self)->spec.by_row(), self_of(self)->spec.axis);
}
PyObject* get_channel_axis(PyObject* self, void*) {
  return number_or_none(!self_of(self)->spec.by_row(), self_of(self)->spec.axis);
}
PyObject* get_num_groups(PyObject* self, void*) {
  return number_or_none(self_of(self)->spec.kind == Kind::group, self_of(self)->spec.groups);
}
PyObject* get_training(PyObject* self, void*) {
  if (self_of(self)->spec.kind != Kind::batch) Py_RETURN_NONE;
  return PyBool_FromLong(self_of(self)->training);
}
PyObject* get_intact(PyObject* self, void*) { return PyBool_FromLong(still_fits(*self_of(self))); }
PyObject* get_count(PyObject* self, void*) { return PyLong_FromLongLong(self_of(self)->count); }

PyObject* repr(PyObject* object) {
  PyObject* shape = PyObject_GetAttrString(self_of(object)->x, "shape");
  if (shape == nullptr) return nullptr;
  PyObject* text =
      PyUnicode_FromFormat("<fastnorm %s cache, x of shape %R>", name_of(self_of(object)->spec.kind), shape);
  Py_DECREF(shape);
  return text;
}

// (restore, (function, axis, num_groups, eps, training, x, weight, bias, sets, statistics))
PyObject* reduce(PyObject* object, PyObject*) {
  const NormCache* self = self_of(object);
  return Py_BuildValue("O(siLdOOOOLO)", restore_function, name_of(self->spec.kind), self->spec.axis,
                       static_cast<long long>(self->spec.groups), self->eps, self->training ? Py_True : Py_False,
                       self->x, self->weight, self->bias, static_cast<long long>(self->sets), self->owner);
}

// The cache that `reduce` took apart. What comes from a file may be anything: all that a backward relies on is checked.
PyObject* restore(PyObject*, PyObject* args) {
  const char* function;
  PyObject *axis, *groups, *training, *x_object, *weight, *bias, *owner;
  double eps;
  long long sets;
  if (!PyArg_ParseTuple(args, "sOOdO!OOOLO!", &function, &axis, &groups, &eps, &PyBool_Type, &training, &x_object,
                        &weight, &bias, &sets, &PyBytes_Type, &owner)) {
    return nullptr;
  }
  try {
    for (const Kind kind : {Kind::layer, Kind::rms, Kind::group, Kind::instance, Kind::batch}) {
      if (std::strcmp(function, name_of(kind)) != 0) continue;
      const Array x(x_object);
      Settings settings{{kind}, eps, 0, training == Py_True};
      if (!make_spec(kind, x, axis, groups, &settings.spec) || !(eps >= 0)) break;
      if (!optional_param(settings.spec, x, weight).accepted || !optional_param(settings.spec, x, bias).accepted) break;
      const Sizes sizes = sizes_of(settings.spec, x);
      settings.count = sizes.per_set;
      Statistics statistics;
      const bool batch = kind == Kind::batch;
      statistics.allocate(kind, sizes.sets, settings.training && x.dtype() == Dtype::float64,
                          batch && settings.training, false);
      const py::ssize_t bytes = PyBytes_GET_SIZE(statistics.owner.ptr());
      if (sets != sizes.sets || PyBytes_GET_SIZE(owner) != bytes) break;
      std::memcpy(PyBytes_AS_STRING(statistics.owner.ptr()), PyBytes_AS_STRING(owner), static_cast<size_t>(bytes));
      return make_cache(settings, x, weight, bias, statistics, sizes.sets).release().ptr();
    }
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  PyErr_Format(PyExc_ValueError, "the parts of a pickled %s cache do not fit each other", function);
  return nullptr;
}

constexpr const char* kCacheDoc = R"(What a norm's forward keeps for its backward: references, no copies. Read-only.

Can be copied and pickled; a pickle holds the arrays.

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

PyMemberDef members[] = {
    {"x", T_OBJECT_EX, offsetof(NormCache, x), READONLY, nullptr},
    {"weight", T_OBJECT_EX, offsetof(NormCache, weight), READONLY, nullptr},
    {"bias", T_OBJECT_EX, offsetof(NormCache, bias), READONLY, nullptr},
    {"eps", T_DOUBLE, offsetof(NormCache, eps), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(NormCache, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"mean", get_view<mean>, nullptr, nullptr, nullptr},
    {"rstd", get_view<rstd>, nullptr, nullptr, nullptr},
    {"batch_var", get_view<batch_var>, nullptr, nullptr, nullptr},
    {"function", get_function, nullptr, nullptr, nullptr},
    {"axis", get_axis, nullptr, nullptr, nullptr},
    {"channel_axis", get_channel_axis, nullptr, nullptr, nullptr},
    {"num_groups", get_num_groups, nullptr, nullptr, nullptr},
    {"training", get_training, nullptr, nullptr, nullptr},
    {"count", get_count, nullptr, nullptr, nullptr},
    {"intact", get_intact, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyMethodDef module_methods[] = {
    {"_restore_cache", restore, METH_VARARGS, "A pickled cache."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

py::object make_cache(const Settings& settings, const Array& x, py::handle weight, py::handle bias,
                      const Statistics& statistics, int64_t sets) {
  PyObject* object = cache_type->tp_alloc(cache_type, x.rank());
  if (object == nullptr) throw py::error_already_set();
  NormCache* self = self_of(object);
  self->x = owned(x.object().ptr());
  self->weight = owned(weight.ptr());
  self->bias = owned(bias.ptr());
  self->owner = owned(statistics.owner.ptr());
  self->mean = statistics.mean;
  self->mean_lo = statistics.mean_lo;
  self->var = statistics.var;
  self->rstd = statistics.rstd;
  self->rstd_lo = statistics.rstd_lo;
  self->eps = settings.eps;
  self->sets = sets;
  self->count = settings.count;
  self->spec = settings.spec;
  self->training = settings.training;
  self->dtype = x.dtype();
  std::copy(x.shape(), x.shape() + x.rank(), self->shape);
  return py::reinterpret_steal<py::object>(object);
}

const NormCache* as_cache(py::handle object) {
  return Py_TYPE(object.ptr()) == cache_type ? self_of(object.ptr()) : nullptr;
}

bool still_fits(const NormCache& cache) {
  const Array x(cache.x);
  if (!x.is_float() || x.dtype() != cache.dtype || x.rank() != Py_SIZE(&cache)) return false;
  if (!std::equal(x.shape(), x.shape() + x.rank(), cache.shape)) return false;
  for (PyObject* param : {cache.weight, cache.bias}) {
    if (param != Py_None && !is_param(cache.spec, x, Array(param))) return false;
  }
  return true;
}

void bind_cache(py::module_& m) {
  PyType_Slot slots[] = {
      {Py_tp_doc, const_cast<char*>(kCacheDoc)},
      {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
      {Py_tp_repr, reinterpret_cast<void*>(repr)},
      {Py_tp_members, members},
      {Py_tp_getset, properties},
      {Py_tp_methods, methods},
      {0, nullptr},
  };
  // The full name tells pickle and help() where the class is found.
  static const std::string name = m.attr("__name__").cast<std::string>() + ".NormCache";
  PyType_Spec spec{name.c_str(), offsetof(NormCache, shape), sizeof(py::ssize_t),
                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  cache_type = reinterpret_cast<PyTypeObject*>(type);
  m.attr("NormCache") = py::reinterpret_borrow<py::object>(type);
  if (PyModule_AddFunctions(m.ptr(), module_methods) != 0) throw py::error_already_set();
  restore_function = py::object(m.attr("_restore_cache")).release().ptr();
}

}  // namespace fastnorm
