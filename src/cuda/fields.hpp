// Fields of 1 to 4 bits of eight elements: `bits` bytes, which belong to one worker.
#pragma once

#include "cuda/eight.hpp"

namespace unswag::UNSWAG_ISA_NS {

// The fields of the eight elements from `col`, of a row of `bytes` bytes; nothing past its last byte is touched.
UNSWAG_HD inline std::uint32_t load_fields(const std::uint8_t* row, std::int64_t col, std::int64_t bytes, int bits) {
  const std::int64_t at = col / 8 * bits;
  std::uint32_t fields = 0;
  UNSWAG_UNROLL
  for (int b = 0; b < 4; ++b)
    if (b < bits && at + b < bytes) fields |= std::uint32_t(row[at + b]) << (8 * b);
  return fields;
}
UNSWAG_HD inline void store_fields(std::uint8_t* row, std::int64_t col, std::int64_t bytes, int bits, std::uint32_t fields) {
  const std::int64_t at = col / 8 * bits;
  UNSWAG_UNROLL
  for (int b = 0; b < 4; ++b)
    if (b < bits && at + b < bytes) row[at + b] = std::uint8_t(fields >> (8 * b));
}

// Rows that follow each other without a gap, packed too, are one long row.
template <class Byte>
bool dense_fields(std::int64_t cols, std::int64_t stride, std::int64_t other_stride, const PackedOf<Byte>& packed, int bits) {
  return stride == cols && other_stride == cols && cols * bits % 32 == 0 && packed.stride == cols * bits / 8;
}

}  // namespace unswag::UNSWAG_ISA_NS
