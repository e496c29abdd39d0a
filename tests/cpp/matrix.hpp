// A RowsOf and its memory: guarded at the end, strided as asked, with a canary between the rows.
#pragma once

#include <vector>

#include "api/check.hpp"
#include "memory.hpp"
#include "values.hpp"

namespace unswag::test {

class Matrix {
 public:
  // stride: elements from row to row; 0 means cols.  Negative: row 0 is the last in memory.
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t stride = 0)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        stride_(stride ? stride : cols),
        memory_(std::size_t(rows ? ((rows - 1) * std::abs(stride_) + cols) * size_of(dtype) : 0)) {}

  void* row(std::int64_t r) const {
    return memory_.data() + (stride_ < 0 ? (rows_ - 1 - r) * -stride_ : r * stride_) * size_of(dtype_);
  }
  long double get(std::int64_t r, std::int64_t c) const { return read(dtype_, row(r), c); }
  void set(std::int64_t r, std::int64_t c, long double v) { write(dtype_, row(r), c, v); }

  // A float NaN whose bits are not those that arithmetic gives: all of them are set.
  void set_odd_nan(std::int64_t r, std::int64_t c) {
    if (dtype_ != DType::f32) std::abort();
    std::memset(static_cast<char*>(row(r)) + 4 * c, 0xff, 4);
  }

  template <class F>
  void fill(F value) {
    for (std::int64_t r = 0; r < rows_; ++r)
      for (std::int64_t c = 0; c < cols_; ++c) set(r, c, value(r, c));
  }
  void fill_normal(std::uint64_t seed, double scale = 1) {
    Random random(seed);
    fill([&](std::int64_t, std::int64_t) { return scale * random.normal(); });
  }
  // A copy that a kernel may only read.
  void read_only() { memory_.read_only(); }

  operator ConstRows() const { return {rows_ ? row(0) : nullptr, dtype_, rows_, cols_, stride_}; }
  operator Rows() { return {rows_ ? row(0) : nullptr, dtype_, rows_, cols_, stride_}; }
  // The first row as a vector.
  ConstVector vector() const { return {memory_.data(), dtype_, cols_}; }
  Vector vector() { return {memory_.data(), dtype_, cols_}; }

  // Every byte, gaps between the rows too.
  std::vector<char> bytes() const { return {memory_.data(), memory_.data() + memory_.size()}; }
  // The gaps between rows still hold what Memory filled them with.
  bool gaps_untouched() const {
    const std::int64_t gap = std::abs(stride_) - cols_;
    for (std::int64_t r = 0; r + 1 < rows_; ++r) {
      const char* end = memory_.data() + (r * std::abs(stride_) + cols_) * size_of(dtype_);
      for (std::int64_t i = 0; i < gap * size_of(dtype_); ++i)
        if (static_cast<unsigned char>(end[i]) != 0xA5) return false;
    }
    return true;
  }

  DType dtype() const { return dtype_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }

 private:
  DType dtype_;
  std::int64_t rows_, cols_, stride_;
  Memory memory_;
};

// The row that runs src/cuda on the host.
inline bool is_cuda(const Kernels& k) { return std::string_view(k.name) == "cuda-emulated"; }

// The rows of the table that run on this machine; with f64, only those that have it.
inline std::vector<const Kernels*> backends(bool f64 = false) {
  std::vector<const Kernels*> rows;
  for (const Kernels* k : all_kernels())
    if (k->runs_here() && (!f64 || k == all_kernels().front() || is_cuda(*k))) rows.push_back(k);
  return rows;
}

}  // namespace unswag::test
