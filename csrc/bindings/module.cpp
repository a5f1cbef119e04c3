// The module: build facts, the choice of kernels, threads. The folder csrc/bindings is the only one that includes
// pybind11.
#include <pybind11/stl.h>

#include <atomic>
#include <string>
#include <vector>

#include "cpu_features.hpp"
#include "interpreter.hpp"
#include "kernel_table.hpp"
#include "parallel.hpp"

namespace fastnorm {

void bind_norm(py::module_& m);
void bind_dropout(py::module_& m);

namespace {

std::atomic<bool> verifying_flag{false};

// Names of levels, best first.
std::vector<std::string> levels(bool usable_only) {
  std::vector<std::string> found;
  for (int i = 0; const char* level = compiled_level(i); ++i) {
    if (!usable_only || cpu_supports(level)) found.emplace_back(level);
  }
  return found;
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
      "isa_levels", [] { return py::tuple(py::cast(levels(true))); },
      "Levels that this build has and this CPU can run, best first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (select(name.c_str())) return;
        const py::object usable = py::str(", ").attr("join")(levels(true));
        throw py::value_error("name is '" + name + "'; expected one of " + usable.cast<std::string>());
      },
      py::arg("name"), "Use another level from now on.");
  m.def("get_num_threads", [] { return max_threads(); }, "Most threads a call may use.");
  m.def(
      "set_num_threads",
      [](int n) {
        if (n < 1) throw py::value_error("n is " + std::to_string(n) + "; expected at least 1");
        set_max_threads(n);
      },
      py::arg("n"), "Set the most threads a call may use.");
  m.def(
      "set_verifying", [](bool on) { verifying_flag.store(on); }, py::arg("on"),
      "While on, the fast entries decline every call, so that the Python layer can check it.");
  m.def("cache_bytes", [] { return cache_bytes(); }, "Size of the last-level cache.");
  m.def(
      "set_cache_bytes", [](int64_t bytes) { set_cache_bytes(bytes); }, py::arg("bytes"),
      "Take the last-level cache to be of this size from now on: large results are written past it.");
  m.def("core_bytes", [] { return core_bytes(); }, "Size of the caches that a core has for itself.");
  m.def(
      "set_core_bytes", [](int64_t bytes) { set_core_bytes(bytes); }, py::arg("bytes"),
      "Take a core's own caches to be of this size from now on: what they do not hold is asked for.");
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
        info["levels"] = py::str(",").attr("join")(levels(false));
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
}

}  // namespace fastnorm
