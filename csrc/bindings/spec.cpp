// Roles and sizes of x's axes for each norm.
#include "spec.hpp"

#include "interpreter.hpp"

namespace fastnorm {

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

bool make_spec(Kind kind, const Array& x, py::handle axis_object, py::handle groups_object, Spec* to) {
  Spec spec{kind};
  int64_t axis = 0;
  if (!x.is_float() || !as_integer(axis_object, &axis)) return false;
  if (axis < 0) axis += x.rank();
  if (axis < 0 || axis >= x.rank()) return false;
  spec.axis = static_cast<int>(axis);
  if (!spec.by_row() && x.rank() < (kind == Kind::instance ? 3 : 2)) return false;
  if (kind == Kind::group) {
    const int64_t channels = x.size(spec.axis);
    if (!as_integer(groups_object, &spec.groups) || spec.groups < 1 || channels % spec.groups != 0) return false;
    // Of no channels there may be any number of groups, of nothing, in no sample.
    if (channels == 0 && (x.size(spec.batch_axis()) > 0 || spec.groups > INT32_MAX)) return false;
    if (x.rank() == kMaxRank) return false;  // the channel axis is split in two
  }
  *to = spec;
  return true;
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

void describe(const Spec& spec, const Array& x, PlanInput& in) {
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

}  // namespace fastnorm
