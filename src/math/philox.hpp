// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the one way in
// which we use it: draw i of a stream is word i % 4 of philox(counter = offset + i / 4, key = seed).
#pragma once

#include <cstdint>

#include "math/hd.hpp"

namespace unswag::math {

// W: a word, or the words of many blocks (src/cpu/simd/words.hpp).
template <class W>
struct PhiloxWords {
  W word[4];
};
using PhiloxBlock = PhiloxWords<std::uint32_t>;

// The product of 64 bits, and its halves.
UNSWAG_HD inline std::uint64_t wide_product(std::uint32_t word, std::uint32_t factor) { return std::uint64_t{factor} * word; }
UNSWAG_HD inline std::uint32_t upper_word(std::uint64_t product) { return std::uint32_t(product >> 32); }
UNSWAG_HD inline std::uint32_t lower_word(std::uint64_t product) { return std::uint32_t(product); }

template <class W>
UNSWAG_HD inline PhiloxWords<W> philox4x32(PhiloxWords<W> counter, std::uint32_t key0, std::uint32_t key1) {
  PhiloxWords<W> c = counter;
  for (int round = 0; round < 10; ++round) {
    const auto a = wide_product(c.word[0], 0xD2511F53), b = wide_product(c.word[2], 0xCD9E8D57);
    c = {{upper_word(b) ^ c.word[1] ^ W(key0), lower_word(b), upper_word(a) ^ c.word[3] ^ W(key1), lower_word(a)}};
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
  return philox4x32(PhiloxBlock{{std::uint32_t(low), std::uint32_t(low >> 32), carry, 0}}, std::uint32_t(seed),
                    std::uint32_t(seed >> 32));
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
