// Rows of packed bytes that end at a guard page, with a canary in the gaps between them.
#pragma once

#include <vector>

#include "memory.hpp"
#include "unswag/tensor.hpp"

namespace unswag::test {

class PackedRows {
 public:
  PackedRows(std::int64_t rows, std::int64_t row_bytes, std::int64_t gap = 0)
      : rows_(rows),
        row_bytes_(row_bytes),
        stride_(row_bytes + gap),
        memory_(std::size_t(rows ? (rows - 1) * stride_ + row_bytes : 0)) {}

  std::uint8_t* row(std::int64_t r) const { return reinterpret_cast<std::uint8_t*>(memory_.data()) + r * stride_; }
  // Bits [at, at + n) of a row.
  unsigned field(std::int64_t r, std::int64_t at, int n) const {
    unsigned value = 0;
    for (int k = 0; k < n; ++k) value |= unsigned(row(r)[(at + k) / 8] >> ((at + k) % 8) & 1) << k;
    return value;
  }
  // The rows without the gaps.
  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all;
    for (std::int64_t r = 0; r < rows_; ++r) all.insert(all.end(), row(r), row(r) + row_bytes_);
    return all;
  }
  bool gaps_untouched() const {
    for (std::int64_t r = 0; r + 1 < rows_; ++r)
      for (std::int64_t i = row_bytes_; i < stride_; ++i)
        if (row(r)[i] != 0xA5) return false;
    return true;
  }
  void read_only() { memory_.read_only(); }

  operator Packed() { return {row(0), stride_}; }
  operator ConstPacked() const { return {row(0), stride_}; }

 private:
  std::int64_t rows_, row_bytes_, stride_;
  Memory memory_;
};

}  // namespace unswag::test
