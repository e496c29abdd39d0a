// Packed fields of src/math/fields.hpp, eight at a time: bytes in a 64-bit number move together in three steps and apart again,
// which compilers turn into steps of whole registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// The lowest `bits` bits of each of the `size` bits that a number is cut into.
consteval std::uint64_t lowest_of_each(int size, int bits) {
  std::uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= std::uint64_t(i % size < bits) << i;
  return mask;
}

// Eight codes, a byte each, as eight fields: pairs, fours and all eight move together.
template <int bits>
UNSWAG_INLINE std::uint64_t together(std::uint64_t codes) {
  codes = (codes | codes >> (8 - bits)) & lowest_of_each(16, 2 * bits);
  codes = (codes | codes >> (16 - 2 * bits)) & lowest_of_each(32, 4 * bits);
  return codes | codes >> (32 - 4 * bits);
}
template <int bits>
UNSWAG_INLINE std::uint64_t apart(std::uint64_t fields) {
  fields = (fields | fields << (32 - 4 * bits)) & lowest_of_each(32, 4 * bits);
  fields = (fields | fields << (16 - 2 * bits)) & lowest_of_each(16, 2 * bits);
  return (fields | fields << (8 - bits)) & lowest_of_each(8, bits);
}

// The smallest number with room for eight fields.
template <int bits>
using EightFields = std::conditional_t<
    bits == 1, std::uint8_t,
    std::conditional_t<bits == 2, std::uint16_t, std::conditional_t<bits <= 4, std::uint32_t, std::uint64_t>>>;

// The lowest bytes of a number that is 0.  Three at once would go through memory.
template <int bytes, class N>
UNSWAG_INLINE void load_bytes(N& number, const std::uint8_t* p) {
  if constexpr (bytes == 3) {
    number = N(p[0] | p[1] << 8 | p[2] << 16);
  } else {
    memcpy(&number, p, bytes);
  }
}

// math::pack_fields and math::unpack_fields, of a multiple of 8 codes.
template <int bits>
UNSWAG_INLINE void pack_codes(const std::uint8_t* __restrict code, std::uint8_t* __restrict packed, std::int64_t count) {
  for (std::int64_t i = 0; i < count / 8; ++i) {
    std::uint64_t codes;
    memcpy(&codes, code + 8 * i, 8);
    const auto fields = EightFields<bits>(together<bits>(codes));
    memcpy(packed + bits * i, &fields, bits);
  }
}
template <int bits>
UNSWAG_INLINE void unpack_codes(const std::uint8_t* __restrict packed, std::uint8_t* __restrict code, std::int64_t count) {
  for (std::int64_t i = 0; i < count / 8; ++i) {
    EightFields<bits> fields = 0;
    load_bytes<bits>(fields, packed + bits * i);
    const std::uint64_t codes = apart<bits>(fields);
    memcpy(code + 8 * i, &codes, 8);
  }
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
