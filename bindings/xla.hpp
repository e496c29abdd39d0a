// The handlers of bindings/xla.cpp for XLA's foreign function interface, by where they run.
#pragma once

#include <array>

struct XlaTarget {
  const char* name;  // what jax registers it as; another set of buffers or attributes is another version
  void* handler;
};
extern const std::array<XlaTarget, 6> xla_cpu_targets;
extern const std::array<XlaTarget, 6> xla_cuda_targets;
