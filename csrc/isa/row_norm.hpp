// Backward where the weights run along the set, one per value (layer norm, RMS norm). The gradients of the parameters
// are sums over sets: each group of sets adds into rows of its own, and those are added in order, so that the cut
// depends on the shape alone.
//
// Rows go through row_tiles.hpp (float32) or double_rows.hpp (float64), some at a time: a first reading gives the sums,
// the second, from cache, writes dx. All others, very long ones and those whose statistics or gradients are beyond what
// these compute with, are summed up one by one in double.
#pragma once

#include "isa/channel_norm.hpp"
#include "isa/double_rows.hpp"

namespace fastnorm {
namespace {

// Sets in a group, which only has to leave something to do for every thread; and in a part of a group, whose sums are
// plain additions: float64 has no digits to spare for long chains of them, the tiles of float32 rows are added in
// double.
struct SetGroups {
  int64_t group, part;

  template <class T>
  static SetGroups of(const Plan& plan) {
    constexpr int64_t kLeast = kMayOverflow<T> ? 16 : 64, kGroups = 64;
    const int64_t sharing = plan.params / plan.params_per_set, sets_of_one = kMayOverflow<T> ? sharing : 1;
    const int64_t share = (plan.sets / sets_of_one + kGroups - 1) / kGroups;
    SetGroups sets{share <= kLeast ? kLeast : (share + kColumnRows - 1) / kColumnRows * kColumnRows, 0};
    if (kMayOverflow<T>) sets.group = units_per_set(plan) > 1 ? kLeast : (sets.group + kLeast - 1) / kLeast * kLeast;
    sets.group *= sharing;
    sets.part = kMayOverflow<T> ? kLeast * sharing : sets.group;
    return sets;
  }
};

// call(weight) with the weights from parameter `first` on.
template <class T, class Call>
inline void with_weight(const T* weight, int64_t first, const Call& call) {
  if (weight) {
    call(Each<T>{weight + first});
  } else {
    call(None{});
  }
}

// How rows of a type are read some at a time.
template <class T>
struct RowKernels;

// Float32 rows: as many side by side as the nearest cache holds until their dx is written (512 x 1024 by twos: 125 us
// instead of 121), and more before any dx is where they are short (4096 x 100: 128 us by fours, 119 by sixteens; 16384
// x 256: 1610 by fours, 1480 by eights; 1024 x 400: 94 by fours, 99).
template <>
struct RowKernels<float> {
  using Rows = TiledRows;
  template <bool kCentred, bool kParams>
  using Tiles = RowTiles<kCentred, kParams>;

  static bool suit(int64_t elements) { return elements >= kPack && elements <= kBlock * kChunkBlocks; }
  static int side_by_side(int64_t elements) { return elements <= 1280 ? kMostRows : 2; }
  // near: is dx not asked for? Else there has to be room for it, and for the next rows (kNearestCacheBytes).
  static int together(int64_t elements, bool near) {
    return elements <= (near ? 200 : 150) ? Rows::kMost : elements <= 256 ? 8 : side_by_side(elements);
  }
  static bool asked(int64_t) { return false; }
  static bool suits(float weight) { return tile_weight(weight); }
};

// Float64 rows: up to a length whose copies, where a row is not in one piece, are no great need of memory.
template <>
struct RowKernels<double> {
  using Rows = DoubleRows;
  template <bool kCentred, bool kParams>
  using Tiles = DoubleRowTiles<kCentred, kParams>;

  static bool suit(int64_t elements) { return elements <= kLongestDoubleRow; }
  static int side_by_side(int64_t) { return kMostRows; }
  static int together(int64_t elements, bool near) {
    const int64_t most = near ? 2048 : 1024;
    return elements * Rows::kMost <= most ? Rows::kMost : elements * 8 <= most ? 8 : kMostRows;
  }
  // Are the next rows asked for even where the caches hold them? (Rows of 30: 5 to 10 % less time; of 16, and from 64
  // on, up to 5 % more.)
  static bool asked(int64_t elements) { return elements > kPack && elements < 4 * kPack; }
  static bool suits(double) { return true; }
};

template <class T>
class RowBackward {
  using Kernels = RowKernels<T>;
  using Rows = typename Kernels::Rows;
  template <bool kCentred, bool kParams>
  using Tiles = typename Kernels::template Tiles<kCentred, kParams>;

 public:
  // `weight`: args.weight, or ones where that is not given and parameters' gradients are wanted; zeros after it.
  RowBackward(const Plan& plan, const NormArgs<T>& args, const T* weight)
      : plan_(plan),
        args_(args),
        weight_(weight),
        run_(shared_run<T>(plan, {&plan.x, &plan.dy, &plan.dx})),
        units_(units_per_set(plan)) {
    if (plan.params != plan.params_per_set) return;
    plain_weights_ = plain_weights(0);
    if (!Kernels::suit(plan.elements) || !tile_weights()) return;
    group_ = Kernels::side_by_side(plan.elements);
    together_ = Kernels::together(plan.elements, !plan.in_last_cache);
    in_place_ = run_ == plan.elements;
    in_order_ = contiguous(plan.set_stat);
    // The next rows, while the gradients of these are written: those that are read when all of these are (65536 x 100:
    // 5.7 ms to 3.6). Short rows from memory are asked for once: twice, and held back, they took 3 to 20 % longer.
    const bool twice = args.from_memory && together_ < Rows::kMost;
    const int64_t row = plan.elements * static_cast<int64_t>(sizeof(T)), bytes = together_ * row;
    constexpr int kOperands = 5;  // x, dy, dx; x and dy of the next rows
    ahead_.results = plan.in_last_cache && !args.past_cache && in_place_ && kOperands * bytes <= kNearestCacheBytes &&
                     follow_each_other(plan.x, row) && follow_each_other(plan.dy, row);
    const bool next_rows = ahead_.results || Kernels::asked(plan.elements) || reading_ahead<T>(plan, plan.x, run_) != 0;
    if (in_place_ && (twice || next_rows)) {
      ahead_.written = bytes;
      if (twice) ahead_.summed = 2 * ahead_.written;
    }
  }

  // Room that `sets` needs for rows that do not lie in one piece: the bits must not depend on where a row lies.
  int64_t copied() const { return together_ == 0 || in_place_ ? 0 : (2 * together_ + 1) * plan_.elements; }

  Statistic statistic(int64_t set) const { return kept_statistic(plan_, args_, set); }

  // Sets [begin, end), which are of one group; `params` nullptr: no gradients of parameters wanted.
  void sets(int64_t begin, int64_t end, const ParameterSums* params, T* copies) const {
    if (together_ > 0) {
      if (args_.centred) {
        params ? tiles<true, true>(begin, end, params, copies) : tiles<true, false>(begin, end, params, copies);
      } else {
        params ? tiles<false, true>(begin, end, params, copies) : tiles<false, false>(begin, end, params, copies);
      }
      return;
    }
    for (int64_t set = begin; set < end; ++set) set_in_double(set, statistic(set), params);
  }

  SegmentSums sums(int64_t set, int64_t unit, const Statistic& s) const {
    SegmentSums total;
    const T* weight = args_.weight ? args_.weight + plan_.set_param.offset(set) : nullptr;
    with_weight(weight, 0, [&](auto) {
      if (weight) {
        total = unit_sums<T>(plan_, run_, set, unit, s, [=](int64_t first) { return Each<T>{weight + first}; });
      } else {
        total = unit_sums<T>(plan_, run_, set, unit, s, [](int64_t) { return None{}; });
      }
    });
    return total;
  }

  // What x - mean adds up to belongs to the mean.
  Statistic centre(const Statistic& s, SegmentSums& total) const {
    Statistic centred = s;
    const double rest = total.rest.value();
    const bool any = rest != 0 && std::fabs(rest) < HUGE_VAL;
    if (!kMayOverflow<T> || !args_.centred || !any) return centred;
    const double off = rest / static_cast<double>(plan_.elements);
    total.dy_xhat.add(-off * s.rstd * total.dy.value());
    centred.mean_lo += off;
    return centred;
  }

  // One unit's part of the parameters' gradients. A unit is a range of parameters: units of a set share none.
  void parameters(int64_t set, int64_t unit, const Statistic& s, ParameterSums params) const {
    const int64_t param = plan_.set_param.offset(set);
    const Operands<2, false> operands{{&plan_.x, &plan_.dy}, nullptr};
    visit_unit<T>(plan_, operands, run_, set, unit, [&](const T* const* in, T*, int64_t first, int64_t n) {
      add_parameter_gradients(in[0], in[1], n, s, params.from(param + first));
    });
  }

  void gradient(int64_t set, int64_t unit, const Statistic& s, const SegmentSums& total) const {
    const GradientMeans means = means_of(set, s, total);
    const T* weight = args_.weight ? args_.weight + plan_.set_param.offset(set) : nullptr;
    const Operands<2, true> operands{{&plan_.x, &plan_.dy}, &plan_.dx};
    visit_unit<T>(plan_, operands, run_, set, unit, [&](const T* const* in, T* dx, int64_t first, int64_t n) {
      with_weight(weight, first, [&](auto w) { write(in[0], in[1], dx, n, s, means, w, args_.past_cache); });
    });
  }

 private:
  // Are the weights from `param` on such that float32 does? (Those of a set alone: others must not change its bits.)
  bool plain_weights(int64_t param) const {
    if (kMayOverflow<T> || !args_.weight) return true;
    const T* const weight = args_.weight + param;
    int beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t p = 0; p < plan_.params_per_set; ++p) beyond |= moderate(static_cast<double>(weight[p])) ? 0 : 1;
    return beyond == 0;
  }

  GradientMeans means_of(int64_t set, const Statistic& s, const SegmentSums& total) const {
    const bool plain_weights_here =
        plan_.params == plan_.params_per_set ? plain_weights_ : plain_weights(plan_.set_param.offset(set));
    GradientMeans means = GradientMeans::of<T>(total.dy, total.dy_xhat, total.size, static_cast<double>(plan_.elements),
                                               args_.centred, plain_weights_here, s);
    // Without a mean of g there are values of dx that are a product with x alone, which float32 may lose.
    means.plain = means.plain && args_.centred;
    return means;
  }

  template <class Weight>
  FASTNORM_LOOPS static void write(const T* x, const T* dy, T* dx, int64_t n, const Statistic& s,
                                   const GradientMeans& means, Weight weight, bool past_cache) {
    const auto along = [&](const auto& gradient) {
      for_stored_packs(past_cache, dx, n, [&](auto at, auto out) { out.store(at, dx, gradient(at, x, dy)); });
    };
    if constexpr (!kMayOverflow<T>) {
      if (means.plain) return along(InputGradient<T, T, Weight>(s, means.a, means.b, weight));
    }
    along(InputGradient<T, double, Weight>(s, means.a, means.b, weight));
  }

  // One set after the other, each value of it in double (or dx alone in float32, where means_of says so).
  [[gnu::noinline]] void set_in_double(int64_t set, const Statistic& s, const ParameterSums* params) const {
    SegmentSums total;
    for (int64_t unit = 0; unit < units_; ++unit) total.add(sums(set, unit, s));
    const Statistic centred = centre(s, total);
    for (int64_t unit = 0; unit < units_; ++unit) {
      if (params) parameters(set, unit, centred, *params);
      gradient(set, unit, centred, total);
    }
  }

  bool tile_weights() const {
    if (!args_.weight) return true;
    const T* const weight = args_.weight;
    int wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (int64_t p = 0; p < plan_.params; ++p) wrong |= Kernels::suits(weight[p]) ? 0 : 1;
    return wrong == 0;
  }

  template <bool kCentred, bool kParams>
  void tiles(int64_t begin, int64_t end, const ParameterSums* params, T* copies) const {
    Tiles<kCentred, kParams> tiles(plan_.elements, weight_, kParams ? *params : ParameterSums{}, ahead_);
    const int batch = in_place_ ? Rows::kMost : together_;
    for (int64_t set = begin; set < end; set += batch) {
      Rows rows;
      const int count = static_cast<int>(end - set < batch ? end - set : batch);
      give_rows(rows, set, count, copies);
      const bool fit = rows.start(count, args_.eps);
      for (int r = 0; r < count; r += together_) {
        const int size = count - r < together_ ? count - r : together_;
        write_rows(tiles, rows, set, r, size, fit, params, copies);
      }
    }
    tiles.finish();
  }

  // Rows [first, first + count) of those from `set` on, by tiles where that will do: the sums of all groups, which a
  // group's results then need not wait for, and dx.
  template <bool kCentred, bool kParams>
  void write_rows(Tiles<kCentred, kParams>& tiles, Rows& rows, int64_t set, int first, int count, bool fit,
                  const ParameterSums* params, T* copies) const {
    const int end = first + count;
    for (int r = first; r < end; r += group_) {
      const int size = end - r < group_ ? end - r : group_;
      bool all = true;
      for (int k = r; !fit && k < r + size; ++k) all = all && rows.fit(k);
      all ? tiles.sum(rows, r, size) : sum_one_by_one(tiles, rows, r, size, set + r, params);
    }
    tiles.settle(rows);
    const bool plain = rows.template finish<kCentred>(first, count, static_cast<double>(plan_.elements)) && fit;
    if (plain && in_place_) return tiles.write(rows, first, end, args_.past_cache);
    T* const own = copies + 2 * together_ * plan_.elements;
    for (int r = first; r < end; ++r) {
      if (!plain && !(rows.fit(r) && (rows.holds(r) || tiles.zeros(rows.dy[r])))) {
        set_in_double(set + r, statistic(set + r), nullptr);
      } else if (in_place_) {
        tiles.write(rows, r, r + 1, args_.past_cache);
      } else {
        const Port<T> port = piece(plan_.dx, rows.dx[r]);
        rows.dx[r] = port.open(0, plan_.elements, own);
        tiles.write(rows, r, r + 1, args_.past_cache);
        port.commit(0, plan_.elements, own, rows.dx[r]);
      }
    }
  }

  // Rows of which float32 is not enough for some.
  template <bool kCentred, bool kParams>
  [[gnu::noinline]] void sum_one_by_one(RowTiles<kCentred, kParams>& tiles, TiledRows& rows, int first, int count,
                                        int64_t set, const ParameterSums* params) const {
    ParameterSums weight_alone{};
    if constexpr (kParams) {
      weight_alone = params->without_bias();
      tiles.settle(rows);
      tiles.sum_bias(rows, first, count);
      tiles.settle(rows);
    }
    RowTiles<kCentred, kParams> one(plan_.elements, weight_, weight_alone, {});
    for (int r = 0; r < count; ++r) {
      if (rows.fit(first + r)) {
        one.sum(rows, first + r, 1);
      } else if constexpr (kParams) {
        for (int64_t unit = 0; unit < units_; ++unit) parameters(set + r, unit, statistic(set + r), weight_alone);
      }
    }
    one.settle(rows);
    one.finish();
  }

  // Rows of which some need a scale.
  template <bool kCentred, bool kParams>
  [[gnu::noinline]] void sum_one_by_one(DoubleRowTiles<kCentred, kParams>& tiles, DoubleRows& rows, int first,
                                        int count, int64_t set, const ParameterSums* params) const {
    for (int r = 0; r < count; ++r) {
      if (kParams && !rows.fit(first + r)) {
        parameters(set + r, 0, statistic(set + r), params->without_bias());
        rows.blank(first + r, weight_ + whole_packs(plan_.params));
      }
    }
    tiles.sum(rows, first, count);
  }

  void give_rows(Rows& rows, int64_t set, int count, T* copies) const {
    const auto rows_of = [&](const Operand& operand, auto** pointers) {
      for_offsets(operand.set, set, count,
                  [&](int64_t r, int64_t offset) { pointers[r] = reinterpret_cast<T*>(operand.data + offset); });
    };
    rows_of(plan_.x, rows.x);
    rows_of(plan_.dy, rows.dy);
    rows_of(plan_.dx, rows.dx);
    const int64_t n = plan_.elements;
    for (int r = 0; !in_place_ && r < count; ++r, copies += 2 * n) {
      rows.x[r] = piece(plan_.x, rows.x[r]).read(0, n, copies);
      rows.dy[r] = piece(plan_.dy, rows.dy[r]).read(0, n, copies + n);
    }
    // As they were kept: of rows that `fit` nothing is scaled, and float32 keeps no mean_lo to be left out.
    if (count == Rows::kMost && in_order_) {
      load_statistics(args_.mean, set, rows.mean);
      load_statistics(args_.mean_lo, set, rows.mean_lo);
      load_statistics(args_.rstd, set, rows.rstd);
      if constexpr (kMayOverflow<T>) load_statistics(args_.rstd_lo, set, rows.rstd_lo);
      return;
    }
    load_numbers(plan_.set_stat, set, count, args_.mean, rows.mean);
    load_numbers(plan_.set_stat, set, count, args_.mean_lo, rows.mean_lo);
    load_numbers(plan_.set_stat, set, count, args_.rstd, rows.rstd);
    if constexpr (kMayOverflow<T>) load_numbers(plan_.set_stat, set, count, args_.rstd_lo, rows.rstd_lo);
  }

  // A row of an operand that may lie in pieces.
  static Port<T> piece(const Operand& operand, const T* row) {
    return {const_cast<char*>(reinterpret_cast<const char*>(row)), operand.element, operand.aligned};
  }

  // Those of Rows::kMost sets: load_numbers with a length that is known (rows of 30: 2 % of their time).
  FASTNORM_INLINE static void load_statistics(const double* from, int64_t set, double* to) {
    constexpr size_t kBytes = Rows::kMost * sizeof(double);
    from ? static_cast<void>(std::memcpy(to, from + set, kBytes)) : static_cast<void>(std::memset(to, 0, kBytes));
  }

  const Plan& plan_;
  const NormArgs<T>& args_;
  const T* const weight_;
  const int64_t run_, units_;
  RowsAhead ahead_;
  bool in_place_ = false;
  bool in_order_ = false;  // does one statistic follow the other?
  int group_ = 0;          // rows that are read side by side, in tiles; 0: none are
  int together_ = 0;       // rows whose results are written when the sums of all are known
  bool plain_weights_ = true;
};

// The gradients of the parameters, which every part of a group adds into rows of its own; those are added in order, to
// the group's sums, if it has several, and then to those of all, with what the additions lose kept. A single thread
// does that as it goes, with one set of rows for all groups.
class GroupedGradients {
 public:
  // `halves`: 2, or 1 if no gradient of a bias is asked for.
  GroupedGradients(int64_t groups, bool in_parts, int64_t params, int halves, int threads)
      : groups_(groups),
        width_(2 * whole_packs(params)),
        used_(halves * whole_packs(params)),
        group_width_((in_parts ? 3 : 1) * width_),
        in_parts_(in_parts),
        in_turn_(threads <= 1),
        work_((in_turn_ ? 1 : groups) * group_width_ + (groups > 1 ? 2 * width_ : 0) + kPack),
        first_(aligned(work_.data())) {}

  explicit operator bool() const { return static_cast<bool>(work_); }

  ParameterSums of(int64_t group) const { return {part(group), part(group) + width_ / 2}; }

  // Called by the thread that works on a group.
  void finish_part(int64_t group) const {
    if (!in_parts_) return;
    add(part(group), group_sums(group), used_);
    std::memset(part(group), 0, static_cast<size_t>(used_) * sizeof(double));
  }

  // Called by a single thread when a group is complete.
  void finish(int64_t group) const {
    if (!in_turn_ || groups_ == 1) return;
    add_group(group, 0, used_);
    std::memset(part(group), 0, static_cast<size_t>(group_width_) * sizeof(double));
  }

  template <class T>
  void store(const Plan& plan, T* dweight, T* dbias) const {
    constexpr int64_t kStrip = 1024;
    if (!in_turn_ && groups_ > 1) {
      parallel_for(plan.threads, (used_ + kStrip - 1) / kStrip, [&](int64_t strip) {
        const int64_t first = strip * kStrip, n = used_ - first < kStrip ? used_ - first : kStrip;
        for (int64_t group = 0; group < groups_; ++group) add_group(group, first, n);
      });
    }
    store_half(0, plan.params, dweight);
    store_half(width_ / 2, plan.params, dbias);
  }

 private:
  double* part(int64_t group) const { return first_ + (in_turn_ ? 0 : group * group_width_); }
  double* group_sums(int64_t group) const { return part(group) + (in_parts_ ? width_ : 0); }
  double* totals() const { return first_ + (in_turn_ ? 1 : groups_) * group_width_; }

  template <class T>
  void store_half(int64_t first, int64_t n, T* gradient) const {
    if (!gradient) return;
    const double* const sums = (groups_ > 1 ? totals() : group_sums(0)) + first;
    if (groups_ == 1 && !in_parts_) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) gradient[i] = static_cast<T>(sums[i]);
      return;
    }
    const double* const rests = sums + width_;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double rest = std::fabs(sums[i]) < HUGE_VAL ? rests[i] : 0;  // of an infinite sum nothing is lost
      gradient[i] = static_cast<T>(sums[i] + rest);
    }
  }

  void add_group(int64_t group, int64_t first, int64_t n) const {
    const double* values = group_sums(group) + first;
    add(values, totals() + first, n);
    if (!in_parts_) return;
    double* rests = totals() + width_ + first;
    for_packs(n, [&](auto at) {
      at.store(rests, at.template load<double>(rests) + at.template load<double>(values + width_));
    });
  }

  // The sums, and width_ behind them what they have lost.
  FASTNORM_LOOPS void add(const double* values, double* sums, int64_t n) const {
    double* rests = sums + width_;
    for_packs(n, [&](auto at) {
      const Pack<double> sum = at.template load<double>(sums), value = at.template load<double>(values);
      const Pack<double> total = sum + value, share = total - sum;
      at.store(rests, at.template load<double>(rests) + ((sum - (total - share)) + (value - share)));
      at.store(sums, total);
    });
  }

  const int64_t groups_, width_, used_, group_width_;
  const bool in_parts_, in_turn_;
  const Workspace<double> work_;
  double* const first_;
};

template <class T>
bool row_backward(const Plan& plan, const NormArgs<T>& args) {
  const int64_t units = units_per_set(plan), params = plan.params;
  // Tiles know two kinds of calls: those that have weights and want gradients, and those that do neither.
  const bool want_params = args.dweight || args.dbias || args.weight;
  const Workspace<T> work(want_params ? (kMayOverflow<T> ? 2 : 1) * whole_packs(params) + 2 * kPack : 0);
  const SetGroups size = SetGroups::of<T>(plan);
  const int64_t per_group = size.group, groups = (plan.sets + per_group - 1) / per_group;
  const bool split = plan.threads > 1 && groups < 2 * plan.threads && units > 1;
  const GroupedGradients gradients(want_params ? groups : 1, size.part < per_group, want_params ? params : 0,
                                   args.centred ? 2 : 1, plan.threads);
  const Workspace<SegmentSums> sums(split ? plan.sets * units : 0);
  if (!work || !gradients || !sums) return false;

  T* weight = nullptr;
  if (want_params) {
    weight = in_lines_of(work.data(), plan.dx.data);
    if (args.weight) {
      std::memcpy(weight, args.weight, static_cast<size_t>(params) * sizeof(T));
    } else {
      for (int64_t p = 0; p < params; ++p) weight[p] = 1;
    }
  }
  const RowBackward<T> backward(plan, args, weight);

  const Workspace<T> copies((plan.threads > 1 ? groups : 1) * backward.copied());
  if (!copies) return false;

  if (split) {
    // Few sets, long ones: first all sums, then every unit (a range of parameters) walks over the sets.
    parallel_for(plan.threads, plan.sets * units, [&](int64_t i) {
      const int64_t set = i / units;
      sums[i] = backward.sums(set, i % units, backward.statistic(set));
    });
    for (int64_t set = 0; set < plan.sets; ++set) {
      SegmentSums total;
      for (int64_t unit = 0; unit < units; ++unit) total.add(sums[set * units + unit]);
      sums[set * units] = total;
    }
    for_results(plan, args, units, [&](int64_t unit) {
      for (int64_t set = 0; set < plan.sets; ++set) {
        SegmentSums total = sums[set * units];
        const Statistic s = backward.centre(backward.statistic(set), total);
        if (want_params) backward.parameters(set, unit, s, gradients.of(set / per_group));
        backward.gradient(set, unit, s, total);
      }
    });
    if (args.finished) args.finished(args.context, 0, plan.sets);
  } else {
    for_results(plan, args, groups, [&](int64_t group) {
      const ParameterSums to = gradients.of(group);
      T* const own = copies.data() + (plan.threads > 1 ? group : 0) * backward.copied();
      const int64_t begin = group * per_group, rest = plan.sets - begin, count = rest < per_group ? rest : per_group;
      const int64_t step = args.finished ? whole_tiles(args.sets_at_once) : per_group;
      for (int64_t set = 0, reported = 0; set < count;) {
        const int64_t left = count - set, part = size.part - set % size.part, uncut = step - set % step;
        const int64_t first = set, unbroken = part < uncut ? part : uncut;
        set += left < unbroken ? left : unbroken;
        backward.sets(begin + first, begin + set, want_params ? &to : nullptr, own);
        if (want_params && (set % size.part == 0 || set == count)) gradients.finish_part(group);
        if (!args.finished || (set % step != 0 && set < count)) continue;
        args.finished(args.context, begin + reported, begin + set);
        reported = set;
      }
      if (want_params) gradients.finish(group);
    });
  }
  if (want_params) gradients.store(plan, args.dweight, args.dbias);
  return true;
}

}  // namespace
}  // namespace fastnorm
