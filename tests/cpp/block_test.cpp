// Block codecs: the same bytes in every row of kernels, round trips within half a step of the scale, loud NaN, and stochastic
// rounding that is right in the mean.  The bytes themselves are held to the numpy twin in golden_test.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>

#include "matrix.hpp"

namespace unswag::test {
namespace {

bool is_whole(Block codec) { return listed(codec).rotated; }
// Its largest number is its lowest code.
bool is_wide(Block codec) { return is_whole(codec) && listed(codec).bits > 2; }

// Packed rows with bytes between them that nobody may touch.
struct PackedRows {
  std::int64_t rows, bytes, stride;
  Memory memory;
  PackedRows(Block codec, std::int64_t rows, std::int64_t cols, std::int64_t gap = 0)
      : rows(rows),
        bytes(block_row_bytes(codec, cols)),
        stride(bytes + gap),
        memory(std::size_t(rows ? (rows - 1) * stride + bytes : 0)) {}
  operator Packed() { return {reinterpret_cast<std::uint8_t*>(memory.data()), stride}; }
  operator ConstPacked() const { return {reinterpret_cast<const std::uint8_t*>(memory.data()), stride}; }
  std::vector<char> all() const { return {memory.data(), memory.data() + memory.size()}; }
};

void fill_with_outliers(Matrix& x, std::uint64_t seed) {
  Random random(seed);
  x.fill([&](std::int64_t, std::int64_t c) { return random.normal() * (c % 37 == 5 ? 60 : 1); });
}

TEST(Block, EveryRowOfKernelsWritesTheSameBytesAndReadsTheSameNumbers) {
  for (const Block codec : every<Block>()) {
    for (const DType dtype : float_dtypes) {
      for (const auto& [rows, cols, gap] : {std::tuple{1, 1, 0},
                                            {3, 15, 4},
                                            {2, 16, 0},
                                            {2, 17, 8},
                                            {5, 64, 0},
                                            {2, 65, 0},
                                            {3, 576, 4},
                                            {1, 1031, 0},
                                            {2, 2048, 0},
                                            {2, 3000, 12}}) {
        Matrix x(dtype, rows, cols, cols % 2 ? cols + 3 : -(cols + 5));
        fill_with_outliers(x, std::uint64_t(cols));
        x.read_only();
        for (const bool stochastic : {false, true}) {
          if (stochastic && !is_whole(codec)) continue;
          std::vector<char> first, numbers;
          for (const Kernels* k : backends()) {
            PackedRows packed(codec, rows, cols, gap);
            k->block_encode({codec, x, packed, stochastic, 7, 11}, {});
            Matrix y(dtype, rows, cols, cols + 2);
            k->block_decode({codec, packed, y}, {});
            if (first.empty()) first = packed.all(), numbers = y.bytes();
            ASSERT_EQ(packed.all(), first) << k->name << ' ' << name_of(codec) << ' ' << name_of(dtype) << ' ' << cols;
            ASSERT_EQ(y.bytes(), numbers) << k->name << ' ' << name_of(codec) << ' ' << name_of(dtype) << ' ' << cols;
            ASSERT_TRUE(y.gaps_untouched());
          }
        }
      }
    }
  }
}

// The largest step of a block is its scale; H / n is orthonormal up to 1 / sqrt(n): an error of half a step in each of n
// numbers is at most half a step in one, and of the opposite extreme, which is cut, one step more.
TEST(Block, ARoundTripIsAsNearAsTheScaleSays) {
  for (const Block codec : every<Block>(is_whole)) {
    const std::int64_t rows = 4, cols = 700;
    Matrix x(DType::f32, rows, cols), y(DType::f32, rows, cols);
    fill_with_outliers(x, 3);
    for (const Kernels* k : backends()) {
      PackedRows packed(codec, rows, cols);
      k->block_encode({codec, x, packed}, {});
      k->block_decode({codec, packed, y}, {});
      long double squares = 0, errors = 0;
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < cols; ++c) {
          squares += x.get(r, c) * x.get(r, c);
          errors += (x.get(r, c) - y.get(r, c)) * (x.get(r, c) - y.get(r, c));
        }
      // A uniform quantiser whose steps reach to the largest of n normal numbers, sqrt(2 log n) sigma.
      const auto [value, name, n, bits, rotated] = listed(codec);
      const long double bound = 1.4L * std::sqrt(2 * std::log((long double)n) / 12) / (1 << (bits - 1));
      EXPECT_LT(std::sqrt(errors / squares), bound) << k->name << ' ' << name;
      EXPECT_GT(std::sqrt(errors / squares), bound / 4) << "an error this small is none of this codec";
    }
  }
}

// A number alone in its block is all of the block's t, with both signs; those against the sign of the scale are cut at one step
// less. One too small for the smallest scale becomes 0, or at most that scale.
TEST(Block, ANumberAloneInItsBlockIsOffByAStepAtMost) {
  for (const Block codec : every<Block>(is_wide)) {
    const long double step = 1.0L / (1 << (listed(codec).bits - 1));
    for (const long double value : {1.0L, -3.0L, 0x1p-60L, 0x1p90L, 0x1p-120L}) {
      Matrix x(DType::f32, 1, 200), y(DType::f32, 1, 200);
      x.fill([&](std::int64_t, std::int64_t c) { return c == 77 ? value : 0.0L; });
      for (const Kernels* k : backends()) {
        PackedRows packed(codec, 1, 200);
        k->block_encode({codec, x, packed}, {});
        k->block_decode({codec, packed, y}, {});
        const long double bound = std::max(std::fabs(value) * step, 0x1p-100L);
        for (std::int64_t c = 0; c < 200; ++c) ASSERT_NEAR(y.get(0, c), x.get(0, c), bound) << k->name << ' ' << value;
      }
    }
  }
}

TEST(Block, ZerosStayZerosAndTheirBytesHaveNoScale) {
  for (const Block codec : every<Block>()) {
    Matrix x(DType::bf16, 2, 100), y(DType::bf16, 2, 100);
    x.fill([](auto, std::int64_t c) { return c % 2 ? -0.0L : 0.0L; });
    for (const Kernels* k : backends()) {
      PackedRows packed(codec, 2, 100);
      k->block_encode({codec, x, packed}, {});
      k->block_decode({codec, packed, y}, {});
      for (std::int64_t c = 0; c < 100; ++c) ASSERT_EQ(y.get(1, c), 0) << k->name << ' ' << name_of(codec);
    }
  }
}

TEST(Block, NanAndInfinityMakeTheirWholeBlockNanAndNoOther) {
  for (const Block codec : every<Block>()) {
    for (const long double bad : {std::numeric_limits<long double>::quiet_NaN(), std::numeric_limits<long double>::infinity(),
                                  -std::numeric_limits<long double>::infinity()}) {
      const std::int64_t cols = std::int64_t{5} * listed(codec).n;
      Matrix x(DType::f32, 2, cols), y(DType::f32, 2, cols);
      x.fill_normal(1);
      x.set(1, 7, bad);  // block 7 % 5 = 2 of row 1
      for (const Kernels* k : backends()) {
        PackedRows packed(codec, 2, cols);
        k->block_encode({codec, x, packed}, {});
        k->block_decode({codec, packed, y}, {});
        for (std::int64_t r = 0; r < 2; ++r)
          for (std::int64_t c = 0; c < cols; ++c)
            ASSERT_EQ(std::isnan(y.get(r, c)), r == 1 && c % 5 == 2) << k->name << ' ' << name_of(codec) << ' ' << c;
      }
    }
  }
}

TEST(Block, WhatOverflowsInTheRotationIsNan) {
  Matrix x(DType::f32, 1, 32), y(DType::f32, 1, 32);
  x.fill([](auto, std::int64_t c) { return c % 2 ? -3e38L : 3e38L; });
  for (const Kernels* k : backends()) {
    PackedRows packed(Block::int8, 1, 32);
    k->block_encode({Block::int8, x, packed}, {});
    k->block_decode({Block::int8, packed, y}, {});
    for (std::int64_t c = 0; c < 32; ++c) ASSERT_TRUE(std::isnan(y.get(0, c))) << k->name;
  }
}

// A block of equal numbers has one t that is not 0, n times the number, and a bfloat16 for scale: it comes back exactly.
TEST(Block, EveryBfloat16FillingItsBlock) {
  for (const Block codec : every<Block>(is_wide)) {
    const std::int64_t n = listed(codec).n;
    Matrix x(DType::bf16, 1 << 16, n), y(DType::bf16, 1 << 16, n);
    for (std::int64_t i = 0; i < 1 << 16; ++i)
      for (std::int64_t c = 0; c < n; ++c) std::memcpy(static_cast<char*>(x.row(i)) + 2 * c, &i, 2);
    std::int64_t exact = 0;
    for (const Kernels* k : {backends().front(), backends().back()}) {
      PackedRows packed(codec, 1 << 16, n);
      k->block_encode({codec, x, packed}, {});
      k->block_decode({codec, packed, y}, {});
      for (std::int64_t i = 0; i < 1 << 16; ++i) {
        const long double want = x.get(i, 0), got = y.get(i, n - 1);
        if (!std::isfinite(want) || std::fabs(want) >= 0x1p122L) {  // the sum of the block overflows
          if (!std::isfinite(want) || std::fabs(want) * n > 0x1p128L) {
            ASSERT_TRUE(std::isnan(got)) << want;
          }
        } else if (std::fabs(want) >= 0x1p-96L) {
          ASSERT_EQ(got, want) << k->name << ' ' << i;
          ++exact;
        } else {
          ASSERT_NEAR(got, want, 0x1p-96L) << k->name << ' ' << i;  // the smallest scale
        }
      }
    }
    EXPECT_GT(exact, 100000);
  }
}

// Every code of an 8-bit float is read as the format says and written again as itself.
TEST(Block, EveryCodeOfTheEightBitFloats) {
  for (const auto& [codec, mantissa, bias, largest] : {std::tuple{Block::e4m3, 3, 7, 0x7e}, {Block::e5m2, 2, 15, 0x7b}}) {
    std::set<int> seen;
    for (const Kernels* k : backends()) {
      for (int code = 0; code <= largest; ++code) {
        const int exponent = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
        const double value = exponent ? std::ldexp(1 + fraction / double(1 << mantissa), exponent - bias)
                                      : std::ldexp(fraction, 1 - bias - mantissa);
        Matrix x(DType::f32, 1, 32), y(DType::f32, 1, 32);
        x.fill([&](auto, std::int64_t c) { return c == 0 ? (codec == Block::e4m3 ? 448 : 57344) : c == 1 ? -value : value; });
        PackedRows packed(codec, 1, 32);
        k->block_encode({codec, x, packed}, {});
        k->block_decode({codec, packed, y}, {});
        ASSERT_EQ(std::uint8_t(packed.memory.data()[2]), code) << k->name;
        ASSERT_EQ(y.get(0, 1), -value);
        ASSERT_EQ(y.get(0, 2), value);
        seen.insert(code);
      }
    }
    EXPECT_EQ(int(seen.size()), largest + 1);
  }
}

TEST(Block, StochasticRoundingIsRightInTheMean) {
  for (const Block codec : every<Block>(is_whole)) {
    const std::int64_t cols = 128;
    const int draws = 4000;
    Matrix x(DType::f32, 1, cols), y(DType::f32, 1, cols);
    fill_with_outliers(x, 9);
    std::vector<double> sum(cols), squares(cols);
    const Kernels* k = backends().back();
    for (int i = 0; i < draws; ++i) {
      PackedRows packed(codec, 1, cols);
      k->block_encode({codec, x, packed, true, std::uint64_t(i), 0}, {});
      k->block_decode({codec, packed, y}, {});
      for (std::int64_t c = 0; c < cols; ++c) {
        sum[std::size_t(c)] += double(y.get(0, c));
        squares[std::size_t(c)] += double(y.get(0, c) * y.get(0, c));
      }
    }
    int far = 0;
    for (std::size_t c = 0; c < std::size_t(cols); ++c) {
      const double mean = sum[c] / draws, deviation = std::sqrt(std::max(squares[c] / draws - mean * mean, 0.0) / draws);
      far += std::fabs(mean - double(x.get(0, std::int64_t(c)))) > 4 * deviation + 1e-4;
      ASSERT_GT(deviation, 0);  // rounding to nearest would be the same each time
    }
    EXPECT_LE(far, 1) << name_of(codec);  // 4 sigma: 1 in 16,000 each
  }
}

TEST(Block, TheSameBitsForAnyNumberOfThreads) {
  Matrix x(DType::bf16, 200, 1000), one(DType::bf16, 200, 1000), five(DType::bf16, 200, 1000);
  fill_with_outliers(x, 2);
  for (const Kernels* k : backends()) {
    PackedRows a(Block::int4, 200, 1000), b(Block::int4, 200, 1000);
    k->block_encode({Block::int4, x, a, true, 3, 5}, {nullptr, 1});
    k->block_encode({Block::int4, x, b, true, 3, 5}, {nullptr, 5});
    ASSERT_EQ(a.all(), b.all()) << k->name;
    k->block_decode({Block::int4, a, one}, {nullptr, 1});
    k->block_decode({Block::int4, a, five}, {nullptr, 5});
    ASSERT_EQ(one.bytes(), five.bytes()) << k->name;
  }
}

// What is large goes past the cache, where its row is aligned for it: the same bits.
TEST(Block, LargeEnoughToStream) {
  const std::int64_t cols = (std::int64_t{9} << 19) + 48;  // row 1 is aligned, row 0 is not
  Matrix x(DType::bf16, 2, cols, cols + 27);
  fill_with_outliers(x, 6);
  for (const Kernels* k : {backends().front(), backends().back()}) {
    Matrix all(DType::bf16, 2, cols, cols + 27), one(DType::bf16, 1, cols);
    PackedRows packed(Block::int4, 2, cols);
    k->block_encode({Block::int4, x, packed}, {});
    k->block_decode({Block::int4, packed, all}, {});
    for (const std::int64_t r : {0, 1}) {
      ConstPacked row = packed;
      row.data += r * row.stride;
      k->block_decode({Block::int4, row, one}, {});
      ASSERT_EQ(std::memcmp(all.row(r), one.row(0), std::size_t(cols) * 2), 0) << k->name << ' ' << r;
    }
    ASSERT_TRUE(all.gaps_untouched());
  }
}

TEST(Block, Float64IsRoundedToFloatFirst) {
  Matrix x(DType::f64, 3, 100), as_float(DType::f32, 3, 100), y(DType::f64, 3, 100), y_float(DType::f32, 3, 100);
  x.fill_normal(4);
  as_float.fill([&](std::int64_t r, std::int64_t c) { return x.get(r, c); });
  for (const Kernels* k : backends(true)) {
    PackedRows packed(Block::int8, 3, 100), from_float(Block::int8, 3, 100);
    k->block_encode({Block::int8, x, packed}, {});
    k->block_encode({Block::int8, as_float, from_float}, {});
    ASSERT_EQ(packed.all(), from_float.all()) << k->name;
    k->block_decode({Block::int8, packed, y}, {});
    k->block_decode({Block::int8, packed, y_float}, {});
    for (std::int64_t c = 0; c < 100; ++c) ASSERT_EQ(float(y.get(2, c)), y_float.get(2, c)) << k->name;
  }
}

TEST(Block, NothingIsDoneForNothingAndArgumentsAreChecked) {
  EXPECT_TRUE(block_encode({Block::int8, {nullptr, DType::f32, 0, 8, 8}, {nullptr, 0}}).ok());
  EXPECT_TRUE(block_decode({Block::int8, {nullptr, 0}, {nullptr, DType::f32, 3, 0, 0}}).ok());
  Matrix x(DType::f32, 2, 40);
  x.fill_normal(1);
  PackedRows packed(Block::e4m3, 2, 40);
  const Status fp8 = block_encode({Block::e4m3, x, packed, true});
  EXPECT_EQ(fp8.code(), StatusCode::not_supported);
  EXPECT_NE(fp8.message().find("stochastic"), std::string::npos) << fp8.message();
  EXPECT_EQ(block_encode({Block(9), x, packed}).code(), StatusCode::invalid_argument);
  EXPECT_EQ(block_encode({Block::int8, x, {nullptr, 8}}).code(), StatusCode::invalid_argument);
  Packed narrow = packed;
  narrow.stride = 8;
  EXPECT_EQ(block_encode({Block::int8, x, narrow}).code(), StatusCode::invalid_argument);
}

TEST(Block, RowBytes) {
  EXPECT_EQ(block_row_bytes(Block::int8, 0), 0);
  EXPECT_EQ(block_row_bytes(Block::int8, 1), 36);
  EXPECT_EQ(block_row_bytes(Block::int8, 576), 18 * 34);
  EXPECT_EQ(block_row_bytes(Block::int4, 1536), 96 * 10);
  EXPECT_EQ(block_row_bytes(Block::int2, 1536), 24 * 18);
  EXPECT_EQ(block_row_bytes(Block::e5m2, std::int64_t{1} << 40), (std::int64_t{1} << 35) * 34);
}

}  // namespace
}  // namespace unswag::test
