// How one normalisation lies in memory: plain counts and byte strides, made for a call, kept for the next ones
// like it (by the thread: it must not start another call while it uses a plan), and read by the kernels.
//
// Every axis of x has one of three roles. SET axes number the sets (a set is normalised together); PARAM axes lie
// inside a set and carry a weight and a bias of their own; REDUCE axes lie inside a set and share one.
//
//                    SET            PARAM           REDUCE
//   batch norm       C              -               N, spatial
//   instance norm    N, C           -               spatial
//   group norm       N, G           C/G             spatial
//   layer, RMS norm  leading        trailing        -
//
// Layouts are values here, not types: any strides, any order, any alignment. This file knows nothing of element types.
#pragma once

#include <cstdint>

namespace fastnorm {

constexpr int kMaxRank = 32;

// A walk in order over some axes of one array: byte strides, neighbouring axes merged where the memory allows it.
struct Walk {
  int rank = 0;
  int64_t count = 1;
  int64_t size[kMaxRank];
  int64_t stride[kMaxRank];

  // Adds an axis inside those already there. Axes of size 1 are left out.
  void push(int64_t axis_size, int64_t axis_stride) {
    count *= axis_size;
    if (axis_size == 1) return;
    if (rank > 0 && stride[rank - 1] == axis_size * axis_stride) {
      size[rank - 1] *= axis_size;
      stride[rank - 1] = axis_stride;
      return;
    }
    size[rank] = axis_size;
    stride[rank] = axis_stride;
    ++rank;
  }

  // Always inlined: the instruction-set levels must not share it.
  [[gnu::always_inline]] int64_t offset(int64_t index) const {
    if (rank == 1) return index * stride[0];
    int64_t sum = 0;
    for (int axis = rank - 1; axis >= 0; --axis) {
      sum += index % size[axis] * stride[axis];
      index /= size[axis];
    }
    return sum;
  }

  int64_t inner_size() const { return rank ? size[rank - 1] : 1; }
};

// One array of the call. `set`, `segment` and `element` walk the same axes, in the same order, for every operand.
struct Operand {
  char* data = nullptr;
  Walk set;
  Walk segment;
  Walk element;
  int64_t column_stride = 0;  // Family::column only
  bool aligned = true;        // every element lies at a multiple of its size
};

// Which axis runs along memory, and therefore which kernel reads it well.
enum class Family {
  channel,  // REDUCE runs along memory: a set is `segments` runs of `elements`, each with one weight
  row,      // PARAM runs along memory and there is no REDUCE axis: a set is one run of `elements`, a weight for each
  column,   // neighbouring values have weights of their own, and REDUCE axes lie outside: `columns` worked on together
};

// The fixed cut of a segment's elements into blocks: it depends on x's shape and layout alone, never on threads.
struct Blocks {
  int64_t total = 0;    // elements
  int64_t run = 1;      // blocks never cross a multiple of this
  int64_t per_run = 1;  // blocks in a run
  int64_t length = 1;   // elements in a block; the last of a run may have fewer
  int64_t count = 0;

  int64_t start(int64_t block) const { return block / per_run * run + block % per_run * length; }
  int64_t size(int64_t block) const {
    const int64_t first = start(block);
    int64_t end = first + length;
    const int64_t run_end = block / per_run * run + run;
    if (end > run_end) end = run_end;
    return (end > total ? total : end) - first;
  }
};

// A block of doubles is 8 KB: its second reading comes from the nearest cache, and a thread's stack holds several.
constexpr int64_t kBlock = 1024;
constexpr int64_t kSumLeaf = 128;   // divides kBlock
constexpr int64_t kShortRun = 512;  // shorter runs share a block
// Blocks in a chunk, which is what one thread takes of a set.
constexpr int64_t kChunkBlocks = 64;

// The fixed cut of `elements`, of which runs of `run` lie together.
Blocks cut_blocks(int64_t elements, int64_t run);

struct Plan {
  Family family = Family::row;
  int64_t sets = 1;     // SET walk; in Family::column without the column axis
  int64_t columns = 1;  // neighbouring values with weights of their own (Family::column), else 1
  int64_t columns_per_set = 1;
  int64_t segments = 1;        // per set
  int64_t elements = 1;        // per segment
  int64_t params = 1;          // length of weight and bias
  int64_t params_per_set = 1;  // PARAM axes' product
  Blocks blocks;               // of a segment
  Walk whole;                  // all elements of a set of x, for what does not care about segments: its moments
  Blocks whole_blocks;
  Walk set_param;            // set -> index of its first weight (strides count elements)
  Walk set_stat;             // set -> index of its statistics
  int64_t column_param = 0;  // the same two for the column axis
  int64_t column_stat = 0;
  Walk param_order;      // PARAM axes as x walks them -> index in C order
  Operand x, y, dy, dx;  // y: forward; dy, dx: backward
  bool dx_in_place() const { return dx.data == dy.data; }
  // From x to what is to be on its way to the caches when x is done, in bytes of either sign; 0: more of x.
  int64_t ahead = 0;
  // Are the arrays of the call too large for the caches? Or for those of a core alone, which leaves the last one? In
  // both cases loops ask for what they will touch for the first time (kAheadBytes, kNearestCacheBytes).
  bool far = false, in_last_cache = false;
  int threads = 1;

  // Sets these two, `bytes` being the size of the arrays together and `threads` known.
  void take_size(int64_t bytes, bool exceed_cache);

  int64_t set_size() const { return segments * elements; }
  int64_t all_sets() const { return sets * columns; }
  // Does x's memory walk the parameters in their C order?
  bool params_in_order() const {
    return param_order.rank == 0 || (param_order.rank == 1 && param_order.stride[0] == 1);
  }
};

enum class Role : uint8_t { set, param, reduce };

// What the bindings know of a call: the axes of x in C order with their roles, and each array's byte strides.
struct PlanInput {
  int rank = 0;
  int64_t size[kMaxRank];
  Role role[kMaxRank];
  bool set_owns_param[kMaxRank];  // a SET axis along which the weight changes (channels of batch norm, groups)
  int64_t set_stride[kMaxRank];   // of a SET axis in the numbering of the sets, which is that of the statistics
  int64_t itemsize = 4;
  bool centred = true;  // false (RMS norm): the column kernels, which subtract a mean, are not for this call
  struct Array {
    char* data = nullptr;
    int64_t stride[kMaxRank];
  } x, y, dy, dx;  // data == nullptr: not part of this call
};

Plan make_plan(const PlanInput& input);

// The same, kept by the calling thread until it asks for the next: calls in a row often are of one shape.
Plan& plan_of_call(const PlanInput& input);

}  // namespace fastnorm
