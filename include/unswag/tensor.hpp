// Non-owning views of memory.  Sizes, strides and offsets are 64-bit everywhere.
#pragma once

#include <cstdint>

#include "unswag/lists.hpp"

namespace unswag {

// rows x cols elements; elements of a row are adjacent, rows are `stride` ELEMENTS apart (any sign, any distance).
// No alignment is required beyond that of the element.
template <class Void>
struct RowsOf {
  Void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;
};
using Rows = RowsOf<void>;
using ConstRows = RowsOf<const void>;

// One vector of `size` adjacent elements; data == nullptr means "none".
template <class Void>
struct VectorOf {
  Void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t size = 0;
};
using Vector = VectorOf<void>;
using ConstVector = VectorOf<const void>;

// Packed bits or codes of a RowsOf (docs/format.md): rows are `stride` BYTES apart and padded to 4 bytes.
template <class Byte>
struct PackedOf {
  Byte* data = nullptr;
  std::int64_t stride = 0;
};
using Packed = PackedOf<std::uint8_t>;
using ConstPacked = PackedOf<const std::uint8_t>;

// Bytes of one packed row of `cols` codes of `bits` bits, padded to a multiple of 4.
constexpr std::int64_t packed_row_bytes(std::int64_t cols, std::int64_t bits) {
  return (cols / 32 * bits + (cols % 32 * bits + 31) / 32) * 4;
}

// Where the work runs.  On the CPU: on up to `threads` threads (0: the library's default).  On a CUDA device: in its stream
// `handle` (null: its default stream); the call returns when the work is queued, and every address is in that device's memory.
struct Stream {
  static constexpr int cpu = -1;
  static constexpr int current = -2;  // the calling thread's current CUDA device

  void* handle = nullptr;
  int threads = 0;
  int device = cpu;  // or the number of a CUDA device
};

}  // namespace unswag
