// The module: build facts, the choice of kernels, threads. The folder csrc/bindings is the only one that includes pybind11.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "arrays.hpp"
#include "cpu_features.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"

namespace fastnorm {

void bind_norm(py::module_& m);
void bind_dropout(py::module_& m);

namespace {

std::atomic<bool> verifying_flag{false};

std::string levels(bool usable_only, const char* separator) {
  std::string text;
  for (int i = 0; const char* level = compiled_level(i); ++i) {
    if (usable_only && !cpu_supports(level)) continue;
    if (!text.empty()) text += separator;
    text += level;
  }
  return text;
}

void choose(const std::string& level, const std::string& source) {
  if (select(level.c_str())) return;
  throw py::value_error(source + "=" + py::repr(py::str(level)).cast<std::string>() +
                        " names no instruction-set level that this build and this CPU have; expected one of " +
                        levels(true, ", "));
}

void set_threads(py::handle threads, const std::string& source) {
  int64_t value = 0;
  if (!as_integer(threads, &value) || value < 1 || value > 4096) {
    throw py::value_error(source + " must be an integer from 1 to 4096, got " + py::repr(threads).cast<std::string>());
  }
  set_max_threads(static_cast<int>(value));
}

void read_environment() {
  if (const char* level = std::getenv("FASTNORM_ISA"); level && *level) choose(level, "FASTNORM_ISA");
  if (const char* text = std::getenv("FASTNORM_NUM_THREADS"); text && *text) {
    py::object value = py::str(text);
    const std::string digits = text;
    if (digits.size() < 10 && digits.find_first_not_of("0123456789") == std::string::npos) value = py::int_(std::stol(digits));
    set_threads(value, "FASTNORM_NUM_THREADS");
  }
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

bool verifying() { return verifying_flag.load(std::memory_order_relaxed); }

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastnorm's compiled kernels; private, see the functions of the package";
  m.attr("__version__") = FASTNORM_VERSION;
  m.def("isa", [] { return std::string(kernels().level); }, "The instruction-set level in use.");
  m.def(
      "isa_levels",
      [] {
        py::list found;
        for (int i = 0; const char* level = compiled_level(i); ++i) {
          if (cpu_supports(level)) found.append(level);
        }
        return py::tuple(found);
      },
      "Levels that this build has and this CPU can run, best first.");
  m.def("set_isa", [](const std::string& name) { choose(name, "name"); }, py::arg("name"), "Use another level from now on.");
  m.def("get_num_threads", [] { return max_threads(); }, "Most threads a call may use.");
  m.def("set_num_threads", [](py::handle n) { set_threads(n, "n"); }, py::arg("n"), "Set the most threads a call may use.");
  m.def("set_verifying", [](bool on) { verifying_flag.store(on); }, py::arg("on"),
        "While on, the fast entries decline every call, so that the Python layer can check it.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler();
#ifdef FASTNORM_OPENMP_SIMD
        info["openmp"] = "simd";
#else
        info["openmp"] = "none";
#endif
        info["levels"] = levels(false, ",");
#ifdef NDEBUG
        info["build_type"] = "release";
#else
        info["build_type"] = "debug";
#endif
        return info;
      },
      "How this module was built.");
  bind_norm(m);
  bind_dropout(m);
  read_environment();
}

}  // namespace fastnorm
