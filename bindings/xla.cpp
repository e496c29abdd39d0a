// XLA FFI handlers: the core's entry points for jitted JAX functions, on the CPU and on CUDA devices.  Built against the oldest
// headers of the interface that we support (third_party/xla, API 0.1): newer jaxlibs accept them, older ones would refuse newer
// headers.
//
// A buffer [..., cols] is rows of cols elements without gaps; packed rows are uint32 words (docs/format.md).
#include "xla.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "unswag/unswag.hpp"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Output = ffi::Result<AnyBuffer>;
using unswag::Status;

ffi::Error done(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(status.message());
}

// Where a handler runs: what XLA gives it for that, and what the core makes of it.
struct OnCpu {
  using Context = ffi::ThreadPool;
  using Given = ffi::ThreadPool;
  static constexpr std::initializer_list<ffi::Traits> traits{};

  // No more threads than XLA has: whoever limits those limits ours.
  static unswag::Stream stream(const Given& pool) {
    const std::int64_t threads = std::min<std::int64_t>(pool.num_threads(), unswag::default_threads());
    return {.handle = nullptr, .threads = static_cast<int>(std::max<std::int64_t>(threads, 0))};
  }

  // Whether comparisons here take subnormals for zeros, as in XLA's threads.
  static bool flushes_subnormals() {
    const volatile float least = std::numeric_limits<float>::denorm_min();
    return !(least > 0);
  }
};

// XLA makes the device of its stream the current one before it calls.  A call always queues the same kernels, so XLA may record
// it into a CUDA graph.
struct OnCuda {
  using Context = ffi::PlatformStream<void*>;
  using Given = void*;
  static constexpr std::initializer_list<ffi::Traits> traits{ffi::Traits::kCmdBufferCompatible};

  static unswag::Stream stream(void* handle) { return {.handle = handle, .device = unswag::Stream::current}; }
  static bool flushes_subnormals() { return false; }
};

// A number without a name in the enum becomes another one without: the core refuses it.
template <class Enum>
Enum code(std::int64_t value) {
  return static_cast<Enum>(value < 0 || value > 255 ? 255 : value);
}

unswag::DType dtype(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return unswag::DType::f32;
    case ffi::F16: return unswag::DType::f16;
    case ffi::BF16: return unswag::DType::bf16;
    case ffi::F64: return unswag::DType::f64;
    default: return static_cast<unswag::DType>(255);  // refused by the core
  }
}

struct Shape {
  std::int64_t rows = 1;
  std::int64_t cols = 1;
  explicit Shape(const AnyBuffer& x) {
    for (const std::int64_t size : x.dimensions()) rows *= std::exchange(cols, size);
  }
};
unswag::ConstRows in(const AnyBuffer& x) {
  const Shape s(x);
  return {x.untyped_data(), dtype(x.element_type()), s.rows, s.cols, s.cols};
}
unswag::Rows out(Output& y) {
  const Shape s(*y);
  return {y->untyped_data(), dtype(y->element_type()), s.rows, s.cols, s.cols};
}

// The core sees only the address of packed rows; here is their shape.
Status fits(const char* op, const AnyBuffer& packed, const AnyBuffer& x) {
  const Shape words(packed), of(x);
  const std::int64_t expected = unswag::packed_row_bytes(of.cols, 1) / 4;
  if (packed.element_type() == ffi::U32 && words.rows == of.rows && words.cols == expected) return {};
  return unswag::invalid_argument(op, ": packed has ", words.rows, " rows of ", words.cols, " words; pass ", of.rows,
                                  " rows of ", expected, " uint32 words");
}
template <class Byte>
unswag::PackedOf<Byte> bytes(const AnyBuffer& packed) {
  return {static_cast<Byte*>(packed.untyped_data()), Shape(packed).cols * 4};
}

template <class On>
ffi::Error mask_forward(typename On::Given given, AnyBuffer x, Output y, Output packed, std::int64_t act, double slope) {
  if (const Status status = fits("mask_forward", *packed, x); !status.ok()) return done(status);
  return done(unswag::mask_forward({.act = code<unswag::Mask>(act),
                                    .slope = slope,
                                    .flush = On::flushes_subnormals(),
                                    .x = in(x),
                                    .y = out(y),
                                    .packed = bytes<std::uint8_t>(*packed)},
                                   On::stream(given)));
}

template <class On>
ffi::Error mask_backward(typename On::Given given, AnyBuffer packed, AnyBuffer dy, Output dx, std::int64_t act, double slope) {
  if (const Status status = fits("mask_backward", packed, dy); !status.ok()) return done(status);
  return done(unswag::mask_backward({.act = code<unswag::Mask>(act),
                                     .slope = slope,
                                     .dy = in(dy),
                                     .packed = bytes<const std::uint8_t>(packed),
                                     .dx = out(dx)},
                                    On::stream(given)));
}

template <class On>
ffi::Error activation_forward(typename On::Given given, AnyBuffer x, Output y, std::int64_t act) {
  return done(unswag::activation_forward({.act = code<unswag::Activation>(act), .x = in(x), .y = out(y)}, On::stream(given)));
}

template <class On>
ffi::Error activation_backward(typename On::Given given, AnyBuffer x, AnyBuffer dy, Output dx, std::int64_t act) {
  return done(unswag::activation_backward({.act = code<unswag::Activation>(act), .x = in(x), .dy = in(dy), .dx = out(dx)},
                                          On::stream(given)));
}

template <class On>
ffi::Error gated_forward(typename On::Given given, AnyBuffer gate, AnyBuffer up, Output h, std::int64_t act) {
  return done(unswag::gated_forward({.act = code<unswag::Activation>(act), .gate = in(gate), .up = in(up), .h = out(h)},
                                    On::stream(given)));
}

template <class On>
ffi::Error gated_backward(typename On::Given given, AnyBuffer gate, AnyBuffer up, AnyBuffer dh, Output dgate, Output dup,
                          std::int64_t act) {
  return done(unswag::gated_backward({.act = code<unswag::Activation>(act),
                                      .gate = in(gate),
                                      .up = in(up),
                                      .dh = in(dh),
                                      .dgate = out(dgate),
                                      .dup = out(dup)},
                                     On::stream(given)));
}

// Binds what `run` takes beside its stream, in this order: operands, results, then the attributes act and slope.
template <class On, class Run, class Binding>
auto* bind(Run run, Binding&& binding) {
  return std::forward<Binding>(binding).To(run, On::traits).release();
}
template <class On, class First, class... Rest, class Run, class Binding>
auto* bind(Run run, Binding&& binding) {
  if constexpr (std::is_same_v<First, AnyBuffer>) {
    return bind<On, Rest...>(run, std::forward<Binding>(binding).template Arg<AnyBuffer>());
  } else if constexpr (std::is_same_v<First, Output>) {
    return bind<On, Rest...>(run, std::forward<Binding>(binding).template Ret<AnyBuffer>());
  } else if constexpr (std::is_same_v<First, double>) {
    return bind<On, Rest...>(run, std::forward<Binding>(binding).template Attr<double>("slope"));
  } else {
    return bind<On, Rest...>(run, std::forward<Binding>(binding).template Attr<First>("act"));
  }
}
template <class On, class... Rest>
auto* bound(ffi::Error (*run)(typename On::Given, Rest...)) {
  return bind<On, Rest...>(run, ffi::Ffi::Bind().Ctx<typename On::Context>());
}

template <class On, auto run>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static const auto* const handler = bound<On>(run);
  return handler->Call(frame);
}

template <class On, auto run>
void* address() noexcept {
  return reinterpret_cast<void*>(&handler<On, run>);
}

template <class On>
std::array<XlaTarget, 6> targets() noexcept {
  return {{
      {"unswag_mask_forward_v1", address<On, &mask_forward<On>>()},
      {"unswag_mask_backward_v1", address<On, &mask_backward<On>>()},
      {"unswag_activation_forward_v1", address<On, &activation_forward<On>>()},
      {"unswag_activation_backward_v1", address<On, &activation_backward<On>>()},
      {"unswag_gated_forward_v1", address<On, &gated_forward<On>>()},
      {"unswag_gated_backward_v1", address<On, &gated_backward<On>>()},
  }};
}

}  // namespace

const std::array<XlaTarget, 6> xla_cpu_targets = targets<OnCpu>();
const std::array<XlaTarget, 6> xla_cuda_targets = targets<OnCuda>();
