// The interpreter's side of a call: numbers as Python passes them, the entry points' calling convention, and the
// interpreter's lock, released for large work alone. Nothing here knows of arrays.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace fastnorm {

namespace py = pybind11;

// A number that needs no conversion with a message: a float or an int, and not a bool.
inline bool as_number(py::handle object, double* value) {
  if (PyFloat_Check(object.ptr())) {
    *value = PyFloat_AS_DOUBLE(object.ptr());
    return true;
  }
  if (!PyLong_CheckExact(object.ptr())) return false;
  *value = PyLong_AsDouble(object.ptr());
  if (*value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

inline bool as_integer(py::handle object, int64_t* value) {
  if (!PyLong_CheckExact(object.ptr())) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  return overflow == 0;
}

// While verification is on, every fast entry declines, so that the Python layer sees the call.
bool verifying();

// Below this a call is over before another thread could take the interpreter lock.
constexpr int64_t kReleaseElements = 32768;

// The interpreter ends a thread that asks for its lock after the end of the program, by unwinding it. There is nothing
// to unwind to here: results belong to an interpreter that is gone. Such a thread stops where it is, and goes with the
// process.
inline void take_lock_back(PyThreadState* state) {
#ifdef __GLIBCXX__
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state);
#endif
}

class ReleaseForLargeWork {
 public:
  explicit ReleaseForLargeWork(int64_t elements)
      : state_(elements >= kReleaseElements ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseForLargeWork() {
    if (state_) take_lock_back(state_);
  }
  ReleaseForLargeWork(const ReleaseForLargeWork&) = delete;
  ReleaseForLargeWork& operator=(const ReleaseForLargeWork&) = delete;

 private:
  PyThreadState* state_;
};

// An entry point takes `expected` positional arguments and, after them, `checked`: that the Python layer has already
// looked at the call. Plain vector calls, because pybind11's dispatcher costs as much as a small norm.
// body(checked) returns the result or throws.
template <class Body>
inline PyObject* enter(Py_ssize_t given, Py_ssize_t expected, PyObject* const* args, const Body& body) {
  try {
    if (given != expected && given != expected + 1) {
      PyErr_Format(PyExc_TypeError, "got %zd arguments; expected %zd or %zd", given, expected, expected + 1);
      return nullptr;
    }
    py::object result = body(given > expected && args[expected] == Py_True);
    return result.release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
#ifdef __GLIBCXX__
  } catch (abi::__forced_unwind&) {
    throw;
#endif
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

using Entry = PyObject* (*)(PyObject* module, PyObject* const* args, Py_ssize_t count);

inline PyMethodDef method(const char* name, Entry entry, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry)), METH_FASTCALL, doc};
}

}  // namespace fastnorm
