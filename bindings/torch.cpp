#include "torch.hpp"

#include <algorithm>
#include <stdexcept>

#include "common.hpp"

namespace unswag::python {

using namespace nb::literals;

namespace {

constexpr std::size_t kTransforms = 2;           // in counts_
constexpr std::int32_t kCpu = 1, kCuda = 2;      // DLDeviceType
constexpr std::uint8_t kFloat = 2, kBfloat = 4;  // DLDataTypeCode

std::optional<DType> dtype_in(const dlpack::Tensor& t) {
  if (t.lanes != 1) return std::nullopt;
  if (t.type_code == kBfloat && t.type_bits == 16) return DType::bf16;
  if (t.type_code != kFloat) return std::nullopt;
  switch (t.type_bits) {
    case 32: return DType::f32;
    case 16: return DType::f16;
    case 64: return DType::f64;
    default: return std::nullopt;
  }
}

// The one stride that walks the rows, or none.  Dimensions of size 1 say nothing.
std::optional<std::int64_t> row_stride(const dlpack::Tensor& t, std::int64_t cols) {
  const int last = t.ndim - 1;
  if (t.strides[last] != 1 && cols != 1) return std::nullopt;
  std::int64_t step = cols, span = 1;
  bool walks = false;
  for (int i = last - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (!walks) {
      step = t.strides[i];
      walks = true;
    } else if (t.strides[i] != step * span) {
      return std::nullopt;
    }
    span *= t.shape[i];
  }
  return step;
}

nb::dict constant(const char* name, const nb::object& value) {
  nb::dict made;
  made[name] = value;
  return made;
}

}  // namespace

bool TensorRows::is_shaped_like(const TensorRows& other) const {
  return is_beside(other) && std::ranges::equal(shape(), other.shape());
}

const Torch& Torch::get() {
  static const Torch* const torch = new Torch;  // its objects live as long as the interpreter
  return *torch;
}

Torch::Torch() {
  const nb::module_ torch = nb::module_::import_("torch");
  const nb::object c = torch.attr("_C");
  tensor_ = torch.attr("Tensor");
  parameter_ = torch.attr("nn").attr("Parameter");
  empty_like_ = torch.attr("empty_like");
  empty_ = torch.attr("empty");
  new_empty_ = tensor_.attr("new_empty");
  is_neg_ = tensor_.attr("is_neg");
  threads_ = torch.attr("get_num_threads");
  in_order_ = constant("memory_format", torch.attr("contiguous_format"));
  for (std::size_t i = 0; i < dtypes.size(); ++i) {
    dtypes_[i] = torch.attr(nb::str(dtypes[i].name.data(), dtypes[i].name.size()));
    of_dtype_[i] = constant("dtype", dtypes_[i]);
  }
  is_grad_enabled_ = torch.attr("is_grad_enabled");
  is_inference_ = torch.attr("is_inference_mode_enabled");
  try {
    counts_ = {c.attr("_len_torch_dispatch_stack"), c.attr("_len_torch_function_stack"),
               c.attr("_are_functorch_transforms_active"), c.attr("_autograd").attr("_profiler_enabled")};
    nones_ = {c.attr("_get_tracing_state"), c.attr("_functorch").attr("peek_interpreter_stack")};
    is_wrapped_ = c.attr("_functorch").attr("is_functorch_wrapped_tensor");
    forward_mode_ = torch.attr("autograd").attr("forward_ad");
    nb::cast<long>(forward_mode_.attr("_current_level"));
    const nb::object capsule = tensor_.attr("__dlpack_c_exchange_api__");
    exchange_ = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange_ == nullptr) throw nb::python_error();
    if (exchange_->major != 1 || exchange_->tensor_from_object == nullptr) exchange_ = nullptr;
  } catch (const nb::python_error&) {  // a PyTorch that has no such name: its dispatcher is never passed by
    exchange_ = nullptr;
  }
}

bool Torch::is_eager() const {
  if (exchange_ == nullptr) return false;
  const auto is_false = [](const nb::object& call) {
    const nb::object value = call();
    return value.is(nb::bool_(false)) || PyLong_AsLong(value.ptr()) == 0;
  };
  return !is_grad_enabled() && std::ranges::all_of(counts_, is_false) &&
         std::ranges::all_of(nones_, [](const nb::object& call) { return call().is_none(); });
}

bool Torch::is_reverse_mode() const {
  return exchange_ != nullptr && !nb::cast<bool>(counts_[kTransforms]()) &&
         nb::cast<long>(forward_mode_.attr("_current_level")) < 0;
}

bool Torch::read(nb::handle x, dlpack::Tensor& out) const {
  if (!is_tensor(x)) return false;
  if (exchange_->tensor_from_object(x.ptr(), &out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out.device_type != kCpu && out.device_type != kCuda) return false;
  // A wrapper of torch.func has no memory: it raised above, or has none here.
  if (out.data == nullptr && nb::cast<bool>(is_wrapped_(x))) return false;
  out.data = static_cast<std::byte*>(out.data) + out.byte_offset;
  return is_neg_(x).is(nb::bool_(false));
}

bool Torch::is_plain(nb::handle x) const {
  dlpack::Tensor t{};
  return nb::isinstance(x, tensor_) ? read(x, t) : true;
}

std::optional<dlpack::Tensor> Torch::on_cpu(nb::handle x) const {
  dlpack::Tensor t{};
  return exchange_ != nullptr && read(x, t) && t.device_type == kCpu ? std::optional(t) : std::nullopt;
}

std::optional<DType> Torch::dtype_of(nb::handle x) const {
  dlpack::Tensor t{};
  return read(x, t) ? dtype_in(t) : std::nullopt;
}

std::optional<TensorRows> Torch::rows(nb::handle x) const {
  TensorRows r{};
  dlpack::Tensor& t = r.tensor;
  if (!read(x, t)) return std::nullopt;
  const std::optional<DType> dtype = dtype_in(t);
  if (!dtype) return std::nullopt;
  r.dtype = *dtype;
  std::int64_t numel = 1;
  for (const std::int64_t n : r.shape()) numel *= n;
  // No memory behind elements: a tensor of zeros in forward mode, or a shard that is not there.
  if ((numel != 0 && t.data == nullptr) || reinterpret_cast<std::uintptr_t>(t.data) % (t.type_bits / 8U) != 0)
    return std::nullopt;
  if (t.ndim == 0) {
    r.rows = r.cols = r.stride = 1;
    return r;
  }
  r.cols = t.shape[t.ndim - 1];
  if (numel == 0) {  // any stride will do
    r.rows = 1;
    for (int i = 0; i + 1 < t.ndim; ++i) r.rows *= t.shape[i];
    r.stride = r.cols;
    return r;
  }
  r.rows = numel / r.cols;
  const std::optional<std::int64_t> stride = row_stride(t, r.cols);
  if (!stride) return std::nullopt;
  r.stride = *stride;
  return r;
}

TensorRows Torch::made(nb::handle x) const {
  const std::optional<TensorRows> r = rows(x);
  if (!r) throw std::runtime_error("unswag: PyTorch made an output that is no dense tensor");
  return *r;
}

nb::object Torch::call(const nb::object& function, const nb::object& arguments, const nb::object& constants) {
  PyObject* made = PyObject_Call(function.ptr(), arguments.ptr(), constants.ptr());
  if (made == nullptr) throw nb::python_error();
  return nb::steal(made);
}

nb::object Torch::empty_like(nb::handle x) const { return call(empty_like_, nb::make_tuple(x), in_order_); }

nb::object Torch::empty_like(nb::handle x, nb::handle dtype) const { return empty_like_(x, "dtype"_a = dtype, **in_order_); }

nb::object Torch::empty(std::span<const std::int64_t> shape, DType dtype, nb::handle device_of) const {
  const nb::object size = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  for (std::size_t i = 0; i < shape.size(); ++i)
    PyTuple_SetItem(size.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(shape[i]));
  return call(new_empty_, nb::make_tuple(device_of, size), of_dtype_[static_cast<std::size_t>(dtype)]);
}

nb::object Torch::empty_cpu(nb::handle dtype) const { return empty_(0, "dtype"_a = dtype, "device"_a = "cpu"); }

bool Torch::is_grad_enabled() const { return nb::cast<bool>(is_grad_enabled_()); }

bool Torch::is_inference() const { return nb::cast<bool>(is_inference_()); }

std::optional<DType> Torch::dtype(nb::handle torch_dtype) const {
  const auto* const found = std::ranges::find_if(dtypes_, [&](const nb::object& d) { return d.is(torch_dtype); });
  if (found == dtypes_.end()) return std::nullopt;
  return dtypes[static_cast<std::size_t>(found - dtypes_.begin())].value;
}

Stream Torch::stream(const TensorRows& x) const {
  if (x.tensor.device_type == kCpu) return {.handle = nullptr, .threads = nb::cast<int>(threads_()), .device = -1};
  void* handle = nullptr;
  if (exchange_->current_stream(x.tensor.device_type, x.tensor.device_id, &handle) != 0) throw nb::python_error();
  return {.handle = handle, .threads = 0, .device = x.tensor.device_id};
}

}  // namespace unswag::python
