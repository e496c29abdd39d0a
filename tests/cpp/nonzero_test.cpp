// Non-zeros: what comes back is what went in, bit for bit, and nothing is touched that is not ours.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "matrix.hpp"
#include "packed.hpp"

namespace unswag::test {
namespace {

std::uint64_t bits_at(const Matrix& x, std::int64_t r, std::int64_t c) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(x.row(r)) + c * size_of(x.dtype()), std::size_t(size_of(x.dtype())));
  return bits;
}

// Counts, their sums, bitmap and values.
struct Encoded {
  std::vector<std::int64_t> offsets;
  PackedRows bitmap;
  Matrix values;

  Encoded(const Kernels& k, const Matrix& x, std::int64_t gap, int threads = 0)
      : offsets(sums(k, x, threads)),
        bitmap(x.rows(), packed_row_bytes(x.cols(), 1), gap),
        values(x.dtype(), 1, offsets.back()) {
    k.nonzero_encode({x, offsets.data(), bitmap, values.vector()}, {.threads = threads});
  }
  static std::vector<std::int64_t> sums(const Kernels& k, const Matrix& x, int threads) {
    std::vector<std::int64_t> counts(std::size_t(x.rows()), -1), sums(std::size_t(x.rows()) + 1, 0);
    k.nonzero_count({x, counts.data()}, {.threads = threads});
    std::partial_sum(counts.begin(), counts.end(), sums.begin() + 1);
    return sums;
  }
};

void check(const Kernels& k, const Matrix& x, std::int64_t stride, std::int64_t gap) {
  const std::int64_t rows = x.rows(), cols = x.cols();
  Encoded e(k, x, gap);
  std::int64_t at = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    ASSERT_EQ(e.offsets[std::size_t(r)], at) << k.name << " row " << r;
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::uint64_t bits = bits_at(x, r, c);
      ASSERT_EQ(e.bitmap.field(r, c, 1), bits != 0) << k.name << " " << r << ", " << c;
      if (bits != 0) {
        ASSERT_EQ(bits_at(e.values, 0, at++), bits) << k.name << " " << r << ", " << c;
      }
    }
    for (std::int64_t c = cols; c < packed_row_bytes(cols, 1) * 8; ++c) ASSERT_EQ(e.bitmap.field(r, c, 1), 0u);
  }
  ASSERT_EQ(at, e.offsets.back());
  e.bitmap.read_only(), e.values.read_only();
  Matrix back(x.dtype(), rows, cols, stride);
  k.nonzero_decode({e.bitmap, e.offsets.data(), std::as_const(e.values).vector(), back}, {});
  for (std::int64_t r = 0; r < rows; ++r)
    ASSERT_EQ(0, std::memcmp(back.row(r), x.row(r), std::size_t(cols * size_of(x.dtype())))) << k.name << " row " << r;
  ASSERT_TRUE(back.gaps_untouched() && e.bitmap.gaps_untouched());
}

long double special(std::uint64_t i) {
  const long double inf = std::numeric_limits<long double>::infinity(), nan = std::nanl("");
  const long double values[] = {-0.0L, inf, -inf, nan, -nan, 1e-45L, -1e-40L, 6e-8L};
  return values[i % 8];
}

TEST(Nonzero, EveryLengthStrideAndDensityComesBackBitForBit) {
  Random random(1);
  for (const DType dtype : all_dtypes) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      // Workers that meet at every tile of a row take long as threads of a host.
      for (std::int64_t cols = 1; cols <= (is_cuda(*k) ? 140 : 5000); cols += is_cuda(*k) ? 19
                                                                              : cols < 40 ? 1
                                                                              : cols < 70 ? 7
                                                                                          : 821) {
        for (const int kept_in_8 : {0, 1, 4, 8}) {
          const std::int64_t rows = cols < 70 ? 4 : 2;
          const std::int64_t stride = cols % 3 == 0 ? cols : cols % 3 == 1 ? cols + 5 : -cols - 3;
          Matrix x(dtype, rows, cols, stride);
          x.fill([&](std::int64_t, std::int64_t) -> long double {
            const std::uint64_t draw = random.bits();
            if (int(draw % 8) >= kept_in_8) return 0;
            return draw >> 8 & 1 ? special(draw >> 16) : random.normal();
          });
          x.read_only();
          ASSERT_NO_FATAL_FAILURE(check(*k, x, stride, cols % 4 * 4)) << name_of(dtype) << " " << cols << " " << kept_in_8;
        }
      }
    }
  }
}

TEST(Nonzero, EveryNumberOf16BitsIsKeptButPlusZero) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    Matrix x(dtype, 256, 256);
    for (std::int64_t i = 0; i < 65536; ++i) static_cast<std::uint16_t*>(x.row(0))[i] = std::uint16_t(i);
    for (const Kernels* k : backends()) {
      if (is_cuda(*k)) continue;
      ASSERT_NO_FATAL_FAILURE(check(*k, x, 256, 0));
      EXPECT_EQ(Encoded(*k, x, 0).offsets.back(), 65535) << k->name;
    }
  }
}

TEST(Nonzero, TheSameInEveryRowAndForAnyThreads) {
  Matrix x(DType::bf16, 13, 321);
  Random random(7);
  x.fill([&](auto, auto) { return random.bits() % 3 ? 0 : random.normal(); });
  const Encoded first(*backends().front(), x, 0, 1);
  for (const Kernels* k : backends()) {
    for (const int threads : {1, 5}) {
      const Encoded e(*k, x, 0, threads);
      ASSERT_EQ(e.offsets, first.offsets) << k->name;
      ASSERT_EQ(e.bitmap.bytes(), first.bitmap.bytes()) << k->name;
      ASSERT_EQ(e.values.bytes(), first.values.bytes()) << k->name;
      Matrix back(DType::bf16, 13, 321);
      k->nonzero_decode({e.bitmap, e.offsets.data(), e.values.vector(), back}, {.threads = threads});
      ASSERT_EQ(back.bytes(), x.bytes()) << k->name;
    }
  }
}

// Offsets that are not those of x: values stay within their row's stretch, and what is missing comes back as NaN.
TEST(Nonzero, NothingOutsideAStretchIsTouched) {
  for (const DType dtype : float_dtypes) {
    for (const Kernels* k : backends()) {
      Matrix x(dtype, 3, 67), values(dtype, 1, 60), back(dtype, 3, 67);
      x.fill([](auto, auto) { return 2; });
      values.fill([](auto, auto) { return 7; });
      PackedRows bitmap(3, packed_row_bytes(67, 1));
      const std::int64_t offsets[] = {0, 10, 40, 55};
      k->nonzero_encode({x, offsets, bitmap, values.vector()}, {});
      for (std::int64_t i = 0; i < 60; ++i) ASSERT_EQ(values.get(0, i), i < 55 ? 2 : 7) << k->name << " " << i;
      values.read_only();
      k->nonzero_decode({bitmap, offsets, std::as_const(values).vector(), back}, {});
      for (std::int64_t r = 0; r < 3; ++r)
        for (std::int64_t c = 0; c < 67; ++c)
          ASSERT_EQ(std::isnan(back.get(r, c)), c >= offsets[r + 1] - offsets[r]) << k->name << " " << r << ", " << c;
    }
  }
}

}  // namespace
}  // namespace unswag::test
