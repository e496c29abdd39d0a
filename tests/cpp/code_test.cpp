// Step codes of 1 to 4 bits on every row that runs here, against the definition: the number of bounds strictly below x.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <set>
#include <vector>

#include "matrix.hpp"
#include "packed.hpp"

namespace unswag::test {
namespace {

constexpr long double inf = std::numeric_limits<long double>::infinity();
const long double nan = std::nanl("");

// Bounds of every kind: not representable, on both sides, so near that they are one float, and at the ends of the range.
std::vector<double> bounds_of(int bits) {
  std::vector<double> all{-3e38, -6.5, -1.5, -0.1, -1e-40, 0.0, 1e-45, 0.1, 0.10000000001, 0.25, 1.0, 1.5, 6.0, 7.25, 3e38};
  switch (bits) {
    case 1: return {0.0};
    case 2: return {-0.1, 0.0, 1.5};
    case 3: return {-1.5, -0.1, -1e-40, 0.0, 0.1, 0.25, 6.0};
    default: return all;
  }
}
constexpr double levels[]{-0.1, 0.3, 0.7, 1.1, 0.0, 1e-3, 2.0, -3.5, 1.0, -1.0, 0.5, 1e30, -1e-30, 0.25, 0.75, 0.9};

CodeForward forward(const std::vector<double>& bounds, int bits, ConstRows x, Rows y, Packed packed) {
  CodeForward a{.bits = bits, .count = int(bounds.size()), .x = x, .y = y, .packed = packed};
  std::ranges::copy(bounds, a.bounds);
  return a;
}
CodeBackward backward(int count, int bits, ConstRows dy, ConstPacked packed, Rows dx) {
  CodeBackward a{.bits = bits, .count = count, .dy = dy, .packed = packed, .dx = dx};
  std::copy_n(levels, count, a.levels);
  return a;
}

unsigned code_of(DType dtype, const std::vector<double>& bounds, long double x) {
  unsigned code = 0;
  for (const double bound : bounds) code += x > (dtype == DType::f64 ? bound : double(float(bound)));
  return code;
}
bool same(long double a, long double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// One forward and one backward, compared element by element.
void check(const Kernels& k, int bits, const Matrix& x, const Matrix& dy, std::int64_t stride, std::int64_t gap) {
  const std::int64_t rows = x.rows(), cols = x.cols(), row_bytes = packed_row_bytes(cols, bits);
  const DType dtype = x.dtype(), compute = dtype == DType::f64 ? dtype : DType::f32;
  const std::vector<double> bounds = bounds_of(bits);
  Matrix y(dtype, rows, cols, stride), value(dtype, rows, cols, stride), dx(dtype, rows, cols, stride);
  PackedRows packed(rows, row_bytes, gap), alone(rows, row_bytes, gap);
  k.code_forward(forward(bounds, bits, x, y, packed), {});
  k.code_forward(forward(bounds, bits, x, {}, alone), {});
  k.activation_forward({Activation::silu, x, value}, {});
  packed.read_only();
  k.code_backward(backward(1 << bits, bits, dy, packed, dx), {});
  ASSERT_EQ(packed.bytes(), alone.bytes()) << "the codes depend on whether y is asked for";
  ASSERT_EQ(y.bytes(), value.bytes()) << k.name << " y is not act(x)";
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      const unsigned code = code_of(dtype, bounds, x.get(r, c));
      ASSERT_EQ(packed.field(r, c * bits, bits), code) << k.name << " of " << x.get(r, c) << " at " << r << ", " << c;
      const long double factor = rounded(compute, levels[code]);
      ASSERT_PRED2(same, dx.get(r, c), rounded(dtype, product(compute, dy.get(r, c), factor)))
          << k.name << " dy " << dy.get(r, c) << " at " << r << ", " << c;
    }
    for (std::int64_t i = cols * bits; i < row_bytes * 8; ++i) ASSERT_EQ(packed.field(r, i, 1), 0u) << "tail bit " << i;
  }
  ASSERT_TRUE(y.gaps_untouched() && dx.gaps_untouched() && packed.gaps_untouched());
}

long double special(std::int64_t i) {
  const long double values[] = {0.0L,   -0.0L,   6.0L, -6.5L, inf,   -inf,  nan,    -nan,
                                1e-40L, -1e-40L, 0.1L, 1.5L,  7.25L, 0.25L, 1e-45L, 3e38L};
  return values[i % 16];
}

TEST(Code, EveryLengthStrideAndSpecialValue) {
  Random random(1);
  for (const DType dtype : all_dtypes) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (std::int64_t cols = 0; cols <= 2100; cols += cols < 20 ? 1 : cols < 70 ? 5 : 1013) {
        const std::int64_t rows = cols < 70 ? 3 : 1;
        const std::int64_t stride = cols % 3 == 0 ? cols : cols % 3 == 1 ? cols + 5 : -cols - 3;
        Matrix x(dtype, rows, cols, stride), dy(dtype, rows, cols, stride);
        if (cols == 0) continue;  // src/api ends here
        x.fill([&](std::int64_t, std::int64_t c) {
          return c % 2 ? special(std::int64_t(random.bits() % 16)) : 3 * random.normal();
        });
        dy.fill(
            [&](std::int64_t, std::int64_t c) { return c % 5 ? random.normal() : special(std::int64_t(random.bits() % 16)); });
        x.read_only();
        dy.read_only();
        for (const int bits : {1, 2, 3, 4})
          ASSERT_NO_FATAL_FAILURE(check(*k, bits, x, dy, stride, cols % 4))
              << name_of(dtype) << " cols " << cols << " bits " << bits;
      }
    }
  }
}

// All values of a 16-bit format, or floats of every exponent and sign.
TEST(Code, EveryNumberOf16BitsAndFloatsOfEveryExponent) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 1, 1 << 16), dy(dtype, 1, 1 << 16);
    for (std::uint32_t i = 0; i < 1 << 16; ++i) {
      const std::uint32_t bits = dtype == DType::f32 ? i << 16 | (i * 40503 & 0xffff) : i;
      std::memcpy(static_cast<char*>(x.row(0)) + i * std::size_t(size_of(dtype)), &bits, std::size_t(size_of(dtype)));
    }
    dy.fill([](std::int64_t, std::int64_t c) { return c % 7 == 6 ? special(c) : 1.5L; });
    for (const Kernels* k : backends())
      for (const int bits : {2, 4}) ASSERT_NO_FATAL_FAILURE(check(*k, bits, x, dy, 0, 0)) << name_of(dtype);
  }
}

TEST(Code, InputsReachEveryCode) {
  Matrix x(DType::f32, 1, 4000);
  x.fill([](std::int64_t, std::int64_t c) { return c % 3 ? special(c) : (c - 2000) / 150.0L; });
  for (const int bits : {1, 2, 3}) {
    PackedRows packed(1, packed_row_bytes(4000, bits));
    std::set<unsigned> codes;
    backends().front()->code_forward(forward(bounds_of(bits), bits, x, {}, packed), {});
    for (std::int64_t c = 0; c < 4000; ++c) codes.insert(packed.field(0, c * bits, bits));
    EXPECT_EQ(codes.size(), std::size_t(1) << bits);
  }
}

// A step of 1 visits all 2^32 floats.
void every_float(std::uint32_t first, std::uint32_t step) {
  std::vector<float> x(1 << 16);
  std::vector<std::uint8_t> packed(1 << 13);
  const float bound = -0.1f;
  for (std::uint64_t upper = first; upper < 1 << 16; upper += step) {
    for (std::uint32_t low = 0; low < 1 << 16; ++low) x[low] = std::bit_cast<float>(std::uint32_t(upper) << 16 | low);
    for (const Kernels* k : backends()) {
      k->code_forward(forward({-0.1}, 1, {x.data(), DType::f32, 1, 1 << 16, 1 << 16}, {}, {packed.data(), 1 << 13}), {});
      std::uint32_t wrong = 0;
      for (std::uint32_t low = 0; low < 1 << 16; ++low) wrong += (packed[low / 8] >> (low % 8) & 1) != (x[low] > bound);
      ASSERT_EQ(wrong, 0u) << k->name << " among the floats with upper half " << upper;
    }
  }
  for (const Kernels* k : backends())  // for bench/exhaustive.py
    testing::Test::RecordProperty(
        k->name + std::string(" code 1 bit"),
        "checked=" + std::to_string((std::uint64_t{0xffff - first} / step + 1) << 16) + " mismatches=0");
}
TEST(Code, OneFloatIn331) { every_float(3, 331); }
TEST(CodeExhaustive, EveryFloat) {
  if (!std::getenv("UNSWAG_EXHAUSTIVE")) GTEST_SKIP() << "2^32 values; make test-exhaustive";
  every_float(0, 1);
}

// Of the derivative: with dy = 1 the backward of the same row gives it, unrounded where the dtype is that of the computation.
TEST(Code, OfTheDerivativeComparesIt) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (const Activation act : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
        Matrix x(dtype, 3, 2077), one(dtype, 3, 2077), slope(dtype, 3, 2077), y(dtype, 3, 2077), value(dtype, 3, 2077);
        x.fill_normal(5, 3);
        x.set(0, 0, nan), x.set(1, 7, inf), x.set(2, 2076, -inf), x.set(0, 5, -0.0L);
        one.fill([](auto, auto) { return 1; });
        k->activation_backward({act, x, one, slope}, {});
        k->activation_forward({act, x, value}, {});
        const std::vector<double> bounds{-0.05, 0.1, 0.4, 0.5, 0.6, 0.9, 1.05};
        PackedRows packed(3, packed_row_bytes(2077, 3), 1);
        CodeForward a = forward(bounds, 3, x, y, packed);
        a.act = act, a.of_derivative = true;
        k->code_forward(a, {});
        EXPECT_EQ(y.bytes(), value.bytes());
        for (std::int64_t r = 0; r < 3; ++r)
          for (std::int64_t c = 0; c < 2077; ++c)
            ASSERT_EQ(packed.field(r, 3 * c, 3), code_of(dtype, bounds, slope.get(r, c))) << k->name << " " << x.get(r, c);
      }
    }
  }
}

TEST(Code, ACodeWithoutALevelGivesNan) {
  for (const Kernels* k : backends()) {
    const std::uint8_t packed[4] = {0b11100100, 0, 0, 0};  // 0 1 2 3
    Matrix dy(DType::bf16, 1, 4), dx(DType::bf16, 1, 4);
    dy.fill([](auto, auto) { return 1; });
    k->code_backward(backward(3, 2, dy, {packed, 4}, dx), {});
    EXPECT_FALSE(std::isnan(dx.get(0, 2))) << k->name;
    EXPECT_TRUE(std::isnan(dx.get(0, 3))) << k->name;
  }
}

TEST(Code, TheExampleOfTheFormat) {
  const float x[] = {-2, -1.5, 0, 0.25, 0.5, 1.5, 2};
  for (const Kernels* k : backends()) {
    std::uint8_t packed[4];
    k->code_forward(forward({-1.5, 0.25, 1.5}, 2, {x, DType::f32, 1, 7, 7}, {}, {packed, 4}), {});
    EXPECT_EQ(packed[0], 0x50);
    EXPECT_EQ(packed[1], 0x3a);
    EXPECT_EQ(packed[2] | packed[3], 0);
  }
}

TEST(Code, MisalignedAndLargeEnoughToStream) {
  for (const Kernels* k : backends()) {
    for (const std::int64_t n : {(std::int64_t{8} << 20) + 77, (std::int64_t{8} << 20) + 96}) {  // the latter is aligned
      Memory x(std::size_t(2 * n)), y(std::size_t(2 * n));
      auto* in = reinterpret_cast<std::uint16_t*>(x.data());
      auto* out = reinterpret_cast<std::uint16_t*>(y.data());
      for (std::int64_t i = 0; i < n; ++i) in[i] = std::uint16_t(i * 40503u >> 3 & 0x3fff) | std::uint16_t(i % 2 << 15);
      PackedRows packed(1, packed_row_bytes(n, 2));
      CodeForward a = forward({-0.1, 0.0, 0.5}, 2, {in, DType::bf16, 1, n, n}, {out, DType::bf16, 1, n, n}, packed);
      a.act = Activation::relu;
      k->code_forward(a, {});
      std::int64_t wrong = 0;
      const auto value = [&](std::int64_t i) { return std::bit_cast<float>(std::uint32_t{in[i]} << 16); };
      for (std::int64_t i = 0; i < n; ++i) {
        const float v = value(i);
        wrong += out[i] != (v < 0 ? 0 : in[i]);
        wrong += (packed.row(0)[i / 4] >> (i % 4 * 2) & 3) != (v > -0.1f) + (v > 0) + (v > 0.5f);
      }
      ASSERT_EQ(wrong, 0) << k->name << " " << n;
      CodeBackward b{.bits = 2, .count = 4, .dy = a.x, .packed = packed, .dx = a.y};
      const double powers[] = {0, 0.5, 1, 2};
      std::ranges::copy(powers, b.levels);
      k->code_backward(b, {});
      for (std::int64_t i = 0; i < n; ++i) {
        const float v = value(i), dx = v * float(powers[packed.row(0)[i / 4] >> (i % 4 * 2) & 3]);
        wrong += std::bit_cast<float>(std::uint32_t{out[i]} << 16) != dx && std::fabs(dx) > 1e-37f;
      }
      ASSERT_EQ(wrong, 0) << k->name << " " << n;
    }
  }
}

TEST(Code, TheSameBytesInEveryRowAndForAnyThreads) {
  for (const int bits : {1, 2, 3, 4}) {
    Matrix x(DType::bf16, 3, 40003), dy(DType::bf16, 3, 40003), first(DType::bf16, 3, 40003);
    x.fill_normal(5), dy.fill_normal(6);
    PackedRows expected(3, packed_row_bytes(40003, bits));
    backends().front()->code_forward(forward(bounds_of(bits), bits, x, {}, expected), {nullptr, 1});
    backends().front()->code_backward(backward(1 << bits, bits, dy, expected, first), {nullptr, 1});
    for (const Kernels* k : backends()) {
      Matrix y(DType::bf16, 3, 40003), again(DType::bf16, 3, 40003), dx(DType::bf16, 3, 40003);
      for (const int threads : {1, 5}) {
        PackedRows packed(3, packed_row_bytes(40003, bits));
        Matrix& value = threads == 1 ? y : again;
        k->code_forward(forward(bounds_of(bits), bits, x, value, packed), {nullptr, threads});
        ASSERT_EQ(packed.bytes(), expected.bytes()) << k->name;
        k->code_backward(backward(1 << bits, bits, dy, packed, dx), {nullptr, threads});
        ASSERT_EQ(dx.bytes(), first.bytes()) << k->name;
      }
      ASSERT_EQ(y.bytes(), again.bytes()) << k->name;
    }
  }
}

// 2^31 + 64 elements in one row.  Untouched pages read as 0: the probes are not.
TEST(Code, BeyondTwoToThe31) {
  const std::int64_t n = (std::int64_t{1} << 31) + 64;
  const std::int64_t probes[] = {0, 1, (std::int64_t{1} << 30) + 3, (std::int64_t{1} << 31) - 1, std::int64_t{1} << 31, n - 1};
  Memory x(std::size_t(2 * n)), packed(std::size_t(packed_row_bytes(n, 1)));
  for (const std::int64_t i : probes) reinterpret_cast<std::uint16_t*>(x.data())[i] = 0x3f80;
  auto* bits = reinterpret_cast<std::uint8_t*>(packed.data());
  backends().back()->code_forward(forward({0.5}, 1, {x.data(), DType::bf16, 1, n, n}, {}, {bits, std::int64_t(packed.size())}),
                                  {});
  std::int64_t set = 0;
  for (std::size_t i = 0; i < packed.size(); ++i) set += __builtin_popcount(bits[i]);
  ASSERT_EQ(set, 6);
  for (const std::int64_t i : probes) ASSERT_TRUE(bits[i / 8] >> (i % 8) & 1) << i;
}

}  // namespace
}  // namespace unswag::test
