#include "math/philox.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "api/check.hpp"
#include "memory.hpp"

namespace {

using unswag::Kernels;
using unswag::math::PhiloxBlock;

std::vector<const Kernels*> rows_here() {
  std::vector<const Kernels*> rows;
  for (const Kernels* k : unswag::all_kernels())
    if (k->runs_here() && k->philox_fill) rows.push_back(k);
  return rows;
}

// Philox as the paper writes it, with the 128-bit counter as one number: independent of src/math.
std::uint32_t draw(std::uint64_t seed, std::uint64_t offset, std::uint64_t i) {
  __extension__ using Wide = unsigned __int128;
  const Wide counter = Wide(offset) + i / 4;
  std::uint32_t x[4], key[2] = {std::uint32_t(seed), std::uint32_t(seed >> 32)};
  for (int w = 0; w < 4; ++w) x[w] = std::uint32_t(counter >> (32 * w));
  for (int round = 0; round < 10; ++round) {
    if (round > 0) key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    const Wide left = Wide(0xD2511F53u) * x[0], right = Wide(0xCD9E8D57u) * x[2];
    const std::uint32_t next[4] = {std::uint32_t(right >> 32) ^ x[1] ^ key[0], std::uint32_t(right),
                                   std::uint32_t(left >> 32) ^ x[3] ^ key[1], std::uint32_t(left)};
    for (int w = 0; w < 4; ++w) x[w] = next[w];
  }
  return x[i % 4];
}

// Known answers of Random123 (tests/kat_vectors, the lines "philox4x32 10").
TEST(Philox, MeetsThePublishedVectors) {
  struct Known {
    std::uint32_t counter[4], key[2], answer[4];
  };
  const Known known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) {
    PhiloxBlock counter;
    for (int w = 0; w < 4; ++w) counter.word[w] = k.counter[w];
    const PhiloxBlock got = unswag::math::philox4x32(counter, k.key[0], k.key[1]);
    for (int w = 0; w < 4; ++w) EXPECT_EQ(got.word[w], k.answer[w]) << w;
  }
}

TEST(PhiloxFill, EveryRowDrawsTheStream) {
  const std::uint64_t streams[][2] = {
      {0, 0}, {0x299f31d0a4093822, 0x85a308d3243f6a88}, {1, 0xFFFFFFFFFFFFFFFC}, {~0ull, 0xFFFFFFFF}};
  ASSERT_FALSE(rows_here().empty());
  for (const Kernels* k : rows_here())
    for (const auto& [seed, offset] : streams)
      for (std::int64_t n : {0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 67, 1009}) {
        unswag::test::Memory out(std::size_t(n) * 4);
        auto* words = reinterpret_cast<std::uint32_t*>(out.data());
        k->philox_fill(words, n, seed, offset, {});
        for (std::int64_t i = 0; i < n; ++i)
          ASSERT_EQ(words[i], draw(seed, offset, std::uint64_t(i))) << k->name << " " << n << " " << i;
      }
}

// The counter's upper half is 0 before the 17th draw and 1 after it, in chunks that begin on either side.
TEST(PhiloxFill, TheCarryReachesEveryChunk) {
  constexpr std::int64_t n = 50000;
  for (const Kernels* k : rows_here()) {
    std::vector<std::uint32_t> words(n);
    k->philox_fill(words.data(), n, 3, 0xFFFFFFFFFFFFFFFC, {});
    for (std::int64_t i = 0; i < n; i += i < 64 ? 1 : 61)
      ASSERT_EQ(words[std::size_t(i)], draw(3, 0xFFFFFFFFFFFFFFFC, std::uint64_t(i))) << k->name << " " << i;
  }
}

TEST(PhiloxFill, ThreadsDoNotChangeTheDraws) {
  constexpr std::int64_t n = (1 << 20) + 3;
  for (const Kernels* k : rows_here()) {
    std::vector<std::uint32_t> one(n), three(n);
    k->philox_fill(one.data(), n, 7, 9, {nullptr, 1});
    k->philox_fill(three.data(), n, 7, 9, {nullptr, 3});
    EXPECT_EQ(one, three) << k->name;
    for (std::int64_t i = n - 1; i >= 0; i -= 997) ASSERT_EQ(one[i], draw(7, 9, std::uint64_t(i))) << k->name << " " << i;
  }
}

TEST(Dropout, ThresholdIsTheSmallestDrawKept) {
  using unswag::math::dropout_threshold;
  EXPECT_EQ(dropout_threshold(0.0), 0u);
  EXPECT_EQ(dropout_threshold(0.5), 0x80000000u);
  EXPECT_EQ(dropout_threshold(0.1), 429496730u);    // ceil(429496729.6)
  EXPECT_EQ(dropout_threshold(1e-300), 1u);         // a draw of 0 is below any p > 0
  EXPECT_EQ(dropout_threshold(1.0), 0x100000000u);  // nothing is kept
}

}  // namespace
