// Numbers in (0, 1) of eight elements, from halves of draws (src/math/philox.hpp).
#pragma once

#include "cuda/eight.hpp"
#include "math/philox.hpp"

namespace unswag::UNSWAG_ISA_NS {

// Of the elements first, first + 1, ...: halves of one block of draws, or of two.
template <class V>
UNSWAG_HD inline Eight<V> units(std::uint64_t seed, std::uint64_t offset, std::int64_t first) {
  Eight<V> v;
  const int skip = int(first % 8);  // of the halves of the first block
  UNSWAG_UNROLL
  for (int b = 0; b < 2; ++b) {
    if (b == 1 && skip == 0) break;
    const math::PhiloxBlock block = math::philox_block(seed, offset, std::uint64_t(first / 8 + b));
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) {
      UNSWAG_UNROLL
      for (int h = 0; h < 8; ++h) {
        if (k + skip == 8 * b + h) v.e[k] = math::unit_of_half<V>(block.word[h / 2] >> (h % 2 * 16) & 0xffff);
      }
    }
  }
  return v;
}

}  // namespace unswag::UNSWAG_ISA_NS
