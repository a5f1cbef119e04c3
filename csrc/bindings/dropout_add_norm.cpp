// The residual step s = residual + dropout(x), y = norm(s) in one pass over memory: block by block of rows, each step
// of a block while the one before it is in cache. A set has the same bits alone as in a batch, so this has those of the
// separate calls. Accepts contiguous arrays and rows that fit the caches; declines the rest, before anything is written
// or drawn.
#include <atomic>
#include <new>

#include "cpu_features.hpp"
#include "dropout.hpp"
#include "kernel_table.hpp"
#include "norm_cache.hpp"
#include "operands.hpp"
#include "parallel.hpp"

namespace fastnorm {
namespace {

constexpr int64_t kBlockBytes = 131072;  // of one array: what is written of a block is still near when it is read
constexpr int64_t kBlocksAtOnce = 8;
constexpr int64_t kLongestRow = 262144;  // bytes

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

template <class T>
void run_forward(const Step& step, const Sizes& sizes, const Array& x, const Array* residual, const Array& s,
                 const Array& y, const Optional& weight, const Optional& bias, const Statistics& statistics,
                 bool reused) {
  const int threads = threads_for(sizes.total);
  Rows rows(sizes, sizeof(T));
  rows.share(threads);
  const DropoutKernels<T>& dropout = dropout_kernels<T>();
  const NormKernels<T>& norm = norm_kernels<T>();
  const T factor = keep_scale<T>(step.draw.threshold);
  const int64_t last = rows.count % rows.block;
  const Plan whole = rows_plan(step.spec, rows.block, rows.length, sizeof(T), &s, &y, nullptr, nullptr);
  const Plan rest = last == 0 ? whole : rows_plan(step.spec, last, rows.length, sizeof(T), &s, &y, nullptr, nullptr);
  NormArgs<T> args;
  args.weight = weight.given ? reinterpret_cast<const T*>(weight.array.data()) : nullptr;
  args.bias = bias.given ? reinterpret_cast<const T*>(bias.array.data()) : nullptr;
  args.eps = step.eps;
  args.centred = step.spec.kind != Kind::rms;
  args.past_cache = reused && exceeds_cache(3 * sizes.total * x.itemsize());
  std::atomic<bool> done{true};
  {
    const ReleaseForLargeWork release(sizes.total);
    // Some blocks at a time, so that a plan is copied seldom.
    const int64_t blocks = rows.blocks(), at_once = threads == 1 ? kBlocksAtOnce : 1;
    parallel_for(threads, (blocks + at_once - 1) / at_once, [&](int64_t piece) {
      Plan plan = whole;
      for (int64_t i = piece * at_once; i < std::min(blocks, (piece + 1) * at_once); ++i) {
        const int64_t row = i * rows.block, count = std::min(rows.block, rows.count - row);
        if (count < rows.block) plan = rest;
        const int64_t first = row * rows.length, elements = count * rows.length;
        const int64_t start = first * static_cast<int64_t>(sizeof(T));
        dropout.drop_add(reinterpret_cast<T*>(s.data()) + first, reinterpret_cast<const T*>(x.data()) + first,
                         residual ? reinterpret_cast<const T*>(residual->data()) + first : nullptr, first, elements,
                         step.draw, factor);
        plan.x.data = s.data() + start;
        plan.y.data = y.data() + start;
        NormArgs<T> own = args;
        own.rstd = statistics.rstd + row;
        if (statistics.mean) own.mean = statistics.mean + row;
        if (statistics.mean_lo) own.mean_lo = statistics.mean_lo + row;
        if (!norm.forward(plan, own)) done = false;
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

bool accepts_result(const Array& out, const Array& x, bool in_place, std::initializer_list<const Array*> others) {
  if (!fits(out, x) || !out.writeable()) return false;
  if (out.may_overlap(x) && !(in_place && out.same_view(x))) return false;
  for (const Array* other : others) {
    if (other && out.may_overlap(*other)) return false;
  }
  return true;
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
  if (args[9] != Py_None && !accepts_result(Array(args[9]), x, !cached,
                                            {has_residual ? &residual : nullptr, weight.given ? &weight.array : nullptr,
                                             bias.given ? &bias.array : nullptr})) {
    return py::none();
  }

  py::object s = new_like(x);
  py::object y = args[9] == Py_None ? new_like(x) : py::reinterpret_borrow<py::object>(args[9]);
  Statistics statistics;
  statistics.allocate(spec.kind, sizes.sets, x.dtype() == Dtype::float64, false, false);
  const PhiloxStream stream = args[6] == Py_None ? PhiloxStream{0, 0} : take(args[6]);
  const Step step{spec, settings.eps, {stream, keep_threshold(p)}};
  (x.dtype() == Dtype::float32 ? run_forward<float>
                               : run_forward<double>)(step, sizes, x, has_residual ? &residual : nullptr, Array(s),
                                                      Array(y), weight, bias, statistics, args[9] != Py_None);
  if (!cached) return tuple_of({y, s});
  settings.count = sizes.per_set;
  py::object cache = make_cache(settings, Array(s), args[3], args[4], statistics, sizes.sets);
  return tuple_of({y, s, cache, py::int_(stream.seed), py::int_(stream.offset)});
}

// What is done with the rows of the norm's gradient as soon as they are there: + ds, and the mask.
template <class T>
struct Finish {
  const DropoutKernels<T>& kernels;
  const Step& step;
  int64_t length;
  T* g;
  const T* ds;  // nullptr: there is none
  T* dx;        // may be g
  T factor;

  void rows(int64_t begin, int64_t end) const {
    const int64_t first = begin * length;
    kernels.add_drop(dx + first, g + first, ds ? ds + first : nullptr, first, (end - begin) * length, step.draw,
                     factor);
  }
};

template <class T>
void run_backward(const Step& step, const Sizes& sizes, const NormCache& cache, const Array& dy, const Array* ds,
                  const Array& g, const Array& dx, T* dweight, T* dbias) {
  const Array s(cache.x);
  const Rows rows(sizes, sizeof(T));
  Plan plan = rows_plan(step.spec, rows.count, rows.length, sizeof(T), &s, nullptr, &dy, &g);
  plan.threads = threads_for(sizes.total);
  NormArgs<T> args;
  args.weight = cache.weight == Py_None ? nullptr : reinterpret_cast<const T*>(Array(cache.weight).data());
  args.eps = cache.eps;
  args.centred = step.spec.kind != Kind::rms;
  args.mean = cache.mean;
  args.mean_lo = cache.mean_lo;
  args.rstd = cache.rstd;
  args.dweight = dweight;
  args.dbias = dbias;
  const Finish<T> finish{dropout_kernels<T>(),
                         step,
                         rows.length,
                         reinterpret_cast<T*>(g.data()),
                         ds ? reinterpret_cast<const T*>(ds->data()) : nullptr,
                         reinterpret_cast<T*>(dx.data()),
                         keep_scale<T>(step.draw.threshold)};
  args.context = &finish;
  args.sets_at_once = rows.block;
  args.finished = [](const void* context, int64_t begin, int64_t end) {
    static_cast<const Finish<T>*>(context)->rows(begin, end);
  };
  const ReleaseForLargeWork release(sizes.total);
  if (!norm_kernels<T>().backward(plan, args)) throw std::bad_alloc();
}

// (dy, norm cache, ds, p, seed, offset, has_residual) -> (dx, dresidual, dweight, dbias)
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

  const py::object g = new_like(s), dx = has_residual ? new_like(s) : g;
  const Step step{cache->spec, cache->eps, {{seed, offset}, keep_threshold(p)}};
  if (s.dtype() == Dtype::float32) {
    run_backward<float>(step, sizes, *cache, dy, has_ds ? &ds : nullptr, Array(g), Array(dx),
                        reinterpret_cast<float*>(to[0]), reinterpret_cast<float*>(to[1]));
  } else {
    run_backward<double>(step, sizes, *cache, dy, has_ds ? &ds : nullptr, Array(g), Array(dx),
                         reinterpret_cast<double*>(to[0]), reinterpret_cast<double*>(to[1]));
  }
  return tuple_of({dx, has_residual ? g : py::none(), gradients[0], gradients[1]});
}

PyObject* forward_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 11, args, [&](bool) { return forward(args); });
}

PyObject* backward_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return enter(count, 7, args, [&](bool) { return backward(args); });
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
