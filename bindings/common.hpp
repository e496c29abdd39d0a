// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include "unswag/unswag.hpp"

namespace unswag::python {

namespace nb = nanobind;

[[noreturn]] void raise(const Status& status);
void check(const Status& status);

// Statistics and gradients of weights are float, or double beside double tensors.
constexpr DType wide(DType t) { return t == DType::f64 ? t : DType::f32; }

// Runs an entry point of the library without the global lock.
template <class Args>
void run(Status (*entry)(const Args&, Stream), const Args& args, Stream stream) {
  Status status;
  {
    nb::gil_scoped_release unlocked;
    status = entry(args, stream);
  }
  check(status);
}

void bind_eager(nb::module_& m);
void bind_stash(nb::module_& m);
void bind_store(nb::module_& m);

}  // namespace unswag::python
