// The arrays of a call beside x: parameters, running statistics, the caller's `out`. Accepts or declines them, and lays
// parameters out as the kernels read them. Writes to nothing but its own buffers.
#pragma once

#include <memory>
#include <type_traits>

#include "spec.hpp"

namespace fastnorm {

// An optional array argument: absent (None), accepted, or a reason to decline the call.
struct Optional {
  Array array;
  bool given = false, accepted = true;
};

inline Optional optional_param(const Spec& spec, const Array& x, py::handle object) {
  Optional param;
  if (object.is_none()) return param;
  param.array = Array(object);
  param.given = true;
  param.accepted = is_param(spec, x, param.array);
  return param;
}

// A 1-D float32 or float64 array of one value per channel: statistics may be kept more precisely than x.
inline Optional optional_channels(const Spec& spec, const Array& x, py::handle object) {
  Optional channels;
  if (object.is_none()) return channels;
  channels.array = Array(object);
  channels.given = true;
  const Array& a = channels.array;
  channels.accepted = a.is_float() && (a.dtype() == x.dtype() || a.dtype() == Dtype::float64) && a.rank() == 1 &&
                      a.size(0) == x.size(spec.axis);
  return channels;
}

enum class InPlace { allowed, refused };

// Is `out` fit for the result of a call on x? The same view as x is fine where in_place allows it.
inline bool accepts_out(const Array& x, py::handle out_object, InPlace in_place, bool checked,
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

inline double load(const Array& a, int64_t i) {
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

// All numbers of an array of rank 1. (A constant stride makes vectors of them.)
inline void load_all(const Array& a, double* to) {
  const auto along = [&](auto value, auto stride) {
    const char* const from = a.data();
    for (int64_t i = 0, count = a.size(0); i < count; ++i) {
      std::memcpy(&value, from + i * stride, sizeof value);
      to[i] = static_cast<double>(value);
    }
  };
  const auto of_type = [&](auto value) {
    constexpr std::integral_constant<int64_t, sizeof value> neighbours{};
    a.stride(0) == neighbours ? along(value, neighbours) : along(value, a.stride(0));
  };
  a.dtype() == Dtype::float64 ? of_type(double{}) : of_type(float{});
}

inline void store(const Array& a, int64_t i, double value) {
  char* to = a.data() + i * a.stride(0);
  if (a.dtype() == Dtype::float64) {
    std::memcpy(to, &value, sizeof value);
  } else {
    const float rounded = static_cast<float>(value);
    std::memcpy(to, &rounded, sizeof rounded);
  }
}

// Room for a call's own numbers, on the stack while they are few; undefined values.
template <class T, int64_t kLocal>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count <= kLocal) return local_;
    heap_.reset(new T[static_cast<size_t>(count)]);
    return heap_.get();
  }

 private:
  T local_[kLocal];
  std::unique_ptr<T[]> heap_;
};

// Index in C order of the parameter that comes i-th where x's memory walks them.
inline int64_t c_index(const Plan& plan, int64_t i) {
  const int64_t per_set = plan.params_per_set;
  return i / per_set * per_set + plan.param_order.offset(i % per_set);
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
    T* to = buffer_.reserve(plan.params);
    for (int64_t i = 0; i < plan.params; ++i) std::memcpy(&to[i], a.data() + walk.offset(c_index(plan, i)), sizeof(T));
    values_ = to;
  }
  const T* get() const { return values_; }

 private:
  const T* values_ = nullptr;
  Scratch<T, 64> buffer_;
};

}  // namespace fastnorm
