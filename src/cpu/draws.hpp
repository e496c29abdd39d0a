// Draws of src/math/philox.hpp, many at a time.
#pragma once

#include <cstring>

#include "cpu/simd.hpp"
#include "cpu/simd/words.hpp"
#include "math/philox.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

struct Draws {
  std::uint64_t seed, offset;

  // Blocks of four draws: block, block + 1, ...
  void blocks(std::uint32_t* out, std::uint64_t block, std::int64_t count) const {
    const std::uint64_t low = offset + block;
    std::int64_t b = 0;
    if (low + std::uint64_t(count) >= low) {  // the counter's upper half is the same for all of them
      const std::uint32_t key0 = std::uint32_t(seed), key1 = std::uint32_t(seed >> 32);
      const words carry(std::uint32_t(low < offset)), none(0u);
      for (; b + words::size <= count; b += words::size) {
        const words counter = words::counted(low + std::uint64_t(b));
        store_blocks(out + 4 * b, math::philox4x32<words>({{counter, upper_word(counter), carry, none}}, key0, key1));
      }
    }
    for (; b < count; ++b) {
      const math::PhiloxBlock draws = math::philox_block(seed, offset, block + std::uint64_t(b));
      memcpy(out + 4 * b, draws.word, sizeof draws.word);
    }
  }
};

// A stretch of consecutive draws, as many as a kernel wants to have at hand.
class Window {
 public:
  static constexpr std::int64_t kSize = 1024;

  // Draws first ... first + n - 1, n <= kSize; valid until the next call.
  const std::uint32_t* at(const Draws& draws, std::int64_t first, std::int64_t n) {
    const std::int64_t skip = first % 4;
    draws.blocks(words_, std::uint64_t(first / 4), (skip + n + 3) / 4);
    return words_ + skip;
  }

  // v[k] = the number in (0, 1) of element first + k, k < n <= kSize.
  template <class S>
  void units(const Draws& draws, std::int64_t first, std::int64_t n, S* __restrict v) {
    const std::int64_t skip = first % 8;
    draws.blocks(words_, std::uint64_t(first / 8), (skip + n + 7) / 8);
    std::uint16_t halves[kSize + 8];  // the low half of a word comes first
    memcpy(halves, words_, std::size_t(skip + n + 1) / 2 * sizeof *words_);
    for (std::int64_t k = 0; k < n; ++k) v[k] = math::unit_of_half<S>(halves[skip + k]);
  }

 private:
  std::uint32_t words_[kSize + 4];
};

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
