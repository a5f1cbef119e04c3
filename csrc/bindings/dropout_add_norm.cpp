// The residual step s = residual + dropout(x), y = norm(s) in one pass over memory: block by block of rows, each step
// of a block while the one before it is in cache. A set has the same bits alone as in a batch, so this has those of the
// separate calls. Accepts contiguous arrays and rows that fit the caches; declines the rest, before anything is written
// or drawn.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "cpu_features.hpp"
#include "dropout.hpp"
#include "kernel_table.hpp"
#include "norm_cache.hpp"
#include "noted.hpp"
#include "operands.hpp"
#include "parallel.hpp"
#include "wide_gradient.hpp"

namespace fastnorm {
namespace {

constexpr int64_t kBlockBytes = 262144;  // of one array: what is written of a block is still near when it is read
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kLongestRow = 262144;  // bytes
constexpr int64_t kLine = 64;
constexpr int64_t kRowsInLines = 16;  // rows of any length that are a whole number of lines

bool in_one_piece(const Array& a) { return a.c_contiguous() && a.aligned(); }

bool fits(const Array& a, const Array& x) {
  return a.is_float() && a.dtype() == x.dtype() && a.same_shape(x) && in_one_piece(a);
}

// Rows of one length, one after the other.
struct Rows {
  int64_t count, length, block;

  Rows(const Sizes& sizes, int64_t itemsize) : count(sizes.sets), length(sizes.per_set) {
    block = std::max<int64_t>(kBlockBytes / (length * itemsize) / 4 * 4, 1);
  }
  // Smaller blocks where there would be too few for the threads; any cut gives the same bits.
  void share(int threads) {
    if (threads > 1) block = std::max<int64_t>(std::min(block, count / (4 * threads) / 4 * 4), 1);
  }
  int64_t blocks() const { return (count + block - 1) / block; }
};

bool worth_it(const Sizes& sizes, int64_t itemsize) {
  return sizes.sets > 0 && sizes.per_set > 1 && sizes.per_set * itemsize <= kLongestRow;
}

// The plan of `count` of the rows, all arrays in C order.
Plan rows_plan(const Spec& spec, int64_t count, int64_t length, int64_t itemsize, const Array* x, const Array* y,
               const Array* dy, const Array* dx) {
  PlanInput in;
  in.rank = 2;
  in.itemsize = itemsize;
  in.centred = spec.kind != Kind::rms;
  in.size[0] = count;
  in.size[1] = length;
  in.role[0] = Role::set;
  in.role[1] = Role::param;
  in.set_owns_param[0] = in.set_owns_param[1] = false;
  number_sets(in);
  const auto place = [&](const Array* from, PlanInput::Array& to) {
    if (from == nullptr) return;
    to.data = from->data();
    to.stride[0] = length * itemsize;
    to.stride[1] = itemsize;
  };
  place(x, in.x);
  place(y, in.y);
  place(dy, in.dy);
  place(dx, in.dx);
  return make_plan(in);
}

struct Step {
  Spec spec;
  double eps;
  MaskDraw draw;
};

// Two results of a call: arrays of the caller's where it gave some, at first None where it did not.
struct Results {
  py::handle object[2] = {Py_None, Py_None};
  bool given[2] = {false, false};
  bool accepted = true;

  // `out`: None, an array for the first one, or a tuple of two, either of which may be None.
  explicit Results(PyObject* out) {
    if (PyTuple_Check(out)) {
      accepted = PyTuple_GET_SIZE(out) == 2;
      for (int i = 0; accepted && i < 2; ++i) object[i] = PyTuple_GET_ITEM(out, i);
    } else {
      object[0] = out;
    }
    for (int i = 0; i < 2; ++i) given[i] = !object[i].is_none();
  }
  py::object take(int i, const Array& like) const {
    return given[i] ? py::reinterpret_borrow<py::object>(object[i]) : new_like(like);
  }
};

// A piece of memory that rows are kept in on their way past the caches, each at its result's place in a line.
class NearRows {
 public:
  NearRows(bool wanted, int64_t bytes) : memory_(wanted ? new char[static_cast<size_t>(bytes + kLine)] : nullptr) {}
  template <class T>
  T* beside(const T* result) const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<T*>(first + (reinterpret_cast<uintptr_t>(result) - first) % kLine);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Where the results of a step go past the caches.
struct PastCache {
  bool first = false, second = false;

  // What no cache holds, and whose lines the call has not read just before.
  PastCache(bool far, const Results& out, std::initializer_list<const Array*> read) {
    const auto past = [&](int i) {
      if (!far || !out.given[i]) return false;
      const char* const data = Array(out.object[i]).data();
      return std::none_of(read.begin(), read.end(), [&](const Array* a) { return a && a->data() == data; });
    };
    first = past(0);
    second = past(1);
  }
};

template <class T>
T* values(const Array& a) {
  return reinterpret_cast<T*>(a.data());
}

// The arrays of a forward; residual may be nullptr.
struct ForwardArrays {
  const Array x, *residual, s, y;
  const Optional &weight, &bias;
  PastCache past;  // first: y
  bool far;        // no cache holds them
};

// Blocks [begin, end) of rows. Of a block whose s goes past the caches, the norm reads a copy.
template <class T>
bool forward_blocks(const Step& step, const Rows& rows, const ForwardArrays& a, NormArgs<T> args, int64_t begin,
                    int64_t end) {
  const auto plan_of = [&](int64_t block) {
    const int64_t count = std::min(rows.block, rows.count - block * rows.block);
    return rows_plan(step.spec, count, rows.length, sizeof(T), &a.s, &a.y, nullptr, nullptr);
  };
  const T factor = keep_scale<T>(step.draw.threshold);
  const NearRows near(a.past.second, rows.block * rows.length * static_cast<int64_t>(sizeof(T)));
  double *const mean = args.mean, *const mean_lo = args.mean_lo;
  double *const rstd = args.rstd, *const rstd_lo = args.rstd_lo;
  Plan plan = plan_of(begin);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i * rows.block, count = std::min(rows.block, rows.count - row);
    if (i > begin && count < rows.block) plan = plan_of(i);
    const int64_t first = row * rows.length, elements = count * rows.length;
    T *const result = values<T>(a.s) + first, *const s = a.past.second ? near.beside(result) : result;
    const T* const x = values<T>(a.x) + first;
    dropout_kernels<T>().drop_add(s, x, a.residual ? values<T>(*a.residual) + first : nullptr, first, elements,
                                  step.draw, factor, a.past.second ? result : nullptr);
    plan.x.data = reinterpret_cast<char*>(s);
    plan.y.data = reinterpret_cast<char*>(values<T>(a.y) + first);
    if (a.far) plan.ahead = reinterpret_cast<intptr_t>(x + elements) - reinterpret_cast<intptr_t>(s);
    args.rstd = rstd + row;
    if (mean) args.mean = mean + row;
    if (mean_lo) args.mean_lo = mean_lo + row;
    if (rstd_lo) args.rstd_lo = rstd_lo + row;
    if (!norm_kernels<T>().forward(plan, args)) return false;
  }
  return true;
}

template <class T>
void run_forward(const Step& step, const Sizes& sizes, const ForwardArrays& a, const Statistics& statistics) {
  const int threads = threads_for(sizes.total);
  Rows rows(sizes, sizeof(T));
  rows.share(threads);
  NormArgs<T> args;
  args.weight = a.weight.given ? values<T>(a.weight.array) : nullptr;
  args.bias = a.bias.given ? values<T>(a.bias.array) : nullptr;
  args.eps = step.eps;
  args.centred = step.spec.kind != Kind::rms;
  args.past_cache = a.past.first;
  args.rstd = statistics.rstd;
  args.mean = statistics.mean;
  args.mean_lo = statistics.mean_lo;
  args.rstd_lo = statistics.rstd_lo;
  std::atomic<bool> done{true};
  {
    const ReleaseForLargeWork release(sizes.total);
    const int64_t blocks = rows.blocks();
    const int64_t at_once = threads == 1 ? blocks : std::max<int64_t>(blocks / (kPiecesPerThread * threads), 1);
    parallel_for(threads, (blocks + at_once - 1) / at_once, [&](int64_t piece) {
      const int64_t begin = piece * at_once, end = std::min(blocks, begin + at_once);
      try {
        if (!forward_blocks<T>(step, rows, a, args, begin, end)) done = false;
      } catch (const std::bad_alloc&) {
        done = false;
      }
    });
  }
  if (!done) throw std::bad_alloc();
}

py::object tuple_of(std::initializer_list<py::object> items) {
  py::object made = py::reinterpret_steal<py::object>(PyTuple_New(static_cast<py::ssize_t>(items.size())));
  if (!made) throw py::error_already_set();
  py::ssize_t i = 0;
  for (const py::object& item : items) PyTuple_SET_ITEM(made.ptr(), i++, item.inc_ref().ptr());
  return made;
}

// Is this array fit for a result of x's shape? It may be the same view as one of `in_place`, else has to lie apart.
bool accepts_result(py::handle object, const Array& x, std::initializer_list<const Array*> in_place,
                    std::initializer_list<const Array*> others) {
  const Array out(object);
  if (!fits(out, x) || !out.writeable()) return false;
  for (const Array* other : in_place) {
    if (other && out.may_overlap(*other) && !out.same_view(*other)) return false;
  }
  return std::none_of(others.begin(), others.end(), [&](const Array* a) { return a && out.may_overlap(*a); });
}

// Of accepted results.
bool apart(const Results& out) {
  return !out.given[0] || !out.given[1] || !Array(out.object[0]).may_overlap(Array(out.object[1]));
}

// y may be x where no cache is wanted, s the residual or, without a cache, x.
bool accepts_results(const Results& out, const Array& x, const Array* residual, const Optional& weight,
                     const Optional& bias, bool cached) {
  if (!out.accepted) return false;
  const Array *const w = weight.given ? &weight.array : nullptr, *const b = bias.given ? &bias.array : nullptr;
  const Array *const kept = cached ? &x : nullptr, *const given = cached ? nullptr : &x;
  return (!out.given[0] || accepts_result(out.object[0], x, {given}, {kept, residual, w, b})) &&
         (!out.given[1] || accepts_result(out.object[1], x, {given, residual}, {kept, w, b})) && apart(out);
}

// (rms, x, residual, weight, bias, p, rng, axis, eps, out, cached) -> (y, s) or (y, s, norm cache, seed, offset)
py::object forward(PyObject* const* args) {
  if (verifying()) return py::none();
  const Array x(args[1]);
  Settings settings{{args[0] == Py_True ? Kind::rms : Kind::layer}, 0, 0};
  Spec& spec = settings.spec;
  double p = 0;
  if (!x.is_float() || !in_one_piece(x) || !make_spec(spec.kind, x, args[7], py::none(), &spec)) return py::none();
  if (!as_number(args[8], &settings.eps) || !(settings.eps >= 0)) return py::none();
  if (!accepts_probability(args[5], &p) || !(args[6] == Py_None ? p == 0 : accepts_rng(args[6]))) return py::none();
  const Sizes sizes = sizes_of(spec, x);
  if (!worth_it(sizes, x.itemsize())) return py::none();
  const bool has_residual = args[2] != Py_None;
  const Array residual = has_residual ? Array(args[2]) : Array();
  if (has_residual && !fits(residual, x)) return py::none();
  const Optional weight = optional_param(spec, x, args[3]), bias = optional_param(spec, x, args[4]);
  for (const Optional* param : {&weight, &bias}) {
    if (!param->accepted || (param->given && !in_one_piece(param->array))) return py::none();
  }
  if (bias.given && spec.kind == Kind::rms) return py::none();
  const bool cached = args[10] == Py_True;
  const Results out(args[9]);
  if (!accepts_results(out, x, has_residual ? &residual : nullptr, weight, bias, cached)) return py::none();

  py::object y = out.take(0, x), s = out.take(1, x);
  Statistics statistics;
  statistics.allocate(spec.kind, sizes.sets, x.dtype() == Dtype::float64, false, false);
  const PhiloxStream stream = args[6] == Py_None ? PhiloxStream{0, 0} : take(args[6]);
  const Step step{spec, settings.eps, {stream, keep_threshold(p)}};
  const bool far = exceeds_cache(4 * sizes.total * x.itemsize());
  const ForwardArrays arrays{x,
                             has_residual ? &residual : nullptr,
                             Array(s),
                             Array(y),
                             weight,
                             bias,
                             PastCache(far, out, {&x, has_residual ? &residual : nullptr}),
                             far};
  (x.dtype() == Dtype::float32 ? run_forward<float> : run_forward<double>)(step, sizes, arrays, statistics);
  if (!cached) return tuple_of({y, s});
  settings.count = sizes.per_set;
  py::object cache = make_cache(settings, Array(s), args[3], args[4], statistics, sizes.sets);
  return tuple_of({y, s, cache, py::int_(stream.seed), py::int_(stream.offset)});
}

// What is done with the rows of the norm's gradient as soon as they are there: + ds, and the mask.
template <class T>
struct Finish {
  const Step& step;
  const Rows& rows;
  const T* ds;  // nullptr: there is none
  T *dx, *g;    // may be one
  T* near;      // g of row i, i % rows.block rows on; nullptr: g is where it belongs
  bool past;    // dx goes past the caches
  bool want_g;  // g is a result
  const T factor;

  void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end;) {
      // Up to where the rows that are near begin anew.
      const int64_t stop = near ? std::min(end, (row / rows.block + 1) * rows.block) : end;
      const int64_t first = row * rows.length, elements = (stop - row) * rows.length;
      T* const from = near ? near + row % rows.block * rows.length : g + first;
      dropout_kernels<T>().add_drop(dx + first, from, ds ? ds + first : nullptr, first, elements, step.draw, factor,
                                    past, near && want_g ? g + first : nullptr);
      row = stop;
    }
  }
};

// The arrays of a backward; ds and dresidual may be nullptr.
struct BackwardArrays {
  const Array s, dy, *ds, dx, *dresidual;
  PastCache past;  // first: dx
};

template <class T>
void run_backward(const Step& step, const Sizes& sizes, const NormCache& cache, const BackwardArrays& a, T* dweight,
                  T* dbias) {
  const int threads = threads_for(sizes.total);
  Rows rows(sizes, sizeof(T));
  rows.block = std::max(rows.block / kRowsInLines, int64_t{1}) * kRowsInLines;
  const Array& g = a.dresidual ? *a.dresidual : a.dx;
  Plan plan = rows_plan(step.spec, rows.count, rows.length, sizeof(T), &a.s, nullptr, &a.dy, &g);
  plan.threads = threads;
  const int64_t bytes = 3 * sizes.total * static_cast<int64_t>(sizeof(T));
  plan.take_size(bytes, exceeds_cache(bytes));
  // The gradient that goes past the caches is kept near for a block's time, in rows that are used again and again.
  const bool kept_near = threads == 1 && rows.count > rows.block && (a.dresidual ? a.past.second : a.past.first);
  const NearRows memory(kept_near, rows.block * rows.length * static_cast<int64_t>(sizeof(T)));
  T* const near = kept_near ? memory.beside(values<T>(g)) : nullptr;
  if (kept_near) {
    Walk& walk = plan.dx.set;
    plan.dx.data = reinterpret_cast<char*>(near);
    walk.rank = 2;
    walk.size[0] = rows.blocks();
    walk.size[1] = rows.block;
    walk.stride[0] = 0;
    walk.stride[1] = rows.length * static_cast<int64_t>(sizeof(T));
  }
  NormArgs<T> args;
  args.weight = cache.weight == Py_None ? nullptr : values<T>(Array(cache.weight));
  args.eps = cache.eps;
  args.centred = step.spec.kind != Kind::rms;
  args.mean = cache.mean;
  args.mean_lo = cache.mean_lo;
  args.rstd = cache.rstd;
  args.rstd_lo = cache.rstd_lo;
  args.dweight = dweight;
  args.dbias = dbias;
  const bool apart = near || a.dresidual;  // dx is not what it is made of
  const Finish<T> finish{step,
                         rows,
                         a.ds ? values<T>(*a.ds) : nullptr,
                         values<T>(a.dx),
                         values<T>(g),
                         near,
                         apart && a.past.first,
                         a.dresidual != nullptr,
                         keep_scale<T>(step.draw.threshold)};
  args.context = &finish;
  args.sets_at_once = rows.block;
  args.finished = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Finish<T>*>(context))(begin, end);
  };
  const ReleaseForLargeWork release(sizes.total);
  if (!norm_kernels<T>().backward(plan, args)) throw std::bad_alloc();
}

// (dy, norm cache, ds, p, seed, offset, has_residual, out) -> (dx, dresidual, dweight, dbias)
py::object backward(PyObject* const* args) {
  if (verifying()) return py::none();
  const NormCache* cache = as_cache(args[1]);
  if (cache == nullptr || !cache->spec.by_row() || !still_fits(*cache)) return py::none();
  const Array s(cache->x), dy(args[0]);
  if (!in_one_piece(s) || !fits(dy, s)) return py::none();
  const bool has_ds = args[2] != Py_None, has_residual = args[6] == Py_True;
  const Array ds = has_ds ? Array(args[2]) : Array();
  if (has_ds && !fits(ds, s)) return py::none();
  double p = 0;
  uint64_t seed, offset;
  if (!accepts_probability(args[3], &p) || !as_word(args[4], &seed) || !as_word(args[5], &offset)) return py::none();
  const Sizes sizes = sizes_of(cache->spec, s);
  if (!worth_it(sizes, s.itemsize())) return py::none();
  const Results out(args[7]);
  const Array weight = cache->weight == Py_None ? Array() : Array(cache->weight);
  const std::initializer_list<const Array*> read = {&s, has_ds ? &ds : nullptr,
                                                    cache->weight == Py_None ? nullptr : &weight};
  if (!out.accepted || (out.given[1] && !has_residual)) return py::none();
  if (out.given[0] && !accepts_result(out.object[0], s, {&dy}, read)) return py::none();
  if (out.given[1] && (!accepts_result(out.object[1], s, {}, read) || Array(out.object[1]).may_overlap(dy))) {
    return py::none();
  }
  if (!apart(out)) return py::none();
  py::object gradients[2] = {py::none(), py::none()};
  char* to[2] = {nullptr, nullptr};
  PyObject* const params[2] = {cache->weight, cache->bias};
  for (int i = 0; i < 2; ++i) {
    if (params[i] == Py_None) continue;
    const Array param(params[i]);
    if (!in_one_piece(param)) return py::none();
    gradients[i] = new_array(param.dtype(), param.rank(), param.shape());
    to[i] = Array(gradients[i]).data();
  }

  const py::object dx = out.take(0, s), dresidual = has_residual ? out.take(1, s) : py::none();
  const Array g = has_residual ? Array(dresidual) : Array();
  const Step step{cache->spec, cache->eps, {{seed, offset}, keep_threshold(p)}};
  const BackwardArrays arrays{s,
                              dy,
                              has_ds ? &ds : nullptr,
                              Array(dx),
                              has_residual ? &g : nullptr,
                              PastCache(exceeds_cache(5 * sizes.total * s.itemsize()), out, {&dy})};
  if (s.dtype() == Dtype::float32) {
    run_backward<float>(step, sizes, *cache, arrays, reinterpret_cast<float*>(to[0]), reinterpret_cast<float*>(to[1]));
  } else {
    Overflow::clear();
    run_backward<double>(step, sizes, *cache, arrays, reinterpret_cast<double*>(to[0]),
                         reinterpret_cast<double*>(to[1]));
    // The separate calls mend what can be mended, if dy is still there.
    if (WideGradient::kReachesFurther && Overflow::any() && arrays.dx.data() != dy.data()) return py::none();
  }
  return tuple_of({dx, dresidual, gradients[0], gradients[1]});
}

PyObject* forward_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 11, args, [&](bool) { return forward(args); });
}

PyObject* backward_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 8, args, [&](bool) { return backward(args); });
}

PyMethodDef entries[] = {
    method("dropout_add_norm", forward_entry, "(y, s, ...), or None for a call that is not the common one."),
    method("dropout_add_norm_backward", backward_entry, "Gradients, or None for a call that is not the common one."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_dropout_add_norm(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), entries) != 0) throw py::error_already_set();
}

}  // namespace fastnorm
