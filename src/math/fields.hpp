// Packed fields of 1 to 8 bits (docs/format.md section 1): field i of a row stands at its bit i times bits, so that eight
// fields are `bits` bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/hd.hpp"

namespace unswag::math {

// Field k of many in one number.
template <class Fields>
UNSWAG_HD constexpr unsigned field(Fields fields, int k, int bits) {
  return unsigned(fields >> (k * bits)) & ((1u << bits) - 1);
}

// The fields of `count` codes below 2^bits, a multiple of 8, and the codes again.
template <int bits>
UNSWAG_HD inline void pack_fields(const std::uint8_t* __restrict code, std::uint8_t* __restrict packed, int count) {
  static_assert(1 <= bits && bits <= 8, "a field has 1 to 8 bits");
  if constexpr (8 % bits == 0) {  // no field crosses a byte
    constexpr int per = 8 / bits;
    UNSWAG_UNROLL
    for (std::int64_t i = 0; i < count / per; ++i) {
      unsigned byte = 0;
      UNSWAG_UNROLL
      for (int k = 0; k < per; ++k) byte |= unsigned(code[per * i + k]) << (k * bits);
      packed[i] = std::uint8_t(byte);
    }
  } else {
    UNSWAG_UNROLL
    for (std::int64_t i = 0; i < count / 8; ++i) {
      std::uint64_t fields = 0;
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) fields |= std::uint64_t(code[8 * i + k]) << (k * bits);
      UNSWAG_UNROLL
      for (int b = 0; b < bits; ++b) packed[bits * i + b] = std::uint8_t(fields >> (8 * b));
    }
  }
}
template <int bits>
UNSWAG_HD inline void unpack_fields(const std::uint8_t* __restrict packed, std::uint8_t* __restrict code, int count) {
  static_assert(1 <= bits && bits <= 8, "a field has 1 to 8 bits");
  if constexpr (8 % bits == 0) {
    constexpr int per = 8 / bits;
    UNSWAG_UNROLL
    for (std::int64_t i = 0; i < count / per; ++i) {
      UNSWAG_UNROLL
      for (int k = 0; k < per; ++k) code[per * i + k] = std::uint8_t(field(packed[i], k, bits));
    }
  } else {
    UNSWAG_UNROLL
    for (std::int64_t i = 0; i < count / 8; ++i) {
      std::uint64_t fields = 0;
      UNSWAG_UNROLL
      for (int b = 0; b < bits; ++b) fields |= std::uint64_t(packed[bits * i + b]) << (8 * b);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) code[8 * i + k] = std::uint8_t(field(fields, k, bits));
    }
  }
}

}  // namespace unswag::math
