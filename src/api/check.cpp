#include "api/check.hpp"

#include <algorithm>

namespace unswag {
namespace {

// Floor of a / b for b > 0.
std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

std::string_view name_of(DType dtype) { return is_listed(dtype) ? listed(dtype).name : "unknown"; }

}  // namespace

Check::Check(const char* op, Stream stream) : op_(op), stream_(stream), status_(environment_status()) {
  if (!ok()) return;
  if (stream.threads < 0) {
    fail(invalid_argument(op_, ": threads is ", stream.threads, "; pass a positive number, or 0 for the default"));
  } else if (stream.device == Stream::cpu) {
    if (stream.handle) fail(invalid_argument(op_, ": a device's stream is given, but no device; pass its number"));
  } else if (Status problem = device_status(stream.device); !problem.ok()) {
    fail({problem.code(), op_ + (": " + problem.message())});
  } else {
    device_ = device_kernels();
  }
}

Check& Check::fill_if_empty(const Vector& v, double value) {
  if (!ok() || !empty_ || v.size == 0) return *this;
  if (device_) {
    device_->fill(v, value, stream_);
    if (Status status = launched(); !status.ok()) fail(std::move(status));
    return *this;
  }
  for (std::int64_t i = 0; i < v.size; ++i) {
    if (v.dtype == DType::f64) {
      static_cast<double*>(v.data)[i] = value;
    } else {
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
    }
  }
  return *this;
}

Status Check::launched() const {
  if (!device_) return {};
  const Status status = device_->launched();
  return status.ok() ? status : Status{status.code(), op_ + (": " + status.message())};
}

Check& Check::add(const char* name, const ConstRows& x, bool written) {
  if (!ok()) return *this;
  if (!is_listed(x.dtype)) {
    fail(invalid_type(op_, ": ", name, " has the unknown dtype code ", int(x.dtype), "; use ", names_of<DType>()));
    return *this;
  }
  has_f64_ |= x.dtype == DType::f64;
  return add(name, x.data, listed(x.dtype).bytes, x.rows, x.cols, x.stride, written);
}

Check& Check::scratch(const char* name, const void* data, std::int64_t bytes) {
  return device_ ? add(name, data, 8, 1, bytes / 8, bytes / 8, true) : *this;
}

Check& Check::words(const char* name, const std::uint32_t* out, std::int64_t n) { return add(name, out, 4, 1, n, n, true); }

Check& Check::counts(const char* name, const std::int64_t* out, std::int64_t rows) {
  return add(name, out, 8, 1, rows, rows, true);
}

Check& Check::offsets(const char* name, const std::int64_t* offsets, std::int64_t rows, std::int64_t size) {
  if (!ok() || rows <= 0) return *this;
  add(name, offsets, 8, 1, rows + 1, rows + 1, false);
  if (!ok() || device_) return *this;
  std::int64_t last = 0;
  for (std::int64_t row = 0; row <= rows; ++row) {
    if (offsets[row] < last || offsets[row] > size) {
      fail(invalid_argument(op_, ": ", name, "[", row, "] is ", offsets[row], ", outside [", last, ", ", size,
                            "], from the one before it to the number of values; pass the sums of what nonzero_count gave"));
      return *this;
    }
    last = offsets[row];
  }
  return *this;
}

Check& Check::add(const char* name, const void* data, std::int64_t element_bytes, std::int64_t rows, std::int64_t cols,
                  std::int64_t stride, bool written) {
  if (!ok()) return *this;
  if (rows < 0 || cols < 0) {
    fail(invalid_argument(op_, ": ", name, " has the shape [", rows, ", ", cols, "]; sizes cannot be negative"));
    return *this;
  }
  if (rows == 0 || cols == 0) {
    empty_ = true;
    return *this;
  }
  if (!data) {
    fail(invalid_argument(op_, ": ", name, " is null but has ", rows, " x ", cols, " elements; pass its memory"));
    return *this;
  }
  // A single row has no use for its stride.
  if (rows == 1) stride = cols;
  std::int64_t begin = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data));
  std::int64_t stride_bytes = 0, row_bytes = 0, extent = 0, last = 0;
  if (__builtin_mul_overflow(stride, element_bytes, &stride_bytes) || __builtin_mul_overflow(cols, element_bytes, &row_bytes) ||
      __builtin_mul_overflow(stride_bytes, rows - 1, &extent) || __builtin_add_overflow(begin, extent, &last) ||
      __builtin_add_overflow(std::max(begin, last), row_bytes, &extent)) {
    fail(invalid_argument(op_, ": ", name, " with ", rows, " rows of ", cols, " elements, ", stride,
                          " apart, does not fit into 64-bit addresses; check its sizes and stride"));
    return *this;
  }
  if (begin % element_bytes != 0) {
    fail(invalid_type(op_, ": ", name, " begins at an address that is no multiple of its ", element_bytes,
                      "-byte elements; pass an aligned copy"));
    return *this;
  }
  if (stride_bytes < 0) {
    begin = last;
    stride_bytes = -stride_bytes;
  }
  if (written && stride_bytes < row_bytes) {
    fail(invalid_argument(op_, ": rows of ", name, " are ", stride, " apart but ", cols,
                          " long, so that writing one would overwrite the next; pass a tensor whose rows do not overlap"));
    return *this;
  }
  const Operand added{name, begin, stride_bytes == 0 ? 1 : rows, row_bytes, stride_bytes, written};
  for (int i = 0; i < count_; ++i) {
    const Operand& other = operands_[i];
    if ((written || other.written) && overlap(added, other)) {
      fail(invalid_argument(op_, ": ", (written ? added : other).name, " is written but shares memory with ",
                            (written ? other : added).name, "; pass separate memory"));
      return *this;
    }
  }
  operands_[count_++] = added;
  return *this;
}

// Exact: interleaved views, such as the two halves of every row of one matrix, do not overlap.
bool Check::overlap(const Operand& a, const Operand& b) {
  if (a.end() <= b.begin || b.end() <= a.begin) return false;
  if (a.rows == 1 && b.rows == 1) return true;
  if (a.stride_bytes == b.stride_bytes) {
    // Some row of a and the k-th row of b after it meet when -b.row_bytes < distance + k * stride < a.row_bytes.
    const std::int64_t distance = b.begin - a.begin;
    const std::int64_t lowest = floor_div(-b.row_bytes - distance, a.stride_bytes) + 1;
    const std::int64_t highest = -floor_div(distance - a.row_bytes, a.stride_bytes) - 1;
    return lowest <= highest;
  }
  for (std::int64_t i = 0, j = 0; i < a.rows && j < b.rows;) {
    const std::int64_t row_a = a.begin + i * a.stride_bytes, row_b = b.begin + j * b.stride_bytes;
    if (row_a + a.row_bytes <= row_b) {
      ++i;
    } else if (row_b + b.row_bytes <= row_a) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

Check& Check::labels(const std::int64_t* labels, std::int64_t rows, std::int64_t classes, std::int64_t ignore_index) {
  add("labels", labels, 8, 1, rows, rows, false);
  if (!ok() || device_) return *this;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t label = labels[row];
    if ((label < 0 || label >= classes) && label != ignore_index) {
      fail(invalid_argument(op_, ": label ", label, " of row ", row, " is outside [0, ", classes,
                            "); correct the label, or mark rows without one with ignore_index (", ignore_index, ")"));
      return *this;
    }
  }
  return *this;
}

Check& Check::require_shape(const char* name, std::int64_t rows, std::int64_t cols, const char* like, std::int64_t like_rows,
                            std::int64_t like_cols) {
  if (ok() && (rows != like_rows || cols != like_cols)) {
    fail(invalid_argument(op_, ": ", name, " has the shape [", rows, ", ", cols, "] but ", like, " has [", like_rows, ", ",
                          like_cols, "]; pass a ", name, " of the shape of ", like));
  }
  return *this;
}

Check& Check::same_dtype(const char* name, DType a, const char* like, DType b) {
  if (ok() && a != b) {
    fail(invalid_type(op_, ": ", name, " is ", name_of(a), " but ", like, " is ", name_of(b), "; convert ", name, " to ",
                      name_of(b)));
  }
  return *this;
}

Check& Check::vector_size(const char* name, std::int64_t size, const char* of, std::int64_t expected, const char* like) {
  if (ok() && size != expected) {
    fail(invalid_argument(op_, ": ", name, " has ", size, " elements but ", like, " has ", expected, " ", of, "; pass a ", name,
                          " of shape [", expected, "]"));
  }
  return *this;
}

Check& Check::sum_dtype_of(const char* name, DType dtype, const char* like, DType like_dtype) {
  const DType expected = sum_dtype(like_dtype);
  if (ok() && dtype != expected) {
    fail(invalid_type(op_, ": ", name, " is ", name_of(dtype), " but must be ", name_of(expected), " where ", like, " is ",
                      name_of(like_dtype), "; convert ", name, " to ", name_of(expected)));
  }
  return *this;
}

Check& Check::finite(const char* name, double value) {
  if (ok() && !std::isfinite(value)) fail(invalid_argument(op_, ": ", name, " is ", value, "; pass a finite number"));
  return *this;
}

Check& Check::between(const char* name, std::int64_t value, std::int64_t lowest, std::int64_t highest) {
  if (ok() && (value < lowest || value > highest)) {
    fail(invalid_argument(op_, ": ", name, " is ", value, "; pass a number from ", lowest, " to ", highest));
  }
  return *this;
}

Check& Check::ascending(const char* name, const double* values, int count) {
  for (int i = 0; i < count; ++i) finite(name, values[i]);
  for (int i = 1; i < count && ok(); ++i) {
    if (values[i] <= values[i - 1]) {
      fail(invalid_argument(op_, ": ", name, "[", i, "] is ", values[i], ", not above ", values[i - 1],
                            " before it; pass them in ascending order"));
    }
  }
  return *this;
}

Check& Check::not_negative(const char* name, double value) {
  if (ok() && !(value >= 0 && std::isfinite(value))) {
    fail(invalid_argument(op_, ": ", name, " is ", value, "; pass a finite number that is not negative"));
  }
  return *this;
}

Check& Check::fraction(const char* name, double value, bool one_excluded) {
  if (ok() && !(value >= 0 && (one_excluded ? value < 1 : value <= 1))) {
    fail(invalid_argument(op_, ": ", name, " is ", value, "; pass a number in [0, 1", one_excluded ? ")" : "]"));
  }
  return *this;
}

}  // namespace unswag
