// XLA FFI handlers on the CPU: the core's entry points for jitted JAX functions.  Built against the oldest headers of the
// interface that we support (third_party/xla, API 0.1): newer jaxlibs accept them, older ones would refuse newer headers.
//
// A buffer [..., cols] is rows of cols elements without gaps; packed rows are uint32 words (docs/format.md).
#include "xla.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
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

// No more threads than XLA has: whoever limits those limits ours.
unswag::Stream stream(const ffi::ThreadPool& pool) {
  const std::int64_t threads = std::min<std::int64_t>(pool.num_threads(), unswag::default_threads());
  return {.handle = nullptr, .threads = static_cast<int>(std::max<std::int64_t>(threads, 0))};
}

// Whether comparisons here take subnormals for zeros, as in XLA's threads.
bool flushes_subnormals() {
  const volatile float least = std::numeric_limits<float>::denorm_min();
  return !(least > 0);
}

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

ffi::Error mask_forward(ffi::ThreadPool pool, AnyBuffer x, Output y, Output packed, std::int64_t act, double slope) {
  if (const Status status = fits("mask_forward", *packed, x); !status.ok()) return done(status);
  return done(unswag::mask_forward({.act = code<unswag::Mask>(act),
                                    .slope = slope,
                                    .flush = flushes_subnormals(),
                                    .x = in(x),
                                    .y = out(y),
                                    .packed = bytes<std::uint8_t>(*packed)},
                                   stream(pool)));
}

ffi::Error mask_backward(ffi::ThreadPool pool, AnyBuffer packed, AnyBuffer dy, Output dx, std::int64_t act, double slope) {
  if (const Status status = fits("mask_backward", packed, dy); !status.ok()) return done(status);
  return done(unswag::mask_backward({.act = code<unswag::Mask>(act),
                                     .slope = slope,
                                     .dy = in(dy),
                                     .packed = bytes<const std::uint8_t>(packed),
                                     .dx = out(dx)},
                                    stream(pool)));
}

ffi::Error activation_forward(ffi::ThreadPool pool, AnyBuffer x, Output y, std::int64_t act) {
  return done(unswag::activation_forward({.act = code<unswag::Activation>(act), .x = in(x), .y = out(y)}, stream(pool)));
}

ffi::Error activation_backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer dy, Output dx, std::int64_t act) {
  return done(unswag::activation_backward({.act = code<unswag::Activation>(act), .x = in(x), .dy = in(dy), .dx = out(dx)},
                                          stream(pool)));
}

ffi::Error gated_forward(ffi::ThreadPool pool, AnyBuffer gate, AnyBuffer up, Output h, std::int64_t act) {
  return done(
      unswag::gated_forward({.act = code<unswag::Activation>(act), .gate = in(gate), .up = in(up), .h = out(h)}, stream(pool)));
}

ffi::Error gated_backward(ffi::ThreadPool pool, AnyBuffer gate, AnyBuffer up, AnyBuffer dh, Output dgate, Output dup,
                          std::int64_t act) {
  return done(unswag::gated_backward({.act = code<unswag::Activation>(act),
                                      .gate = in(gate),
                                      .up = in(up),
                                      .dh = in(dh),
                                      .dgate = out(dgate),
                                      .dup = out(dup)},
                                     stream(pool)));
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER(mask_forward_v1, mask_forward,
                       bind()
                           .Arg<AnyBuffer>()  // x
                           .Ret<AnyBuffer>()  // y
                           .Ret<AnyBuffer>()  // packed
                           .Attr<std::int64_t>("act")
                           .Attr<double>("slope"));
XLA_FFI_DEFINE_HANDLER(mask_backward_v1, mask_backward,
                       bind()
                           .Arg<AnyBuffer>()  // packed
                           .Arg<AnyBuffer>()  // dy
                           .Ret<AnyBuffer>()  // dx
                           .Attr<std::int64_t>("act")
                           .Attr<double>("slope"));
XLA_FFI_DEFINE_HANDLER(activation_forward_v1, activation_forward,
                       bind()
                           .Arg<AnyBuffer>()  // x
                           .Ret<AnyBuffer>()  // y
                           .Attr<std::int64_t>("act"));
XLA_FFI_DEFINE_HANDLER(activation_backward_v1, activation_backward,
                       bind()
                           .Arg<AnyBuffer>()  // x
                           .Arg<AnyBuffer>()  // dy
                           .Ret<AnyBuffer>()  // dx
                           .Attr<std::int64_t>("act"));
XLA_FFI_DEFINE_HANDLER(gated_forward_v1, gated_forward,
                       bind()
                           .Arg<AnyBuffer>()  // gate
                           .Arg<AnyBuffer>()  // up
                           .Ret<AnyBuffer>()  // h
                           .Attr<std::int64_t>("act"));
XLA_FFI_DEFINE_HANDLER(gated_backward_v1, gated_backward,
                       bind()
                           .Arg<AnyBuffer>()  // gate
                           .Arg<AnyBuffer>()  // up
                           .Arg<AnyBuffer>()  // dh
                           .Ret<AnyBuffer>()  // dgate
                           .Ret<AnyBuffer>()  // dup
                           .Attr<std::int64_t>("act"));

void* address(XLA_FFI_Handler* handler) noexcept { return reinterpret_cast<void*>(handler); }

}  // namespace

const std::array<XlaTarget, 6> xla_targets{{
    {"unswag_mask_forward_v1", address(mask_forward_v1)},
    {"unswag_mask_backward_v1", address(mask_backward_v1)},
    {"unswag_activation_forward_v1", address(activation_forward_v1)},
    {"unswag_activation_backward_v1", address(activation_backward_v1)},
    {"unswag_gated_forward_v1", address(gated_forward_v1)},
    {"unswag_gated_backward_v1", address(gated_backward_v1)},
}};
