// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the one way in
// which we use it: draw i of a stream is word i % 4 of philox(counter = offset + i / 4, key = seed).
#pragma once

#include <cstdint>

#include "math/hd.hpp"

namespace unswag::math {

struct PhiloxBlock {
  std::uint32_t word[4];
};

UNSWAG_HD inline PhiloxBlock philox4x32(PhiloxBlock counter, std::uint32_t key0, std::uint32_t key1) {
  PhiloxBlock c = counter;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c.word[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * c.word[2];
    c = {{std::uint32_t(b >> 32) ^ c.word[1] ^ key0, std::uint32_t(b), std::uint32_t(a >> 32) ^ c.word[3] ^ key1,
          std::uint32_t(a)}};
    key0 += 0x9E3779B9;  // the golden ratio
    key1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return c;
}

// Draws 4 block ... 4 block + 3 of the stream (seed, offset).  The counter has 128 bits: offset + block carries into its
// upper half, so a stream never repeats.
UNSWAG_HD inline PhiloxBlock philox_block(std::uint64_t seed, std::uint64_t offset, std::uint64_t block) {
  const std::uint64_t low = offset + block;
  const std::uint32_t carry = low < offset;
  return philox4x32({{std::uint32_t(low), std::uint32_t(low >> 32), carry, 0}}, std::uint32_t(seed), std::uint32_t(seed >> 32));
}

// A number in (0, 1) from half a draw, (2 half + 1) 2^-17: the mean of all 2^16 is 1/2, exactly.  Element i has half i % 2 of
// draw i / 2, the low one first.
template <class S>
UNSWAG_HD inline S unit_of_half(std::uint32_t half) {
  return S(std::int32_t(2 * half + 1)) * S(0x1p-17f);
}

// Dropout keeps an element when its draw >= p 2^32.  Draws are integers, so that is draw >= ceil(p 2^32), which may be 2^32
// (p = 1: nothing is kept).  p 2^32 is exact in double.
UNSWAG_HD inline std::uint64_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  const std::uint64_t floor = std::uint64_t(scaled);
  return floor + (double(floor) < scaled);
}

}  // namespace unswag::math
