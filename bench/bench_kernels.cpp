// The C++ kernels under google-benchmark: every case of fastnorm/cli/cases.csv that has a kernel of its own, for each
// dtype and each instruction-set level of this build that this CPU runs, and copies and sums of several sizes beside.
// Measures kernels alone: no Python, no allocation, results written to the same memory each time.
//
//   bench_kernels [--fastnorm_threads=N] [--benchmark_filter=layer_norm.*avx2] [--benchmark_out=FILE] ...
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cpu_features.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"
#include "plan.hpp"

namespace {

using namespace fastnorm;

struct Case {
  std::string name, operation, layout;
  std::vector<int64_t> shape;
  std::vector<std::string> dtypes, moves;
  std::string options;

  int64_t elements() const {
    int64_t product = 1;
    for (int64_t size : shape) product *= size;
    return product;
  }

  // The same count as Case.bytes_moved of fastnorm/cli/cases.py.
  int64_t bytes(int64_t itemsize) const {
    int64_t sum = 0;
    for (const std::string& array : moves) sum += elements() * (array == "keep" ? 1 : itemsize);
    return sum;
  }

  double option(const std::string& key, double otherwise) const {
    std::istringstream words(options);
    for (std::string word; words >> word;) {
      if (word.compare(0, key.size() + 1, key + "=") == 0) return std::atof(word.c_str() + key.size() + 1);
    }
    return otherwise;
  }
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// Columns: name,operation,shape,layout,dtypes,moves,options. An empty list means that the file could not be read.
std::vector<Case> read_cases(const char* path) {
  std::vector<Case> cases;
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);  // header
  while (std::getline(file, line)) {
    std::vector<std::string> column = split(line, ',');
    column.resize(7);
    Case c;
    c.name = column[0];
    c.operation = column[1];
    for (const std::string& size : split(column[2], 'x')) c.shape.push_back(std::atoll(size.c_str()));
    c.layout = column[3];
    c.dtypes = split(column[4], ' ');
    c.moves = split(column[5], ' ');
    c.options = column[6];
    cases.push_back(c);
  }
  return cases;
}

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }
bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// An array of normal variates that starts on a cache line, as large allocations do.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, unsigned seed, double center = 0) : memory_(static_cast<size_t>(count) + 64 / sizeof(T)) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(static_cast<float>(center), 1);
    // A short pattern repeated: drawing 64 MB of normal variates would take longer than the measurement.
    const size_t period = 4099;
    for (size_t i = 0; i < memory_.size(); ++i) memory_[i] = i < period ? T(normal(generator)) : memory_[i - period];
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
  }

  T* data() { return start_; }
  char* bytes() { return reinterpret_cast<char*>(start_); }

 private:
  std::vector<T> memory_;
  T* start_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Norms

// The axes of x with their roles, as the Python functions make them.
PlanInput norm_axes(const Case& c, int64_t itemsize) {
  PlanInput input{};
  const int rank = static_cast<int>(c.shape.size());
  std::vector<int64_t> stride(c.shape.size());
  int64_t next = itemsize;
  const bool channels_last = c.layout == "channels_last";
  if (channels_last) {
    stride[1] = next;
    next *= c.shape[1];
  }
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (channels_last && axis == 1) continue;
    stride[axis] = next;
    next *= c.shape[axis];
  }
  auto push = [&](int64_t size, int64_t step, Role role, bool owns) {
    const int axis = input.rank++;
    input.size[axis] = size;
    input.role[axis] = role;
    input.set_owns_param[axis] = owns;
    input.x.stride[axis] = input.y.stride[axis] = input.dy.stride[axis] = input.dx.stride[axis] = step;
  };
  const bool batch = starts_with(c.operation, "batch"), group = starts_with(c.operation, "group");
  const bool channels = batch || group || starts_with(c.operation, "instance");
  const bool moments = c.operation == "moments";
  for (int axis = 0; axis < rank; ++axis) {
    const int64_t size = c.shape[axis], step = stride[axis];
    if (!channels) {
      push(size, step, axis < rank - 1 ? Role::set : moments ? Role::reduce : Role::param, false);
    } else if (axis == 1 && group) {
      const int64_t groups = static_cast<int64_t>(c.option("num_groups", 1));
      push(groups, step * (size / groups), Role::set, true);
      push(size / groups, step, Role::param, false);
    } else {
      push(size, step, axis == 1 || (axis == 0 && !batch) ? Role::set : Role::reduce, axis == 1);
    }
  }
  input.itemsize = itemsize;
  return input;
}

template <class T>
class Norm {
 public:
  explicit Norm(const Case& c)
      : x_(c.elements(), 1, 0.5), second_(c.elements(), 2), third_(c.elements(), 3), operation_(c.operation) {
    PlanInput input = norm_axes(c, sizeof(T));
    input.x.data = x_.bytes();
    if (ends_with(operation_, "_backward")) {
      input.dy.data = second_.bytes();
      input.dx.data = third_.bytes();
    } else if (operation_ != "moments") {
      input.y.data = second_.bytes();
    }
    plan_ = make_plan(input);
    plan_.threads = threads_for(c.elements());
    plan_.far = exceeds_cache((plan_.dy.data != nullptr ? 3 : 2) * c.elements() * static_cast<int64_t>(sizeof(T)));
    const size_t sets = static_cast<size_t>(plan_.all_sets()), params = static_cast<size_t>(plan_.params);
    for (auto* statistic : {&mean_, &mean_lo_, &var_, &rstd_}) statistic->assign(sets, 0);
    for (auto* parameter : {&weight_, &bias_, &dweight_, &dbias_}) parameter->assign(params, T(1.25));
    args_.weight = weight_.data();
    args_.bias = starts_with(operation_, "rms") ? nullptr : bias_.data();
    args_.centred = !starts_with(operation_, "rms");
    args_.eps = 1e-5;
    args_.mean = mean_.data();
    args_.mean_lo = mean_lo_.data();
    args_.var = var_.data();
    args_.rstd = rstd_.data();
    if (plan_.dy.data != nullptr || operation_ == "batch_norm") fill_statistics(c);
    args_.dweight = dweight_.data();
    args_.dbias = starts_with(operation_, "rms") ? nullptr : dbias_.data();
  }

  bool run() const {
    const NormKernels<T>& kernel = norm_kernels<T>();
    if (operation_ == "moments") return kernel.moments(plan_, args_);
    if (operation_ == "batch_norm") return kernel.apply(plan_, args_);
    return plan_.dy.data != nullptr ? kernel.backward(plan_, args_) : kernel.forward(plan_, args_);
  }

 private:
  // What the forward leaves for a backward, and the running statistics of inference.
  void fill_statistics(const Case& c) {
    PlanInput input = norm_axes(c, sizeof(T));
    input.x.data = x_.bytes();
    input.y.data = third_.bytes();
    Plan forward = make_plan(input);
    forward.threads = 1;
    norm_kernels<T>().forward(forward, args_);
  }

  Buffer<T> x_, second_, third_;
  std::string operation_;
  Plan plan_;
  NormArgs<T> args_;
  std::vector<double> mean_, mean_lo_, var_, rstd_;
  std::vector<T> weight_, bias_, dweight_, dbias_;
};

bool is_norm(const std::string& operation) {
  return operation == "moments" || (!starts_with(operation, "dropout") && operation.find("_norm") != std::string::npos);
}

// layer_norm_forward runs the kernel of layer_norm: where both have the same case, the plain name stands for it.
// Batch norm's plain name is inference, which is another kernel.
bool is_repeated(const Case& c, const std::vector<Case>& cases) {
  const size_t suffix = c.name.find("_forward-");
  if (suffix == std::string::npos || starts_with(c.operation, "batch")) return false;
  const std::string plain = std::string(c.name).erase(suffix, std::strlen("_forward"));
  return std::any_of(cases.begin(), cases.end(), [&](const Case& other) { return other.name == plain; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout and noise: contiguous, so any cut of the elements is a range, as in the Python functions

constexpr int64_t kElementsPerPart = 32768;

template <class T>
class Dropout {
 public:
  explicit Dropout(const Case& c)
      : x_(c.elements(), 1, 0.5),
        y_(c.elements(), 2),
        keep_(static_cast<size_t>(c.elements()), 1),
        count_(c.elements()) {
    const double keep = 1 - c.option("p", 0.5);
    draw_ = {{20240607, 0}, static_cast<uint64_t>(keep * 4294967296.0 + 0.5)};
    factor_ = static_cast<T>(1 / keep);
    threads_ = threads_for(count_);
    walk_.append(count_, sizeof(T), sizeof(T), 1);
    if (c.operation == "dropout_mask") kernel_ = &Dropout::mask;
    if (c.operation == "gaussian_noise") kernel_ = &Dropout::noise;
    if (c.operation == "apply_dropout_mask") kernel_ = &Dropout::apply;
  }

  bool run() {
    const int64_t parts = (count_ + kElementsPerPart - 1) / kElementsPerPart;
    parallel_for(threads_, parts, [&](int64_t part) {
      const int64_t first = part * kElementsPerPart;
      (this->*kernel_)(first, first + kElementsPerPart < count_ ? kElementsPerPart : count_ - first);
    });
    return true;
  }

 private:
  void drop(int64_t first, int64_t count) {
    dropout_kernels<T>().drop(y_.bytes(), x_.bytes(), walk_, first, count, draw_, factor_, {});
  }
  void mask(int64_t first, int64_t count) {
    dropout_kernels<T>().keep_mask(keep_.data() + first, walk_, first, count, draw_);
  }
  void noise(int64_t first, int64_t count) {
    dropout_kernels<T>().gaussian_noise(y_.bytes(), x_.bytes(), walk_, first, count, draw_.stream, 0.5);
  }
  void apply(int64_t first, int64_t count) {
    const char* keep = reinterpret_cast<const char*>(keep_.data());
    dropout_kernels<T>().apply_mask(y_.bytes(), x_.bytes(), keep, walk_, first, count, factor_);
  }

  Buffer<T> x_, y_;
  std::vector<uint8_t> keep_;
  int64_t count_;
  int threads_ = 1;
  T factor_ = 1;
  MaskDraw draw_{};
  ElementWalk walk_;
  void (Dropout::*kernel_)(int64_t, int64_t) = &Dropout::drop;
};

// dropout's forward, backward and DropConnect are one kernel; the residual step is composed of kernels that are here.
bool is_dropout(const std::string& operation) {
  return operation == "dropout" || operation == "dropout_mask" || operation == "apply_dropout_mask" ||
         operation == "gaussian_noise";
}

// ---------------------------------------------------------------------------------------------------------------------
// Registration

void report(benchmark::State& state, int64_t bytes) {
  state.counters["GB"] =  // shown as GB=47.2/s
      benchmark::Counter(static_cast<double>(bytes) * static_cast<double>(state.iterations()) / 1e9,
                         benchmark::Counter::kIsRate);
}

template <class Work>
void measure(benchmark::State& state, const Case& c, const char* level, int64_t bytes) {
  select(level);
  Work work(c);
  for (auto _ : state) {
    if (!work.run()) {
      state.SkipWithError("no memory for the workspace");
      break;
    }
    benchmark::ClobberMemory();
  }
  report(state, bytes);
}

void copy(benchmark::State& state, int64_t bytes) {
  Buffer<char> from(bytes / 2, 1), to(bytes / 2, 2);
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), static_cast<size_t>(bytes / 2));
    benchmark::ClobberMemory();
  }
  report(state, bytes);
}

// What a backward could reach at most: two arrays read, one written.
void add(benchmark::State& state, int64_t bytes) {
  const int64_t count = bytes / 3 / static_cast<int64_t>(sizeof(float));
  Buffer<float> a(count, 1), b(count, 2), sum(count, 3);
  const float *const first = a.data(), *const second = b.data();
  float* const to = sum.data();
  for (auto _ : state) {
    for (int64_t i = 0; i < count; ++i) to[i] = first[i] + second[i];
    benchmark::ClobberMemory();
  }
  report(state, bytes);
}

template <class T>
void register_case(const Case& c, const std::string& dtype, const char* level) {
  const std::string name = c.name + "/" + dtype + "/" + level;
  const int64_t bytes = c.bytes(sizeof(T));
  void (*body)(benchmark::State&, const Case&, const char*, int64_t) = nullptr;
  if (is_norm(c.operation)) body = measure<Norm<T>>;
  if (is_dropout(c.operation)) body = measure<Dropout<T>>;
  if (body == nullptr) return;
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { body(state, c, level, bytes); })
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i], flag = "--fastnorm_threads=";
    if (starts_with(argument, flag.c_str())) {
      const int threads = std::atoi(argument.c_str() + flag.size());
      if (threads < 1) {
        std::cerr << argument << ": expected a number from 1\n";
        return 2;
      }
      set_max_threads(threads);
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  const std::vector<Case> cases = read_cases(FASTNORM_CASES);
  if (cases.empty()) {
    std::cerr << "no cases in " << FASTNORM_CASES << "\n";
    return 1;
  }
  benchmark::AddCustomContext("fastnorm_threads", std::to_string(max_threads()));
  // What the caches and the memory give: kernels are to be seen against the copy that moves about as many bytes.
  for (const int64_t kilobytes : {32, 512, 4096, 16384, 65536, 262144}) {
    const int64_t bytes = kilobytes * 1024;
    benchmark::RegisterBenchmark(("copy/" + std::to_string(kilobytes) + "_KB").c_str(),
                                 [=](benchmark::State& state) { copy(state, bytes); })
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark(("add/" + std::to_string(kilobytes) + "_KB").c_str(),
                                 [=](benchmark::State& state) { add(state, bytes); })
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
  }
  for (const Case& c : cases) {
    if (is_repeated(c, cases)) continue;
    for (const std::string& dtype : c.dtypes) {
      for (int i = 0; compiled_level(i) != nullptr; ++i) {
        if (!cpu_supports(compiled_level(i))) continue;
        if (dtype == "float32") register_case<float>(c, dtype, compiled_level(i));
        if (dtype == "float64") register_case<double>(c, dtype, compiled_level(i));
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
