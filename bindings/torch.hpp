// PyTorch as this module sees it: Python objects, and the C functions of DLPack's exchange API that every torch.Tensor offers.
// Nothing of PyTorch is needed to build; it is imported when the first tensor comes.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "unswag/unswag.hpp"

namespace unswag::python {

namespace nb = nanobind;

// DLPack 1.2, as far as it is used here (https://dmlc.github.io/dlpack/latest/c_api.html).
namespace dlpack {
struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t type_code, type_bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};
struct Exchange {
  std::uint32_t major, minor;
  Exchange* earlier;
  int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};
}  // namespace dlpack

// A tensor as rows of adjacent elements.
struct TensorRows {
  dlpack::Tensor tensor;
  DType dtype;
  std::int64_t rows, cols, stride;

  ConstRows in() const { return {tensor.data, dtype, rows, cols, stride}; }
  Rows out() const { return {tensor.data, dtype, rows, cols, stride}; }
  ConstVector vector() const { return {tensor.data, dtype, cols}; }
  std::span<const std::int64_t> shape() const { return {tensor.shape, static_cast<std::size_t>(tensor.ndim)}; }
  bool is_beside(const TensorRows& other) const {
    return tensor.device_type == other.tensor.device_type && tensor.device_id == other.tensor.device_id;
  }
  bool is_dense() const { return tensor.ndim > 0 && rows > 0 && cols > 0 && (rows == 1 || stride == cols); }  // has elements
  bool is_shaped_like(const TensorRows& other) const;  // the same device and shape
  bool is_like(const TensorRows& other) const { return dtype == other.dtype && is_shaped_like(other); }
};

class Torch {
 public:
  static const Torch& get();  // raises ImportError where there is no PyTorch

  bool is_tensor(nb::handle x) const { return x.type().ptr() == tensor_.ptr() || is_parameter(x); }
  bool is_parameter(nb::handle x) const { return x.type().ptr() == parameter_.ptr(); }

  // Whether an op may be called past PyTorch's dispatcher: no mode, transform, tracer or profiler would see the call, and no
  // graph is being recorded.
  bool is_eager() const;

  // Whether autograd alone would see a Function: torch.func and forward mode are off.
  bool is_reverse_mode() const;

  // Whether the kernel of an op may be handed `x`: a plain tensor on a device with kernels, or no tensor at all.
  bool is_plain(nb::handle x) const;

  // The dtype of an ordinary tensor; none for one without kernels, and for other objects.
  std::optional<DType> dtype_of(nb::handle x) const;

  // Of a plain tensor on the CPU: its sizes, strides and dtype, valid as long as `x` is; none for others.
  std::optional<dlpack::Tensor> on_cpu(nb::handle x) const;

  // `x` as it lies in memory; none for what a kernel cannot read there: other types than torch.Tensor and its Parameter, other
  // devices and dtypes, elements that are no rows or not aligned, and tensors whose values are not what their memory holds.
  std::optional<TensorRows> rows(nb::handle x) const;

  TensorRows made(nb::handle x) const;  // of a tensor that `empty_like` or `empty` has just made

  nb::object empty_like(nb::handle x) const;  // contiguous
  nb::object empty_like(nb::handle x, nb::handle dtype) const;
  nb::object empty(std::span<const std::int64_t> shape, DType dtype, nb::handle device_of) const;
  std::optional<DType> dtype(nb::handle torch_dtype) const;

  nb::object empty_cpu(nb::handle dtype) const;  // of no elements

  bool is_grad_enabled() const;
  bool is_inference() const;

  Stream stream(const TensorRows& x) const;  // the current one of its device

 private:
  Torch();

  bool read(nb::handle x, dlpack::Tensor& out) const;  // false for what `rows` and `is_plain` exclude

  static nb::object call(const nb::object& function, const nb::object& arguments, const nb::object& constants);

  nb::object tensor_, parameter_;
  nb::object empty_like_, empty_, new_empty_, is_neg_, threads_;
  nb::dict in_order_;                 // memory_format=torch.contiguous_format
  std::array<nb::object, 4> dtypes_;  // in the order of `dtypes`
  std::array<nb::dict, 4> of_dtype_;  // dtype=…, in that order
  std::array<nb::object, 4> counts_;  // functions that say how many modes are in place
  std::array<nb::object, 2> nones_;   // functions that say None where there is nothing
  nb::object is_grad_enabled_, is_inference_, is_wrapped_, forward_mode_;
  const dlpack::Exchange* exchange_ = nullptr;
};

}  // namespace unswag::python
