// The checks of the entry points.  Each entry point names its arguments to a Check, which keeps the first thing that is wrong
// with them, and then hands the arguments to a kernel:
//
//   Check check("gated_forward", stream);
//   check.input("gate", args.gate).output("h", args.h).same("h", args.h, "gate", args.gate);
//   return check.run(&Kernels::gated_forward, args);
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.hpp"

namespace unswag {

// "float32, float16, bfloat16 or float64": the names of a list, or of those of its values for which `which` holds.
template <class Enum, class Which>
std::string names_of(const Which& which) {
  std::vector<std::string_view> names;
  for (const auto& entry : list_of(Enum{}))
    if (which(entry.value)) names.push_back(entry.name);
  std::string text;
  for (std::size_t i = 0; i < names.size(); ++i)
    text.append(i == 0 ? "" : i + 1 < names.size() ? ", " : " or ").append(names[i]);
  return text;
}
template <class Enum>
std::string names_of() {
  return names_of<Enum>([](Enum) { return true; });
}

// The dtype of what is summed over x: rstd, loss, dw.
constexpr DType sum_dtype(DType x) { return x == DType::f64 ? DType::f64 : DType::f32; }

// UNSWAG_BACKEND and UNSWAG_NUM_THREADS are checked at the first call, and their error is what every call returns.
Status environment_status();

// Whether there are kernels for this device, and it has what they need.
Status device_status(int device);

// Slowest first; row 0 is the portable one, and the only one for the CPU that has f64.
std::span<const Kernels* const> all_kernels();

// The row that serves calls now, or the portable one, which alone has f64.
const Kernels& kernels_for(bool has_f64);
// Those of the rows that run here, slowest first as given, the null entries of each taken from the next slower one.
std::vector<Kernels> usable_rows(std::span<const Kernels* const> rows);

class Check {
 public:
  Check(const char* op, Stream stream);

  // Tensors.  Pointers, sizes, strides, alignment; what is written may not overlap anything else.
  Check& input(const char* name, const ConstRows& x) { return add(name, x, false); }
  Check& output(const char* name, const Rows& y) { return add(name, {y.data, y.dtype, y.rows, y.cols, y.stride}, true); }
  Check& input(const char* name, const ConstVector& x) { return add(name, {x.data, x.dtype, 1, x.size, x.size}, false); }
  Check& output(const char* name, const Vector& y) { return add(name, {y.data, y.dtype, 1, y.size, y.size}, true); }
  Check& input(const char* name, const ConstPacked& packed, const ConstRows& of, std::int64_t bits = 1) {
    return add(name, packed, of.rows, packed_row_bytes(of.cols, bits), false);
  }
  Check& output(const char* name, const Packed& packed, const ConstRows& of, std::int64_t bits = 1) {
    return add(name, ConstPacked{packed.data, packed.stride}, of.rows, packed_row_bytes(of.cols, bits), true);
  }
  Check& labels(const std::int64_t* labels, std::int64_t rows, std::int64_t classes, std::int64_t ignore_index);
  Check& words(const char* name, const std::uint32_t* out, std::int64_t n);
  Check& counts(const char* name, const std::int64_t* out, std::int64_t rows);
  // rows + 1 numbers that ascend within [0, size], which only the CPU looks at.
  Check& offsets(const char* name, const std::int64_t* offsets, std::int64_t rows, std::int64_t size);
  // Needed on a device only.
  Check& scratch(const char* name, const void* data, std::int64_t bytes);

  // Packed rows of so many bytes.
  Check& input(const char* name, const ConstPacked& packed, std::int64_t rows, std::int64_t row_bytes) {
    return add(name, packed.data, 1, rows, row_bytes, packed.stride, false);
  }
  Check& output(const char* name, const Packed& packed, std::int64_t rows, std::int64_t row_bytes) {
    return add(name, packed.data, 1, rows, row_bytes, packed.stride, true);
  }

  // How they belong together.
  template <class A, class B>
  Check& same_shape(const char* name, const RowsOf<A>& a, const char* like, const RowsOf<B>& b) {
    return require_shape(name, a.rows, a.cols, like, b.rows, b.cols);
  }
  template <class A, class B>
  Check& same(const char* name, const RowsOf<A>& a, const char* like, const RowsOf<B>& b) {
    return same_dtype(name, a.dtype, like, b.dtype).same_shape(name, a, like, b);
  }
  Check& same_dtype(const char* name, DType a, const char* like, DType b);
  // A vector with one value for each `of` ("rows", "classes") of `like`, in the dtype of sums over `like`.
  template <class Void>
  Check& vector_of(const char* name, const VectorOf<Void>& v, const char* of, std::int64_t size, const char* like,
                   DType dtype) {
    return vector_size(name, v.size, of, size, like).sum_dtype_of(name, v.dtype, like, dtype);
  }
  Check& vector_size(const char* name, std::int64_t size, const char* of, std::int64_t expected, const char* like);

  // Numbers.
  template <class Enum>
  Check& known(const char* name, Enum value) {
    if (ok() && !is_listed(value)) {
      fail(invalid_argument(op_, ": ", name, " is ", int(value), ", which is not one of its ", list_of(value).size(),
                            " values"));
    }
    return *this;
  }
  // One of those for which `which` holds.
  template <class Enum, class Which>
  Check& one_of(const char* name, Enum value, const Which& which) {
    if (ok() && !which(value)) {
      fail(invalid_argument(op_, ": ", name, " is ", listed(value).name, ", which this op does not have; use ",
                            names_of<Enum>(which)));
    }
    return *this;
  }
  Check& finite(const char* name, double value);
  Check& between(const char* name, std::int64_t value, std::int64_t lowest, std::int64_t highest);
  // Finite, each above the one before.
  Check& ascending(const char* name, const double* values, int count);
  Check& not_negative(const char* name, double value);
  // [0, 1], or [0, 1) when one_excluded.
  Check& fraction(const char* name, double value, bool one_excluded);

  bool ok() const { return status_.ok(); }

  // Whether some argument has no elements: then there is no work, and no kernel is called.
  bool empty() const { return empty_; }

  // Where all is well but empty: every value of a sum over nothing.
  Check& fill_if_empty(const Vector& v, double value);

  // The error, or the kernel's work.
  template <class Entry, class... Args>
  Status run(Entry Kernels::* entry, const Args&... args) const {
    if (!ok() || empty_) return status_;
    const Entry kernel = (device_ ? device_->kernels : kernels_for(has_f64_)).*entry;
    if (!kernel) return not_supported(op_, ": no backend that runs here has a kernel for it");
    kernel(args..., stream_);
    return launched();
  }

 private:
  // Memory: `rows` stretches of row_bytes bytes, stride_bytes apart (made positive).
  struct Operand {
    const char* name;
    std::int64_t begin;
    std::int64_t rows;
    std::int64_t row_bytes;
    std::int64_t stride_bytes;
    bool written;
    std::int64_t end() const { return begin + (rows - 1) * stride_bytes + row_bytes; }
  };
  static bool overlap(const Operand& a, const Operand& b);

  void fail(Status status) { status_ = std::move(status); }
  Status launched() const;
  Check& add(const char* name, const ConstRows& x, bool written);
  Check& add(const char* name, const ConstPacked& packed, std::int64_t rows, std::int64_t row_bytes, bool written) {
    return add(name, packed.data, 1, rows, row_bytes, packed.stride, written);
  }
  Check& add(const char* name, const void* data, std::int64_t element_bytes, std::int64_t rows, std::int64_t cols,
             std::int64_t stride, bool written);
  Check& require_shape(const char* name, std::int64_t rows, std::int64_t cols, const char* like, std::int64_t like_rows,
                       std::int64_t like_cols);
  Check& sum_dtype_of(const char* name, DType dtype, const char* like, DType like_dtype);

  const char* op_;
  Stream stream_;
  const DeviceKernels* device_ = nullptr;  // null: the CPU
  Status status_;
  std::array<Operand, 9> operands_;
  int count_ = 0;
  bool has_f64_ = false;
  bool empty_ = false;
};

}  // namespace unswag
