// Draws of src/math/philox.hpp, many at a time.
#pragma once

#include <cstring>

#include "cpu/simd.hpp"
#include "math/philox.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

struct Draws {
  std::uint64_t seed, offset;

  // Blocks of four draws: block, block + 1, ...
  void blocks(std::uint32_t* out, std::uint64_t block, std::int64_t count) const {
    for (std::int64_t b = 0; b < count; ++b) {
      const math::PhiloxBlock draws = math::philox_block(seed, offset, block + std::uint64_t(b));
      for (int w = 0; w < 4; ++w) out[4 * b + w] = draws.word[w];
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
  void units(const Draws& draws, std::int64_t first, std::int64_t n, S* v) {
    const std::int64_t skip = first % 8;
    draws.blocks(words_, std::uint64_t(first / 8), (skip + n + 7) / 8);
    std::uint16_t halves[kSize + 8];  // the low half of a word comes first
    for (std::int64_t w = 0; w < (skip + n + 1) / 2; ++w) {
      halves[2 * w] = std::uint16_t(words_[w]);
      halves[2 * w + 1] = std::uint16_t(words_[w] >> 16);
    }
    for (std::int64_t k = 0; k < n; ++k) v[k] = math::unit_of_half<S>(halves[skip + k]);
  }

 private:
  std::uint32_t words_[kSize + 4];
};

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
