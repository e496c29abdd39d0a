#include <gtest/gtest.h>

#include "matrix.hpp"

namespace {

using namespace unswag;
using test::Matrix;

std::vector<std::uint32_t> draws(std::int64_t n, std::uint64_t seed, std::uint64_t offset) {
  std::vector<std::uint32_t> words(std::size_t(n) + 1);
  all_kernels().front()->philox_fill(words.data(), n, seed, offset, {});
  return words;
}

Dropout args(const Matrix& x, Matrix& y, double p, std::uint64_t seed = 0x123456789abcdef0, std::uint64_t offset = 77) {
  Dropout a;
  a.x = x, a.y = y, a.p = p, a.seed = seed, a.offset = offset;
  return a;
}

TEST(Dropout, KeepsByTheDrawOfTheLogicalIndexWhateverTheStrides) {
  for (DType dtype : test::all_dtypes)
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (std::int64_t cols : {1, 3, 15, 16, 17, 67, 1021, 2053})
        for (double p : {1e-9, 0.1, 0.5, 0.999}) {
          constexpr std::int64_t rows = 5;
          Matrix x(dtype, rows, cols, cols + cols % 3), y(dtype, rows, cols, -(cols + 2));
          x.fill_normal(3);
          x.read_only();
          k->dropout(args(x, y, p), {});
          const std::vector<std::uint32_t> draw = draws(rows * cols, 0x123456789abcdef0, 77);
          const DType compute = dtype == DType::f64 ? dtype : DType::f32;
          for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t i = 0; i < cols; ++i) {
              const bool keep = draw[std::size_t(r * cols + i)] >= (long double)p * 0x1p32L;
              const long double scaled = test::product(compute, x.get(r, i), test::rounded(compute, double(1 / (1 - p))));
              ASSERT_EQ(y.get(r, i), keep ? test::rounded(dtype, scaled) : 0)
                  << k->name << " " << test::name_of(dtype) << " " << r << " " << i;
            }
          ASSERT_TRUE(y.gaps_untouched());
        }
}

TEST(Dropout, EveryRowOfTheTableAndAnyThreadsGiveTheSameBits) {
  for (DType dtype : test::float_dtypes) {
    Matrix x(dtype, 71, 1021), first(dtype, 71, 1021);
    x.fill_normal(9);
    test::backends().front()->dropout(args(x, first, 0.25), {nullptr, 1});
    for (const Kernels* k : test::backends())
      for (int threads : {1, 3}) {
        Matrix y(dtype, 71, 1021);
        k->dropout(args(x, y, 0.25), {nullptr, threads});
        EXPECT_EQ(y.bytes(), first.bytes()) << k->name << " " << threads;
      }
  }
}

TEST(Dropout, DroppedIsPlusZeroAndKeptNanStays) {
  const long double inf = std::numeric_limits<long double>::infinity(), nan = std::numeric_limits<long double>::quiet_NaN();
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      Matrix x(dtype, 1, 200), y(dtype, 1, 200);
      x.fill([&](auto, std::int64_t i) { return i % 4 == 0 ? nan : i % 4 == 1 ? -inf : i % 4 == 2 ? -1 : -0.0L; });
      k->dropout(args(x, y, 0.5), {});
      const std::vector<std::uint32_t> draw = draws(200, 0x123456789abcdef0, 77);
      int kept = 0;
      for (std::int64_t i = 0; i < 200; ++i) {
        const long double got = y.get(0, i);
        if (draw[std::size_t(i)] < 0x80000000u) {
          EXPECT_TRUE(got == 0 && !std::signbit(got)) << i;
        } else {
          ++kept;
          EXPECT_TRUE(i % 4 == 0 ? std::isnan(got) : got == 2 * x.get(0, i) && std::signbit(got)) << i;
        }
      }
      EXPECT_GT(kept, 70);
      EXPECT_LT(kept, 130);
    }
}

TEST(Dropout, TheFirstDrawIsKeptUpToItsOwnP) {
  for (const Kernels* k : test::backends())
    for (std::uint64_t seed : {1, 2, 3}) {
      const double draw = draws(1, seed, 77)[0];
      Matrix x(DType::f32, 1, 1), y(DType::f32, 1, 1);
      x.set(0, 0, 1);
      for (double above : {0.0, 0.5, 1.0}) {
        k->dropout(args(x, y, (draw + above) * 0x1p-32, seed), {});
        EXPECT_EQ(y.get(0, 0) != 0, above == 0) << k->name << " " << seed << " " << above;
      }
    }
}

TEST(Dropout, PZeroIsACopyOfEveryBitPattern) {
  for (DType dtype : {DType::f16, DType::bf16})
    for (const Kernels* k : test::backends()) {
      Matrix x(dtype, 256, 256), y(dtype, 256, 256);
      for (std::int64_t i = 0; i < 65536; ++i) static_cast<std::uint16_t*>(x.row(0))[i] = std::uint16_t(i);
      k->dropout(args(x, y, 0), {});
      EXPECT_EQ(x.bytes(), y.bytes()) << k->name;
    }
}

}  // namespace
