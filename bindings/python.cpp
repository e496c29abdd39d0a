// unswag._core: the public C++ surface for Python, with plain integers: addresses, strides, sizes.  No torch, no numpy: a
// front end knows its tensors, checks them once and keeps them alive during the call (a DLPack capsule per call costs 40
// times as much).  Address 0 means "none".  The global lock is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.hpp"
#include "unswag/unswag.hpp"
#include "xla.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace unswag::python {

void raise(const Status& status) {
  PyObject* type = PyExc_RuntimeError;
  switch (status.code()) {
    case StatusCode::invalid_type: type = PyExc_TypeError; break;
    case StatusCode::invalid_argument: type = PyExc_ValueError; break;
    case StatusCode::not_supported: type = PyExc_NotImplementedError; break;
    case StatusCode::device_error:
    case StatusCode::ok: break;
  }
  PyErr_SetString(type, status.message().c_str());
  throw nb::python_error();
}

void check(const Status& status) {
  if (!status.ok()) raise(status);
}

}  // namespace unswag::python

namespace {

using unswag::Status;
using unswag::python::check;
using unswag::python::raise;
using unswag::python::run;
using unswag::python::wide;
using Address = std::uintptr_t;
using Size = std::int64_t;

using Names = nb::typed<nb::tuple, nb::str, nb::ellipsis>;

template <class List>
Names names(const List& list) {
  nb::list out;
  for (std::string_view name : list) out.append(name);
  return Names(nb::tuple(out));
}
// Those of a list of unswag/lists.hpp.
template <class List>
Names names_of(const List& list) {
  std::vector<std::string_view> out;
  out.reserve(list.size());
  for (const auto& entry : list) out.push_back(entry.name);
  return names(out);
}

// An integer from Python becomes an enum only if the enum has that value.
template <class Enum>
Enum code(std::uint8_t value, const char* what) {
  if (!unswag::is_listed(Enum{value})) {
    raise(unswag::invalid_argument(what, " code ", int{value}, " does not exist; codes are 0 to ",
                                   unswag::list_of(Enum{}).size() - 1));
  }
  return Enum{value};
}
unswag::DType dtype(std::uint8_t value) { return code<unswag::DType>(value, "dtype"); }
unswag::Mask mask(std::uint8_t value) { return code<unswag::Mask>(value, "mask"); }
unswag::Activation activation(std::uint8_t value) { return code<unswag::Activation>(value, "activation"); }
unswag::Block block(std::uint8_t value) { return code<unswag::Block>(value, "block codec"); }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): that is what this module is for
}

// All tensors of one call that share a dtype and a shape.
struct Shape {
  unswag::DType dtype;
  Size rows;
  Size cols;
  unswag::ConstRows in(Address data, Size stride) const { return {pointer<const void>(data), dtype, rows, cols, stride}; }
  unswag::Rows out(Address data, Size stride) const { return {pointer<void>(data), dtype, rows, cols, stride}; }
};
Shape shape(std::uint8_t dtype_code, Size rows, Size cols) { return {dtype(dtype_code), rows, cols}; }

unswag::Stream where(int device, Address stream, int threads) {
  return {.handle = pointer<void>(stream), .threads = threads, .device = device};
}

void mask_forward(std::uint8_t act, double slope, std::uint8_t dtype_code, Size rows, Size cols, Address x, Size x_stride,
                  Address y, Size y_stride, Address packed, Size packed_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::MaskForward>(unswag::mask_forward,
                           {.act = mask(act),
                            .slope = slope,
                            .x = s.in(x, x_stride),
                            .y = s.out(y, y_stride),
                            .packed = {pointer<std::uint8_t>(packed), packed_stride}},
                           where(device, stream, threads));
}

void mask_backward(std::uint8_t act, double slope, std::uint8_t dtype_code, Size rows, Size cols, Address dy, Size dy_stride,
                   Address packed, Size packed_stride, Address dx, Size dx_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::MaskBackward>(unswag::mask_backward,
                            {.act = mask(act),
                             .slope = slope,
                             .dy = s.in(dy, dy_stride),
                             .packed = {pointer<const std::uint8_t>(packed), packed_stride},
                             .dx = s.out(dx, dx_stride)},
                            where(device, stream, threads));
}

void activation_forward(std::uint8_t act, std::uint8_t dtype_code, Size rows, Size cols, Address x, Size x_stride, Address y,
                        Size y_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::ActivationForward>(unswag::activation_forward,
                                 {.act = activation(act), .x = s.in(x, x_stride), .y = s.out(y, y_stride)},
                                 where(device, stream, threads));
}

void activation_backward(std::uint8_t act, std::uint8_t dtype_code, Size rows, Size cols, Address x, Size x_stride, Address dy,
                         Size dy_stride, Address dx, Size dx_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::ActivationBackward>(
      unswag::activation_backward,
      {.act = activation(act), .x = s.in(x, x_stride), .dy = s.in(dy, dy_stride), .dx = s.out(dx, dx_stride)},
      where(device, stream, threads));
}

void gated_forward(std::uint8_t act, std::uint8_t dtype_code, Size rows, Size cols, Address gate, Size gate_stride, Address up,
                   Size up_stride, Address h, Size h_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::GatedForward>(
      unswag::gated_forward,
      {.act = activation(act), .gate = s.in(gate, gate_stride), .up = s.in(up, up_stride), .h = s.out(h, h_stride)},
      where(device, stream, threads));
}

void gated_backward(std::uint8_t act, std::uint8_t dtype_code, Size rows, Size cols, Address gate, Size gate_stride, Address up,
                    Size up_stride, Address dh, Size dh_stride, Address dgate, Size dgate_stride, Address dup, Size dup_stride,
                    Address h, Size h_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::GatedBackward>(unswag::gated_backward,
                             {.act = activation(act),
                              .gate = s.in(gate, gate_stride),
                              .up = s.in(up, up_stride),
                              .dh = s.in(dh, dh_stride),
                              .dgate = s.out(dgate, dgate_stride),
                              .dup = s.out(dup, dup_stride),
                              .h = s.out(h, h_stride)},
                             where(device, stream, threads));
}

void rms_norm_forward(double eps, double weight_offset, bool cast_before_weight, bool rstd_given, Size rows, Size cols,
                      std::uint8_t x_dtype, Address x, Size x_stride, std::uint8_t weight_dtype, Address weight,
                      std::uint8_t y_dtype, Address y, Size y_stride, Address rstd, int device, Address stream, int threads) {
  const Shape s = shape(x_dtype, rows, cols);
  run<unswag::RmsNormForward>(unswag::rms_norm_forward,
                              {.x = s.in(x, x_stride),
                               .weight = {pointer<const void>(weight), dtype(weight_dtype), cols},
                               .eps = eps,
                               .weight_offset = weight_offset,
                               .cast_before_weight = cast_before_weight,
                               .rstd_given = rstd_given,
                               .y = shape(y_dtype, rows, cols).out(y, y_stride),
                               .rstd = {pointer<void>(rstd), wide(s.dtype), rows}},
                              where(device, stream, threads));
}

void rms_norm_backward(double weight_offset, bool cast_before_weight, Size rows, Size cols, std::uint8_t x_dtype, Address x,
                       Size x_stride, std::uint8_t weight_dtype, Address weight, Address rstd, std::uint8_t dy_dtype,
                       Address dy, Size dy_stride, Address dx, Size dx_stride, Address dw, Address scratch, int device,
                       Address stream, int threads) {
  const Shape s = shape(x_dtype, rows, cols);
  run<unswag::RmsNormBackward>(unswag::rms_norm_backward,
                               {.x = s.in(x, x_stride),
                                .weight = {pointer<const void>(weight), dtype(weight_dtype), cols},
                                .rstd = {pointer<const void>(rstd), wide(s.dtype), rows},
                                .dy = shape(dy_dtype, rows, cols).in(dy, dy_stride),
                                .weight_offset = weight_offset,
                                .cast_before_weight = cast_before_weight,
                                .dx = s.out(dx, dx_stride),
                                .dw = {pointer<void>(dw), wide(s.dtype), cols},
                                .scratch = pointer<void>(scratch)},
                               where(device, stream, threads));
}

void layer_norm_forward(double eps, bool statistics_given, Size rows, Size cols, std::uint8_t x_dtype, Address x, Size x_stride,
                        std::uint8_t weight_dtype, Address weight, std::uint8_t bias_dtype, Address bias, std::uint8_t y_dtype,
                        Address y, Size y_stride, Address mean, Address rstd, int device, Address stream, int threads) {
  const Shape s = shape(x_dtype, rows, cols);
  run<unswag::LayerNormForward>(unswag::layer_norm_forward,
                                {.x = s.in(x, x_stride),
                                 .weight = {pointer<const void>(weight), dtype(weight_dtype), cols},
                                 .bias = {pointer<const void>(bias), dtype(bias_dtype), cols},
                                 .eps = eps,
                                 .statistics_given = statistics_given,
                                 .y = shape(y_dtype, rows, cols).out(y, y_stride),
                                 .mean = {pointer<void>(mean), wide(s.dtype), rows},
                                 .rstd = {pointer<void>(rstd), wide(s.dtype), rows}},
                                where(device, stream, threads));
}

void layer_norm_backward(Size rows, Size cols, std::uint8_t x_dtype, Address x, Size x_stride, std::uint8_t weight_dtype,
                         Address weight, Address mean, Address rstd, std::uint8_t dy_dtype, Address dy, Size dy_stride,
                         Address dx, Size dx_stride, Address dw, Address db, Address scratch, int device, Address stream,
                         int threads) {
  const Shape s = shape(x_dtype, rows, cols);
  run<unswag::LayerNormBackward>(unswag::layer_norm_backward,
                                 {.x = s.in(x, x_stride),
                                  .weight = {pointer<const void>(weight), dtype(weight_dtype), cols},
                                  .mean = {pointer<const void>(mean), wide(s.dtype), rows},
                                  .rstd = {pointer<const void>(rstd), wide(s.dtype), rows},
                                  .dy = shape(dy_dtype, rows, cols).in(dy, dy_stride),
                                  .dx = s.out(dx, dx_stride),
                                  .dw = {pointer<void>(dw), wide(s.dtype), cols},
                                  .db = {pointer<void>(db), wide(s.dtype), cols},
                                  .scratch = pointer<void>(scratch)},
                                 where(device, stream, threads));
}

void cross_entropy(std::uint8_t dtype_code, Size rows, Size cols, Address logits, Size logits_stride, Address labels,
                   Address class_weight, Address row_scale, double gradient_scale, Size ignore_index, double label_smoothing,
                   double softcap, double logit_scale, bool write_gradient, Address loss, Address lse, int device,
                   Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  const unswag::DType w = wide(s.dtype);
  run<unswag::CrossEntropy>(unswag::cross_entropy,
                            {.logits = s.out(logits, logits_stride),
                             .labels = pointer<const std::int64_t>(labels),
                             .class_weight = {pointer<const void>(class_weight), w, cols},
                             .row_scale = {pointer<const void>(row_scale), w, rows},
                             .gradient_scale = gradient_scale,
                             .ignore_index = ignore_index,
                             .label_smoothing = label_smoothing,
                             .softcap = softcap,
                             .logit_scale = logit_scale,
                             .write_gradient = write_gradient,
                             .loss = {pointer<void>(loss), w, rows},
                             .lse = {pointer<void>(lse), w, rows}},
                            where(device, stream, threads));
}

void block_encode(std::uint8_t codec, bool stochastic, std::uint64_t seed, std::uint64_t offset, std::uint8_t dtype_code,
                  Size rows, Size cols, Address x, Size x_stride, Address packed, Size packed_stride, int device,
                  Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::BlockEncode>(unswag::block_encode,
                           {.codec = block(codec),
                            .x = s.in(x, x_stride),
                            .packed = {pointer<std::uint8_t>(packed), packed_stride},
                            .stochastic = stochastic,
                            .seed = seed,
                            .offset = offset},
                           where(device, stream, threads));
}

void block_decode(std::uint8_t codec, std::uint8_t dtype_code, Size rows, Size cols, Address packed, Size packed_stride,
                  Address x, Size x_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::BlockDecode>(
      unswag::block_decode,
      {.codec = block(codec), .packed = {pointer<const std::uint8_t>(packed), packed_stride}, .x = s.out(x, x_stride)},
      where(device, stream, threads));
}

void philox_fill(Address out, Size n, std::uint64_t seed, std::uint64_t offset, int device, Address stream, int threads) {
  Status status;
  {
    nb::gil_scoped_release unlocked;
    status = unswag::philox_fill(pointer<std::uint32_t>(out), n, seed, offset, where(device, stream, threads));
  }
  check(status);
}

void dropout(double p, std::uint64_t seed, std::uint64_t offset, std::uint8_t dtype_code, Size rows, Size cols, Address x,
             Size x_stride, Address y, Size y_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::Dropout>(unswag::dropout,
                       {.x = s.in(x, x_stride), .y = s.out(y, y_stride), .p = p, .seed = seed, .offset = offset},
                       where(device, stream, threads));
}

// Bounds or levels of a codebook: a list of numbers, which the core counts.
template <std::size_t n>
int numbers(const char* op, const char* name, const std::vector<double>& list, double (&out)[n]) {
  if (list.size() > n) raise(unswag::invalid_argument(op, ": ", list.size(), " ", name, "; pass at most ", n));
  std::copy(list.begin(), list.end(), out);
  return static_cast<int>(list.size());
}

void code_forward(std::uint8_t act, bool of_derivative, int bits, const std::vector<double>& bounds, std::uint8_t dtype_code,
                  Size rows, Size cols, Address x, Size x_stride, Address y, Size y_stride, Address packed, Size packed_stride,
                  int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  unswag::CodeForward args{.act = activation(act),
                           .of_derivative = of_derivative,
                           .bits = bits,
                           .x = s.in(x, x_stride),
                           .y = s.out(y, y_stride),
                           .packed = {pointer<std::uint8_t>(packed), packed_stride}};
  args.count = numbers("code_forward", "bounds", bounds, args.bounds);
  run<unswag::CodeForward>(unswag::code_forward, args, where(device, stream, threads));
}

void code_backward(int bits, const std::vector<double>& levels, std::uint8_t dtype_code, Size rows, Size cols, Address dy,
                   Size dy_stride, Address packed, Size packed_stride, Address dx, Size dx_stride, int device, Address stream,
                   int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  unswag::CodeBackward args{.bits = bits,
                            .dy = s.in(dy, dy_stride),
                            .packed = {pointer<const std::uint8_t>(packed), packed_stride},
                            .dx = s.out(dx, dx_stride)};
  args.count = numbers("code_backward", "levels", levels, args.levels);
  run<unswag::CodeBackward>(unswag::code_backward, args, where(device, stream, threads));
}

void dither_forward(std::uint8_t act, int bits, std::uint64_t seed, std::uint64_t offset, std::uint8_t dtype_code, Size rows,
                    Size cols, Address x, Size x_stride, Address y, Size y_stride, Address packed, Size packed_stride,
                    int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::DitherForward>(unswag::dither_forward,
                             {.act = activation(act),
                              .bits = bits,
                              .seed = seed,
                              .offset = offset,
                              .x = s.in(x, x_stride),
                              .y = s.out(y, y_stride),
                              .packed = {pointer<std::uint8_t>(packed), packed_stride}},
                             where(device, stream, threads));
}

void dither_backward(std::uint8_t act, int bits, std::uint64_t seed, std::uint64_t offset, std::uint8_t dtype_code, Size rows,
                     Size cols, Address dy, Size dy_stride, Address packed, Size packed_stride, Address dx, Size dx_stride,
                     int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::DitherBackward>(unswag::dither_backward,
                              {.act = activation(act),
                               .bits = bits,
                               .seed = seed,
                               .offset = offset,
                               .dy = s.in(dy, dy_stride),
                               .packed = {pointer<const std::uint8_t>(packed), packed_stride},
                               .dx = s.out(dx, dx_stride)},
                              where(device, stream, threads));
}

void nonzero_count(std::uint8_t dtype_code, Size rows, Size cols, Address x, Size x_stride, Address counts, int device,
                   Address stream, int threads) {
  run<unswag::NonzeroCount>(unswag::nonzero_count,
                            {.x = shape(dtype_code, rows, cols).in(x, x_stride), .counts = pointer<std::int64_t>(counts)},
                            where(device, stream, threads));
}

void nonzero_encode(std::uint8_t dtype_code, Size rows, Size cols, Address x, Size x_stride, Address offsets, Address bitmap,
                    Size bitmap_stride, Address values, Size size, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::NonzeroEncode>(unswag::nonzero_encode,
                             {.x = s.in(x, x_stride),
                              .offsets = pointer<const std::int64_t>(offsets),
                              .bitmap = {pointer<std::uint8_t>(bitmap), bitmap_stride},
                              .values = {pointer<void>(values), s.dtype, size}},
                             where(device, stream, threads));
}

void nonzero_decode(std::uint8_t dtype_code, Size rows, Size cols, Address bitmap, Size bitmap_stride, Address offsets,
                    Address values, Size size, Address x, Size x_stride, int device, Address stream, int threads) {
  const Shape s = shape(dtype_code, rows, cols);
  run<unswag::NonzeroDecode>(unswag::nonzero_decode,
                             {.bitmap = {pointer<const std::uint8_t>(bitmap), bitmap_stride},
                              .offsets = pointer<const std::int64_t>(offsets),
                              .values = {pointer<const void>(values), s.dtype, size},
                              .x = s.out(x, x_stride)},
                             where(device, stream, threads));
}

// The driver may be asked, which takes its time when it starts.
std::string cuda_problem(int device) {
  nb::gil_scoped_release unlocked;
  return unswag::cuda_problem(device);
}

template <std::size_t n>
nb::dict capsules(const std::array<XlaTarget, n>& targets) {
  nb::dict out;
  for (const XlaTarget& target : targets) out[target.name] = nb::capsule(target.handler);
  return out;
}

}  // namespace

NB_MODULE(_core, m) {
#ifdef NDEBUG
  nb::set_leak_warnings(false);  // a tensor that a script still has at its end holds objects of ours, as every extension's
#endif
  m.doc() = R"(The C++ core: addresses, strides and sizes are integers; address 0 means none.

Strides count elements, those of packed rows bytes.  Codes are positions in `dtypes`, `masks`, `activations` and `blocks`.
Work runs on `device`: -1, the CPU, on `threads` threads (0: the library's default), or a CUDA device, where it is queued in the
stream of the handle `stream` and every address is memory of that device.  Errors: TypeError (dtype, layout), ValueError (value,
shape), NotImplementedError (no kernel), RuntimeError (device).  The global lock is released while kernels run.)";
  m.attr("dtypes") = names_of(unswag::dtypes);
  m.attr("masks") = names_of(unswag::masks);
  m.attr("activations") = names_of(unswag::activations);
  m.attr("blocks") = names_of(unswag::blocks);
  std::vector<std::string_view> dithered;
  for (const auto& [act, name] : unswag::activations)
    if (unswag::has_dither(act)) dithered.push_back(name);
  m.attr("dithered") = names(dithered);
  nb::dict forms;
  for (const unswag::BlockForm& form : unswag::blocks) {
    forms[nb::str(form.name.data(), form.name.size())] = nb::make_tuple(form.n, form.bits, form.rotated);
  }
  m.attr("block_forms") = forms;

  m.def("mask_forward", &mask_forward, "act"_a, "slope"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "y"_a,
        "y_stride"_a, "packed"_a, "packed_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("mask_backward", &mask_backward, "act"_a, "slope"_a, "dtype"_a, "rows"_a, "cols"_a, "dy"_a, "dy_stride"_a, "packed"_a,
        "packed_stride"_a, "dx"_a, "dx_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("activation_forward", &activation_forward, "act"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "y"_a,
        "y_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("activation_backward", &activation_backward, "act"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "dy"_a,
        "dy_stride"_a, "dx"_a, "dx_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("gated_forward", &gated_forward, "act"_a, "dtype"_a, "rows"_a, "cols"_a, "gate"_a, "gate_stride"_a, "up"_a,
        "up_stride"_a, "h"_a, "h_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("gated_backward", &gated_backward, "act"_a, "dtype"_a, "rows"_a, "cols"_a, "gate"_a, "gate_stride"_a, "up"_a,
        "up_stride"_a, "dh"_a, "dh_stride"_a, "dgate"_a, "dgate_stride"_a, "dup"_a, "dup_stride"_a, "h"_a, "h_stride"_a,
        "device"_a, "stream"_a, "threads"_a);
  m.def("rms_norm_forward", &rms_norm_forward, "eps"_a, "weight_offset"_a, "cast_before_weight"_a, "rstd_given"_a, "rows"_a,
        "cols"_a, "x_dtype"_a, "x"_a, "x_stride"_a, "weight_dtype"_a, "weight"_a, "y_dtype"_a, "y"_a, "y_stride"_a, "rstd"_a,
        "device"_a, "stream"_a, "threads"_a);
  m.def("rms_norm_backward", &rms_norm_backward, "weight_offset"_a, "cast_before_weight"_a, "rows"_a, "cols"_a, "x_dtype"_a,
        "x"_a, "x_stride"_a, "weight_dtype"_a, "weight"_a, "rstd"_a, "dy_dtype"_a, "dy"_a, "dy_stride"_a, "dx"_a, "dx_stride"_a,
        "dw"_a, "scratch"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("layer_norm_forward", &layer_norm_forward, "eps"_a, "statistics_given"_a, "rows"_a, "cols"_a, "x_dtype"_a, "x"_a,
        "x_stride"_a, "weight_dtype"_a, "weight"_a, "bias_dtype"_a, "bias"_a, "y_dtype"_a, "y"_a, "y_stride"_a, "mean"_a,
        "rstd"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("layer_norm_backward", &layer_norm_backward, "rows"_a, "cols"_a, "x_dtype"_a, "x"_a, "x_stride"_a, "weight_dtype"_a,
        "weight"_a, "mean"_a, "rstd"_a, "dy_dtype"_a, "dy"_a, "dy_stride"_a, "dx"_a, "dx_stride"_a, "dw"_a, "db"_a, "scratch"_a,
        "device"_a, "stream"_a, "threads"_a);
  m.def("cross_entropy", &cross_entropy, "dtype"_a, "rows"_a, "cols"_a, "logits"_a, "logits_stride"_a, "labels"_a,
        "class_weight"_a, "row_scale"_a, "gradient_scale"_a, "ignore_index"_a, "label_smoothing"_a, "softcap"_a,
        "logit_scale"_a, "write_gradient"_a, "loss"_a, "lse"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("block_encode", &block_encode, "codec"_a, "stochastic"_a, "seed"_a, "offset"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a,
        "x_stride"_a, "packed"_a, "packed_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("block_decode", &block_decode, "codec"_a, "dtype"_a, "rows"_a, "cols"_a, "packed"_a, "packed_stride"_a, "x"_a,
        "x_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def(
      "block_row_bytes", [](std::uint8_t codec, Size cols) { return unswag::block_row_bytes(block(codec), cols); }, "codec"_a,
      "cols"_a);
  m.def("philox_fill", &philox_fill, "out"_a, "n"_a, "seed"_a, "offset"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("dropout", &dropout, "p"_a, "seed"_a, "offset"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "y"_a,
        "y_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("code_forward", &code_forward, "act"_a, "of_derivative"_a, "bits"_a, "bounds"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a,
        "x_stride"_a, "y"_a, "y_stride"_a, "packed"_a, "packed_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("code_backward", &code_backward, "bits"_a, "levels"_a, "dtype"_a, "rows"_a, "cols"_a, "dy"_a, "dy_stride"_a, "packed"_a,
        "packed_stride"_a, "dx"_a, "dx_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("dither_forward", &dither_forward, "act"_a, "bits"_a, "seed"_a, "offset"_a, "dtype"_a, "rows"_a, "cols"_a, "x"_a,
        "x_stride"_a, "y"_a, "y_stride"_a, "packed"_a, "packed_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("dither_backward", &dither_backward, "act"_a, "bits"_a, "seed"_a, "offset"_a, "dtype"_a, "rows"_a, "cols"_a, "dy"_a,
        "dy_stride"_a, "packed"_a, "packed_stride"_a, "dx"_a, "dx_stride"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("nonzero_count", &nonzero_count, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "counts"_a, "device"_a, "stream"_a,
        "threads"_a);
  m.def("nonzero_encode", &nonzero_encode, "dtype"_a, "rows"_a, "cols"_a, "x"_a, "x_stride"_a, "offsets"_a, "bitmap"_a,
        "bitmap_stride"_a, "values"_a, "size"_a, "device"_a, "stream"_a, "threads"_a);
  m.def("nonzero_decode", &nonzero_decode, "dtype"_a, "rows"_a, "cols"_a, "bitmap"_a, "bitmap_stride"_a, "offsets"_a,
        "values"_a, "size"_a, "x"_a, "x_stride"_a, "device"_a, "stream"_a, "threads"_a);

  m.def("rms_norm_backward_scratch", &unswag::rms_norm_backward_scratch, "rows"_a, "cols"_a,
        "Bytes of scratch memory that rms_norm_backward needs on a device when it is given dw.");
  m.def("layer_norm_backward_scratch", &unswag::layer_norm_backward_scratch, "rows"_a, "cols"_a,
        "Bytes of scratch memory that layer_norm_backward needs on a device when it is given dw or db.");
  m.def("cuda_problem", &cuda_problem, "device"_a,
        "Why kernels cannot run on this CUDA device and what to do about it, or an empty string.");
  m.def(
      "cuda_architectures", [] { return names(unswag::cuda_architectures()); },
      "The architectures that the CUDA kernels were compiled for; empty where this build has none.");

  using Capsules = nb::typed<nb::dict, nb::str, nb::object>;
  m.def(
      "xla_targets",
      [] {
        nb::dict out;
        out["cpu"] = capsules(xla_cpu_targets);
        if (!unswag::cuda_architectures().empty()) out["CUDA"] = capsules(xla_cuda_targets);
        return nb::typed<nb::dict, nb::str, Capsules>(out);
      },
      "The capsules of the handlers for XLA, by XLA's name of the platform and the name of the target.");

  m.def("backend_names", [] { return names(unswag::backend_names()); });
  m.def("backend_runs_here", &unswag::backend_runs_here, "name"_a);
  m.def("current_backend", &unswag::current_backend);
  m.def("use_backend", [](std::string_view name) { check(unswag::use_backend(name)); }, "name"_a);
  m.def("default_threads", &unswag::default_threads);
  m.def("version", &unswag::version);

  unswag::python::bind_eager(m);
  unswag::python::bind_facts(m);
  unswag::python::bind_stash(m);
  unswag::python::bind_store(m);
}
