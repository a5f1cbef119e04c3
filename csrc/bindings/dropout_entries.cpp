// The common calls of dropout, recognised in some tens of nanoseconds. Every entry returns None for a call that it does
// not accept, before anything is written or drawn: the Python layer then explains or converts. A stream's offset is
// taken when nothing can fail any more.
#include "dropout.hpp"

namespace fastnorm {
namespace {

// Types and names of the Python layer, given once at import and kept for good.
PyObject *stream_type, *cache_type;
struct Names {
  PyObject* const seed = PyUnicode_InternFromString("seed");
  PyObject* const offset = PyUnicode_InternFromString("offset");
  PyObject* const own_seed = PyUnicode_InternFromString("_seed");
  PyObject* const own_offset = PyUnicode_InternFromString("_offset");
  PyObject* const function = PyUnicode_InternFromString("function");
  PyObject* const p = PyUnicode_InternFromString("p");
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const shared_axes = PyUnicode_InternFromString("shared_axes");
  PyObject* const scale = PyUnicode_InternFromString("scale");
  PyObject* const inverted = PyUnicode_InternFromString("inverted");
  PyObject* const classic = PyUnicode_InternFromString("classic");
};
const Names* names;

py::object owned_or_throw(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object attribute(PyObject* object, PyObject* name) { return owned_or_throw(PyObject_GetAttr(object, name)); }

// Around the frozen class's own refusal, as its constructor does.
void set_field(PyObject* object, PyObject* name, PyObject* value) {
  if (PyObject_GenericSetAttr(object, name, value) != 0) throw py::error_already_set();
}

// The seed and offset of this call; the stream moves on. No Python code runs between reading and writing, so that of
// the threads that share a stream each gets an offset of its own.
PhiloxStream take_from_stream(PyObject* stream) {
  const py::object seed = attribute(stream, names->own_seed), offset = attribute(stream, names->own_offset);
  PhiloxStream taken{};
  if (!as_word(seed, &taken.seed) || !as_word(offset, &taken.offset)) {
    throw py::value_error("a Philox stream without a seed and an offset of 64 bits");
  }
  const py::object next = owned_or_throw(PyLong_FromUnsignedLongLong(taken.offset + 1));
  if (PyObject_SetAttr(stream, names->own_offset, next.ptr()) != 0) throw py::error_already_set();
  return taken;
}

bool is_stream(py::handle object) { return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == stream_type; }

bool accepts_scale(py::handle object, bool* inverted) {
  *inverted = object.ptr() == names->inverted;
  return *inverted || object.ptr() == names->classic;
}

// A tuple of different axes, not negative, in rising order.
bool accepts_axes(py::handle object, int rank, SharedAxes* shared) {
  if (!PyTuple_CheckExact(object.ptr())) return false;
  int64_t last = -1;
  for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(object.ptr()); ++i) {
    int64_t axis;
    if (!as_integer(PyTuple_GET_ITEM(object.ptr(), i), &axis) || axis <= last || axis >= rank) return false;
    shared->add(static_cast<int>(last = axis));
  }
  return true;
}

bool accepts_out(py::handle object, const Array& x, bool in_place) {
  const Array out(object);
  if (!out.is_float() || out.dtype() != x.dtype() || !out.same_shape(x) || !out.writeable()) return false;
  return !out.may_overlap_itself() && (!out.may_overlap(x) || (in_place && out.same_view(x)));
}

py::object result_for(const Array& x, py::handle out) {
  return out.is_none() ? new_like(x) : py::reinterpret_borrow<py::object>(out);
}

struct Call {
  Array x;
  double p = 0;
  py::handle rng, axes, scale, out;
  SharedAxes shared;
  bool inverted = true;

  bool accepted(bool cached) {
    return !verifying() && x.is_float() && accepts_probability_of_call() && accepts_rng(rng) &&
           accepts_axes(axes, x.rank(), &shared) && accepts_scale(scale, &inverted) &&
           (out.is_none() || accepts_out(out, x, !cached));
  }
  bool accepts_probability_of_call() { return accepts_probability(p_object, &p); }
  py::handle p_object;
};

Call call_of(PyObject* const* args) {
  Call call;
  call.x = Array(args[0]);
  call.p_object = args[1];
  call.rng = args[2];
  call.axes = args[3];
  call.scale = args[4];
  call.out = args[5];
  return call;
}

// The empty cache and all of its fields that do not wait for the draws.
py::object cache_for(const Call& call, PyObject* function) {
  auto* const type = reinterpret_cast<PyTypeObject*>(cache_type);
  py::object cache = owned_or_throw(type->tp_alloc(type, 0));
  const py::object p = owned_or_throw(PyFloat_FromDouble(call.p));
  const py::object shape = owned_or_throw(PyTuple_New(call.x.rank()));
  for (int axis = 0; axis < call.x.rank(); ++axis) {
    PyObject* const extent = PyLong_FromLongLong(call.x.size(axis));
    if (extent == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(shape.ptr(), axis, extent);
  }
  set_field(cache.ptr(), names->function, function);
  set_field(cache.ptr(), names->p, p.ptr());
  set_field(cache.ptr(), names->shape, shape.ptr());
  set_field(cache.ptr(), names->dtype, call.x.dtype() == Dtype::float32 ? numpy.float32 : numpy.float64);
  set_field(cache.ptr(), names->shared_axes, call.axes.ptr());
  set_field(cache.ptr(), names->scale, call.scale.ptr());
  return cache;
}

// (x, p, rng, shared_axes, scale, out) -> y
PyObject* dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 6, args, [&](bool) -> py::object {
    Call call = call_of(args);
    if (!call.accepted(false)) return py::none();
    py::object y = result_for(call.x, call.out);
    run_dropout(Array(y), call.x, {take(call.rng), keep_threshold(call.p)}, call.shared, call.inverted,
                !call.out.is_none());
    return y;
  });
}

// (x, p, rng, shared_axes, scale, out, function) -> (y, cache)
PyObject* dropout_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 7, args, [&](bool) -> py::object {
    Call call = call_of(args);
    if (!call.accepted(true)) return py::none();
    py::object y = result_for(call.x, call.out);
    py::object cache = cache_for(call, args[6]);
    py::object result = owned_or_throw(PyTuple_Pack(2, y.ptr(), cache.ptr()));
    const PhiloxStream stream = take(call.rng);
    set_field(cache.ptr(), names->seed, owned_or_throw(PyLong_FromUnsignedLongLong(stream.seed)).ptr());
    set_field(cache.ptr(), names->offset, owned_or_throw(PyLong_FromUnsignedLongLong(stream.offset)).ptr());
    run_dropout(Array(y), call.x, {stream, keep_threshold(call.p)}, call.shared, call.inverted, !call.out.is_none());
    return result;
  });
}

// (dy, cache, out, function) -> dx
PyObject* dropout_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 4, args, [&](bool) -> py::object {
    PyObject* const cache = args[1];
    if (verifying() || reinterpret_cast<PyObject*>(Py_TYPE(cache)) != cache_type) return py::none();
    if (attribute(cache, names->function).ptr() != args[3]) return py::none();
    Call call;
    call.x = Array(args[0]);
    const py::object p = attribute(cache, names->p), axes = attribute(cache, names->shared_axes);
    const py::object scale = attribute(cache, names->scale), shape = attribute(cache, names->shape);
    const py::object dtype = attribute(cache, names->dtype);
    const py::object seed = attribute(cache, names->seed), offset = attribute(cache, names->offset);
    PhiloxStream stream{};
    if (!call.x.is_float() || !accepts_probability(p, &call.p) || !accepts_axes(axes, call.x.rank(), &call.shared) ||
        !accepts_scale(scale, &call.inverted) || !as_word(seed, &stream.seed) || !as_word(offset, &stream.offset)) {
      return py::none();
    }
    if (dtype.ptr() != (call.x.dtype() == Dtype::float32 ? numpy.float32 : numpy.float64)) return py::none();
    if (!PyTuple_CheckExact(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != call.x.rank()) return py::none();
    for (int axis = 0; axis < call.x.rank(); ++axis) {
      int64_t extent;
      if (!as_integer(PyTuple_GET_ITEM(shape.ptr(), axis), &extent) || extent != call.x.size(axis)) return py::none();
    }
    if (args[2] != Py_None && !accepts_out(args[2], call.x, true)) return py::none();
    py::object dx = result_for(call.x, args[2]);
    run_dropout(Array(dx), call.x, {stream, keep_threshold(call.p)}, call.shared, call.inverted, args[2] != Py_None);
    return dx;
  });
}

// (stream,) -> (seed, offset)
PyObject* take_offset(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 1, args, [&](bool) -> py::object {
    const PhiloxStream stream = take_from_stream(args[0]);
    const py::object seed = owned_or_throw(PyLong_FromUnsignedLongLong(stream.seed));
    const py::object offset = owned_or_throw(PyLong_FromUnsignedLongLong(stream.offset));
    return owned_or_throw(PyTuple_Pack(2, seed.ptr(), offset.ptr()));
  });
}

PyMethodDef entries[] = {
    method("dropout", dropout, "y, or None for a call that is not the common one."),
    method("dropout_forward", dropout_forward, "(y, cache), or None for a call that is not the common one."),
    method("dropout_backward", dropout_backward, "dx, or None for a call that is not the common one."),
    method("take_offset", take_offset, "(seed, offset) of a stream, which moves on."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool as_word(py::handle object, uint64_t* value) {
  if (!PyLong_CheckExact(object.ptr())) return false;
  *value = PyLong_AsUnsignedLongLong(object.ptr());
  if (*value == UINT64_MAX && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

bool accepts_rng(py::handle rng) {
  uint64_t seed;
  return is_stream(rng) || as_word(rng, &seed);
}

PhiloxStream take(py::handle rng) {
  if (is_stream(rng)) return take_from_stream(rng.ptr());
  PhiloxStream stream{};
  as_word(rng, &stream.seed);
  return stream;
}

bool accepts_probability(py::handle object, double* p) {
  return !PyBool_Check(object.ptr()) && as_number(object, p) && *p >= 0.0 && *p <= 1.0;
}

void bind_dropout_entries(py::module_& m) {
  names = new Names;  // never freed: calls may come until the interpreter's very end
  if (PyModule_AddFunctions(m.ptr(), entries) != 0) throw py::error_already_set();
  m.def(
      "set_stream_type", [](const py::type& type) { stream_type = py::object(type).release().ptr(); }, py::arg("type"),
      "The class of random streams.");
  m.def(
      "set_dropout_cache_type", [](const py::type& type) { cache_type = py::object(type).release().ptr(); },
      py::arg("type"), "The class of what dropout_forward keeps.");
}

}  // namespace fastnorm
