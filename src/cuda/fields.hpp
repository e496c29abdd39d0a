// Fields of 1 to 4 bits of eight elements: `bits` bytes, which belong to one worker.
#pragma once

#include "cuda/eight.hpp"

namespace unswag::UNSWAG_ISA_NS {

// Eights that cover a packed row, its padding too.
UNSWAG_HD inline std::int64_t eights_of_fields(std::int64_t cols, int bits) {
  return divided_up(packed_row_bytes(cols, bits), bits);
}

// The fields of the eight elements from `col`, of a row of `cols`; nothing past its last byte is touched.
UNSWAG_HD inline std::uint32_t load_fields(const std::uint8_t* row, std::int64_t col, std::int64_t cols, int bits) {
  const std::int64_t at = col / 8 * bits, bytes = packed_row_bytes(cols, bits);
  std::uint32_t fields = 0;
  UNSWAG_UNROLL
  for (int b = 0; b < 4; ++b)
    if (b < bits && at + b < bytes) fields |= std::uint32_t(row[at + b]) << (8 * b);
  return fields;
}
UNSWAG_HD inline void store_fields(std::uint8_t* row, std::int64_t col, std::int64_t cols, int bits, std::uint32_t fields) {
  const std::int64_t at = col / 8 * bits, bytes = packed_row_bytes(cols, bits);
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
