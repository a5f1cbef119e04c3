// The norms' entries in the module's method table.
#include "interpreter.hpp"
#include "norm_cache.hpp"
#include "norm_entries.hpp"

namespace fastnorm {
namespace {

template <Kind kind, bool want_cache>
PyObject* by_axis(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 6, args, [&](bool checked) {
    const ForwardCall call{args[0], args[1], args[2], args[3], Py_None, args[4], args[5]};
    return forward(kind, want_cache, call, checked);
  });
}

template <bool want_cache>
PyObject* group(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 7, args, [&](bool checked) {
    const ForwardCall call{args[0], args[2], args[3], args[4], args[1], args[5], args[6]};
    return forward(Kind::group, want_cache, call, checked);
  });
}

PyObject* batch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 8, args, [&](bool checked) {
    const BatchNormCall call{args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7]};
    return batch_norm(call, checked);
  });
}

PyObject* batch_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 10, args, [&](bool checked) {
    const BatchNormCall call{args[0], args[3], args[4], args[1], args[2], args[6], args[7], args[9]};
    return batch_norm_forward(call, args[5], args[8], checked);
  });
}

template <Kind kind>
PyObject* gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 3, args, [&](bool checked) { return backward(kind, args[0], args[1], args[2], checked); });
}

// The first line of each text is the signature that help() shows.
#define FASTNORM_BY_AXIS(name, axis, result) \
  name "(x, weight, bias, " axis ", eps, out, checked=False, /)\n--\n\n" result ", or None for a call declined."
#define FASTNORM_GRADIENTS(name) \
  name "_norm_backward(dy, cache, out, checked=False, /)\n--\n\nNormGrads, or None for a call declined."

PyMethodDef methods[] = {
    method("layer_norm", by_axis<Kind::layer, false>, FASTNORM_BY_AXIS("layer_norm", "axis", "y")),
    method("layer_norm_forward", by_axis<Kind::layer, true>,
           FASTNORM_BY_AXIS("layer_norm_forward", "axis", "(y, cache)")),
    method("layer_norm_backward", gradients<Kind::layer>, FASTNORM_GRADIENTS("layer")),
    method("rms_norm", by_axis<Kind::rms, false>, FASTNORM_BY_AXIS("rms_norm", "axis", "y")),
    method("rms_norm_forward", by_axis<Kind::rms, true>, FASTNORM_BY_AXIS("rms_norm_forward", "axis", "(y, cache)")),
    method("rms_norm_backward", gradients<Kind::rms>, FASTNORM_GRADIENTS("rms")),
    method("instance_norm", by_axis<Kind::instance, false>, FASTNORM_BY_AXIS("instance_norm", "channel_axis", "y")),
    method("instance_norm_forward", by_axis<Kind::instance, true>,
           FASTNORM_BY_AXIS("instance_norm_forward", "channel_axis", "(y, cache)")),
    method("instance_norm_backward", gradients<Kind::instance>, FASTNORM_GRADIENTS("instance")),
    method("group_norm", group<false>,
           "group_norm(x, num_groups, weight, bias, channel_axis, eps, out, checked=False, /)\n--\n\n"
           "y, or None for a call declined."),
    method("group_norm_forward", group<true>,
           "group_norm_forward(x, num_groups, weight, bias, channel_axis, eps, out, checked=False, /)\n--\n\n"
           "(y, cache), or None for a call declined."),
    method("group_norm_backward", gradients<Kind::group>, FASTNORM_GRADIENTS("group")),
    method("batch_norm", batch,
           "batch_norm(x, mean, var, weight, bias, channel_axis, eps, out, checked=False, /)\n--\n\n"
           "y, or None for a call declined."),
    method("batch_norm_forward", batch_forward,
           "batch_norm_forward(x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, training, out,"
           " checked=False, /)\n--\n\n(y, cache), or None for a call declined."),
    method("batch_norm_backward", gradients<Kind::batch>, FASTNORM_GRADIENTS("batch")),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_norm(py::module_& m) {
  numpy.load();
  bind_cache(m);
  bind_backward(m);
  bind_moments(m);
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastnorm
