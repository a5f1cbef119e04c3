// How the kernels of the set families (channel_norm.hpp, row_norm.hpp) come to their values: the runs of one unit of
// work, in place where the arrays allow it, block by block through buffers where they do not. A set is cut into units,
// segments x chunks of kChunkBlocks blocks, which threads may share.
#pragma once

#include <initializer_list>

#include "isa/places.hpp"
#include "isa/walk_io.hpp"

namespace fastnorm {
namespace {

inline int64_t chunks_per_segment(const Plan& plan) { return (plan.blocks.count + kChunkBlocks - 1) / kChunkBlocks; }
inline int64_t units_per_set(const Plan& plan) { return plan.segments * chunks_per_segment(plan); }
inline int64_t segment_of(const Plan& plan, int64_t unit) { return unit / chunks_per_segment(plan); }

// Work goes to threads set by set (a set's second reading then comes from cache) unless there are too few sets for
// that.
inline bool split_sets(const Plan& plan) {
  return plan.threads > 1 && plan.sets < 2 * plan.threads && units_per_set(plan) > 1;
}

// How far ahead a first reading asks for its values: the processor's own prefetching stops at every page and every
// jump. Not so far where the caches hold the arrays of the call: it took 5 to 30 % of the time there (layer norm of
// float32 rows of 1024: 4 MB 132 us, 96 without).
constexpr int64_t kAheadBytes = 8192;

// What the caches do hold is asked for in places where sets are read in the order of memory, a few lines ahead: where
// it comes from the last cache this saves 3 to 15 % of a call (instance norm 14 x 14: 48 us to 43; float64 rows of 30:
// 143 to 130), where from a nearer one it costs nothing. (1024 and 2048 bytes do the same there; where other work has
// pushed the arrays out of the last cache too, 2048 took 5 to 10 % longer.)
constexpr int64_t kNearAheadBytes = 4096;

// Where only the last cache is large enough for the arrays (Plan::in_last_cache), results are asked for as well: a loop
// that reads some sets and then writes them would wait for loads in one half and for stores in the other. So results
// are asked for while their sets are read, and the next sets while results are written, or both a few lines ahead where
// one loop does both. A call that is repeated at once gains little, one that comes after others have used the caches 10
// to 25 % (layer norm of 4096 x 100 float64: 189 us to 145, RMS norm 191 to 139, its backward 280 to 217).
//
// This has to have room in the nearest cache: what a batch reads and writes, and what the next one will read.
constexpr int64_t kNearestCacheBytes = 48 << 10;

// Float32 sets from this length on, of one line, are asked for, and their results: rows of 30 take 2 to 4 % longer for
// it, and sets of several lines (batch norm) gain nothing, however far ahead.
constexpr int64_t kAskedRun = 4 * kPack;

// Do the sets of an operand, of `bytes` each, follow each other? Where they do not, what lies some bytes ahead may be
// nothing of theirs.
inline bool follow_each_other(const Operand& operand, int64_t bytes) {
  return operand.set.rank == 0 || (operand.set.rank == 1 && operand.set.stride[0] == bytes);
}

// The distance for what they do not hold along an operand, in bytes; 0 if they do.
template <class T>
inline int64_t reading_ahead(const Plan& plan, const Operand& operand, int64_t run) {
  if (plan.ahead != 0) return plan.ahead;
  if (run == 0 || !plan.far) return 0;
  const int64_t run_bytes = run * static_cast<int64_t>(sizeof(T));
  if (run_bytes >= kAheadBytes || operand.element.rank < 2) return kAheadBytes;
  return (kAheadBytes + run_bytes - 1) / run_bytes * operand.element.stride[0];
}

struct Range {
  int64_t begin, end;
};

// The elements of a unit in its segment.
inline Range unit_elements(const Plan& plan, int64_t unit) {
  const Blocks& blocks = plan.blocks;
  const int64_t first = unit % chunks_per_segment(plan) * kChunkBlocks;
  const int64_t last = (first + kChunkBlocks < blocks.count ? first + kChunkBlocks : blocks.count) - 1;
  return {blocks.start(first), blocks.start(last) + blocks.size(last)};
}

// The length of the contiguous runs that all the operands of a call share, 0 if they share none.
template <class T>
inline int64_t shared_run(const Plan& plan, std::initializer_list<const Operand*> operands) {
  int64_t run = plan.elements;
  for (const Operand* operand : operands) {
    const Walk& walk = operand->element;
    if (!operand->aligned || walk.rank > 2) return 0;
    if (walk.rank == 0) continue;
    if (walk.stride[walk.rank - 1] != static_cast<int64_t>(sizeof(T))) return 0;
    if (walk.inner_size() < run) run = walk.inner_size();
  }
  for (const Operand* operand : operands) {
    if (operand->element.rank == 2 && operand->element.inner_size() != run) return 0;
  }
  return run;
}

// From one to the next along the innermost axis of a walk.
inline int64_t inner_stride(const Walk& walk) { return walk.rank > 0 ? walk.stride[walk.rank - 1] : 0; }

// From run to run of a segment, in bytes.
template <class T>
inline int64_t run_step(const Operand& operand, int64_t run) {
  return operand.element.rank == 2 ? operand.element.stride[0] : run * static_cast<int64_t>(sizeof(T));
}

// One operand of one segment, seen as runs of equal length.
template <class T>
class Line {
 public:
  Line() = default;
  Line(const Operand& operand, int64_t set, int64_t segment, int64_t run)
      : base_(operand.data + operand.set.offset(set) + operand.segment.offset(segment)),
        step_(run_step<T>(operand, run)) {}
  T* at(int64_t run, int64_t offset) const { return reinterpret_cast<T*>(base_ + run * step_) + offset; }

 private:
  char* base_;
  int64_t step_;
};

// All segments of a set of an operand, which lie at equal distances, seen the same way: for loops over short segments.
template <class T>
struct SegmentLines {
  char* base;
  int64_t segment_step, line_step;  // in bytes

  SegmentLines(const Operand& operand, int64_t set, int64_t run)
      : base(operand.data + operand.set.offset(set)),
        segment_step(inner_stride(operand.segment)),
        line_step(run_step<T>(operand, run)) {}
};

// visit(run, offset, first, n) for the runs of [begin, end), cut at multiples of `piece`.
template <class Visit>
inline void for_runs(Range range, int64_t length, int64_t piece, const Visit& visit) {
  int64_t run = range.begin / length, offset = range.begin % length;
  for (int64_t first = range.begin; first < range.end;) {
    const int64_t room = length - offset, left = range.end - first, uncut = piece - offset % piece;
    int64_t n = room < left ? room : left;
    if (uncut < n) n = uncut;
    visit(run, offset, first, n);
    first += n;
    offset += n;
    if (offset == length) ++run, offset = 0;
  }
}

// Where float64 sums are cut into leaves must not depend on how the values are come by: no longer pieces than a
// buffer's.
template <class T>
inline int64_t longest_piece(const Plan& plan) {
  return sizeof(T) == sizeof(double) ? plan.blocks.length : plan.elements;
}

// Which operands a visit touches: inputs, then the output if it has one.
template <int kInputs, bool kOutput>
struct Operands {
  const Operand* in[kInputs];
  const Operand* out;
};

template <class T, int kInputs, bool kOutput, class Body>
[[gnu::noinline]] void visit_buffered(const Plan& plan, const Operands<kInputs, kOutput>& operands, int64_t set,
                                      int64_t unit, const Body& body) {
  alignas(64) T buffers[kInputs + kOutput][kBlock];
  const int64_t segment = segment_of(plan, unit);
  const auto port = [&](const Operand& operand) {
    return Port<T>(operand.data + operand.set.offset(set) + operand.segment.offset(segment), operand.element,
                   operand.aligned);
  };
  const int64_t begin = unit % chunks_per_segment(plan) * kChunkBlocks;
  const int64_t end = begin + kChunkBlocks < plan.blocks.count ? begin + kChunkBlocks : plan.blocks.count;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = plan.blocks.start(block), n = plan.blocks.size(block);
    const T* in[kInputs];
    for (int k = 0; k < kInputs; ++k) in[k] = port(*operands.in[k]).read(start, n, buffers[k]);
    T* to = nullptr;
    if constexpr (kOutput) to = port(*operands.out).open(start, n, buffers[kInputs]);
    // Short runs share a block: one after the other, as they are visited where they lie.
    const int64_t inner = plan.x.element.inner_size(), run = inner < n ? inner : n;
    for (int64_t done = 0; done < n; done += run) {
      const T* from[kInputs];
      for (int k = 0; k < kInputs; ++k) from[k] = in[k] + done;
      body(from, kOutput ? to + done : nullptr, start + done, run < n - done ? run : n - done);
    }
    if constexpr (kOutput) port(*operands.out).commit(start, n, buffers[kInputs], to);
  }
}

// body(inputs, output, first, n) along one unit; `run` is what shared_run gave for these operands.
template <class T, int kInputs, bool kOutput, class Body>
inline void visit_unit(const Plan& plan, const Operands<kInputs, kOutput>& operands, int64_t run, int64_t set,
                       int64_t unit, const Body& body) {
  if (run == 0) return visit_buffered<T>(plan, operands, set, unit, body);
  const int64_t segment = segment_of(plan, unit);
  Line<T> in[kInputs], out;
  for (int k = 0; k < kInputs; ++k) in[k] = Line<T>(*operands.in[k], set, segment, run);
  if constexpr (kOutput) out = Line<T>(*operands.out, set, segment, run);
  for_runs(unit_elements(plan, unit), run, longest_piece<T>(plan),
           [&](int64_t line, int64_t offset, int64_t first, int64_t n) {
             const T* from[kInputs];
             for (int k = 0; k < kInputs; ++k) from[k] = in[k].at(line, offset);
             body(from, kOutput ? out.at(line, offset) : nullptr, first, n);
           });
}

}  // namespace
}  // namespace fastnorm
