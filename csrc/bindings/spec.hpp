// What a call normalises over: which axes of x number the sets, which carry parameters, which are reduced, and how many
// of each there are. Says nothing of the arrays' contents and raises nothing: what does not fit is declined.
#pragma once

#include "arrays.hpp"

namespace fastnorm {

enum class Kind { layer, rms, group, instance, batch };

const char* name_of(Kind kind);

// What a call normalises over. `axis` is the first normalised axis (layer, rms) or the channel axis.
struct Spec {
  Kind kind;
  int axis = 0;
  int64_t groups = 1;

  bool by_row() const { return kind == Kind::layer || kind == Kind::rms; }
  int batch_axis() const { return axis == 0 ? 1 : 0; }
};

// False for an axis or a number of groups that x does not have.
bool make_spec(Kind kind, const Array& x, py::handle axis, py::handle groups, Spec* to);

// Does `param` have the shape and dtype of a weight or bias of x?
bool is_param(const Spec& spec, const Array& x, const Array& param);

struct Sizes {
  int64_t sets = 1;     // sets normalised
  int64_t per_set = 1;  // values in each
  int64_t batch = 1;    // sets for a row norm, batch size otherwise
  int64_t total = 1;
};

Sizes sizes_of(const Spec& spec, const Array& x);

// Nothing to normalise in a batch of something: there are no statistics to give.
inline bool has_empty_sets(const Sizes& sizes) { return sizes.batch > 0 && sizes.sets > 0 && sizes.per_set == 0; }

// Sets are numbered in C order, samples before channels or groups wherever the channel axis is.
void number_sets(PlanInput& in);

// The roles of x's axes, and where each array of x's shape lies.
void describe(const Spec& spec, const Array& x, PlanInput& in);
void place(const Spec& spec, const Array& array, PlanInput::Array& to);

}  // namespace fastnorm
