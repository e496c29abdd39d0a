// 1-bit masks: every value of every format, every length and misalignment, sizes past 2^31, on every row that runs here.
// The truth is written from include/unswag/unswag.hpp in floating-point comparisons; the kernels compare integers.
#include <gtest/gtest.h>

#include <bit>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstdlib>
#include <vector>

#include "matrix.hpp"

namespace unswag::test {
namespace {

bool is_of_jax(Mask act) { return listed(act).name.starts_with("jax_"); }
bool leaky(Mask act) { return act == Mask::leaky_relu || act == Mask::jax_leaky_relu; }
constexpr double slope = 0.01;

bool passes(Mask act, long double x) {
  switch (act) {
    case Mask::relu: return !(x <= 0);
    case Mask::leaky_relu: return x > 0;
    case Mask::relu6: return !(x <= 0 || x >= 6);
    case Mask::jax_relu: return x > 0;
    case Mask::jax_leaky_relu: return x >= 0;
    case Mask::jax_relu6: return x > 0 && x < 6;
  }
  return false;
}
// Computation is in float (double for f64), the result is rounded once to the dtype.
long double times_slope(DType dtype, long double x) {
  if (dtype == DType::f64) return double(x) * slope;
  return rounded(dtype, float(x) * float(slope));
}
long double value(DType dtype, Mask act, long double x) {
  switch (act) {
    case Mask::relu: return x < 0 ? 0 : x;
    case Mask::leaky_relu: return x > 0 ? x : times_slope(dtype, x);
    case Mask::relu6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case Mask::jax_relu: return x <= 0 ? 0 : x;  // +0 of -0
    case Mask::jax_leaky_relu: return x >= 0 ? x : times_slope(dtype, x);
    case Mask::jax_relu6: return x <= 0 ? 0 : x > 6 ? 6 : x;
  }
  return 0;
}
long double gradient(DType dtype, Mask act, long double dy, bool bit) {
  return bit ? dy : leaky(act) ? times_slope(dtype, dy) : 0;
}
bool same(long double a, long double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// Packed rows that end at a guard page.
struct PackedRows {
  std::int64_t stride;
  Memory memory;
  PackedRows(std::int64_t rows, std::int64_t cols, std::int64_t gap = 0)
      : stride(packed_row_bytes(cols, 1) + gap),
        memory(std::size_t(rows ? (rows - 1) * stride + packed_row_bytes(cols, 1) : 0)) {}
  std::uint8_t* row(std::int64_t r) const { return reinterpret_cast<std::uint8_t*>(memory.data()) + r * stride; }
  bool bit(std::int64_t r, std::int64_t c) const { return row(r)[c / 8] >> (c % 8) & 1; }
  operator Packed() { return {row(0), stride}; }
  operator ConstPacked() const { return {row(0), stride}; }
};

// One forward and one backward of x and dy, compared element by element with the definition.
void check(const Kernels& k, Mask act, const Matrix& x, const Matrix& dy, std::int64_t stride, std::int64_t gap) {
  const std::int64_t rows = x.rows(), cols = x.cols();
  Matrix y(x.dtype(), rows, cols, stride), dx(x.dtype(), rows, cols, stride);
  PackedRows packed(rows, cols, gap), alone(rows, cols, gap);
  k.mask_forward({act, slope, false, x, y, packed}, {});
  k.mask_forward({act, slope, false, x, {}, alone}, {});
  k.mask_backward({act, slope, dy, packed, dx}, {});
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      const long double v = x.get(r, c);
      ASSERT_EQ(packed.bit(r, c), passes(act, v)) << k.name << " mask of " << v << " at " << r << ", " << c;
      ASSERT_PRED2(same, y.get(r, c), value(x.dtype(), act, v)) << k.name << " of " << v << " at " << r << ", " << c;
      ASSERT_PRED2(same, dx.get(r, c), gradient(x.dtype(), act, dy.get(r, c), passes(act, v)))
          << k.name << " dy " << dy.get(r, c) << " at " << r << ", " << c;
    }
    for (std::int64_t c = cols; c < packed_row_bytes(cols, 1) * 8; ++c) ASSERT_FALSE(packed.bit(r, c)) << "tail bit " << c;
    ASSERT_EQ(0, std::memcmp(packed.row(r), alone.row(r), std::size_t(packed_row_bytes(cols, 1))));
  }
  ASSERT_TRUE(y.gaps_untouched() && dx.gaps_untouched());
}

long double special(std::int64_t i) {
  constexpr long double inf = std::numeric_limits<long double>::infinity();
  const long double values[] = {0.0L,           -0.0L,  6.0L,    -6.0L, inf,  -inf,  std::nanl(""),
                                -std::nanl(""), 1e-40L, -1e-40L, 0.5L,  7.0L, -3.0L, 5.98L};
  return values[i % 14];
}

TEST(Mask, EveryLengthStrideAndSpecialValue) {
  Random random(1);
  for (const DType dtype : all_dtypes) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (std::int64_t cols = 0; cols <= 4097; cols += cols < 200 ? 1 : 433) {
        const std::int64_t rows = cols < 70 ? 3 : 1;
        const std::int64_t stride = cols % 3 == 0 ? cols : cols % 3 == 1 ? cols + 5 : -cols - 3;
        Matrix x(dtype, rows, cols, stride ? stride : 1), dy(dtype, rows, cols, stride ? stride : 1);
        x.fill([&](std::int64_t, std::int64_t c) {
          return c % 2 ? special(std::int64_t(random.bits() % 14)) : 3 * random.normal();
        });
        dy.fill(
            [&](std::int64_t, std::int64_t c) { return c % 5 ? random.normal() : special(std::int64_t(random.bits() % 14)); });
        x.read_only();
        dy.read_only();
        for (const Mask act : every<Mask>())
          ASSERT_NO_FATAL_FAILURE(check(*k, act, x, dy, stride ? stride : 1, cols % 4 * 4))
              << name_of(dtype) << " cols " << cols;
      }
    }
  }
}

// All values of a 16-bit format are one row of 65,536; of binary32, a row of 2^16 for every upper half.
void check_row(DType dtype, std::uint32_t upper) {
  Matrix x(dtype, 1, 1 << 16), dy(dtype, 1, 1 << 16);
  for (std::uint32_t low = 0; low < 1 << 16; ++low) {
    const std::uint32_t bits = dtype == DType::f32 ? upper << 16 | low : low;
    std::memcpy(static_cast<char*>(x.row(0)) + low * std::size_t(size_of(dtype)), &bits, std::size_t(size_of(dtype)));
  }
  dy.fill([](std::int64_t, std::int64_t c) { return c % 7 == 6 ? special(c) : 1.5L; });
  for (const Kernels* k : backends()) {
    for (const Mask act : every<Mask>()) ASSERT_NO_FATAL_FAILURE(check(*k, act, x, dy, 0, 0)) << name_of(dtype);
  }
}
TEST(Mask, Every16BitValue) {
  check_row(DType::f16, 0);
  check_row(DType::bf16, 0);
}

// The plain definition in float, fast enough for all 2^32 values.
template <Mask act>
bool float_passes(float x) {
  if constexpr (act == Mask::relu) return !(x <= 0);
  if constexpr (act == Mask::leaky_relu || act == Mask::jax_relu) return x > 0;
  if constexpr (act == Mask::jax_leaky_relu) return x >= 0;
  if constexpr (act == Mask::jax_relu6) return x > 0 && x < 6;
  return !(x <= 0 || x >= 6);
}
// The value where the mask is 0.
template <Mask act>
float float_stopped(float x) {
  if constexpr (act == Mask::leaky_relu || act == Mask::jax_leaky_relu) return x * float(slope);
  if constexpr (act == Mask::jax_relu || act == Mask::jax_relu6) return x <= 0 ? 0 : x >= 6 ? 6 : x;
  return !(x < 0) ? (x >= 6 ? 6 : x) : 0;
}
template <Mask act>
void every_float(std::uint32_t first, std::uint32_t step) {
  std::vector<float> x(1 << 16), y(1 << 16);
  std::vector<std::uint8_t> packed(1 << 13);
  const ConstRows in{x.data(), DType::f32, 1, 1 << 16, 1 << 16};
  const Rows out{y.data(), DType::f32, 1, 1 << 16, 1 << 16};
  for (std::uint64_t upper = first; upper < 1 << 16; upper += step) {
    for (std::uint32_t low = 0; low < 1 << 16; ++low) {
      const std::uint32_t bits = std::uint32_t(upper) << 16 | low;
      std::memcpy(&x[low], &bits, 4);
    }
    for (const Kernels* k : backends()) {
      k->mask_forward({act, slope, false, in, out, {packed.data(), 1 << 13}}, {});
      std::uint32_t wrong = 0;
      for (std::uint32_t low = 0; low < 1 << 16; ++low) {
        const bool bit = packed[low / 8] >> (low % 8) & 1;
        const float expected = float_passes<act>(x[low]) ? x[low] : float_stopped<act>(x[low]);
        wrong += bit != float_passes<act>(x[low]);
        wrong += std::bit_cast<std::uint32_t>(y[low]) != std::bit_cast<std::uint32_t>(expected) &&
                 !(std::isnan(expected) && std::isnan(y[low]));
      }
      ASSERT_EQ(wrong, 0u) << k->name << " among the floats with upper half " << upper;
    }
  }
  // For bench/exhaustive.py.
  const std::uint64_t checked = (std::uint64_t{0xffff - first} / step + 1) << 16;
  for (const Kernels* k : backends())
    testing::Test::RecordProperty(k->name + std::string(" ") + name_of(act),
                                  "checked=" + std::to_string(checked) + " mismatches=0");
}
// A step of 1 visits all 2^32 floats.  61 visits 2^26 of them, and all exponents, both signs.
TEST(Mask, OneFloatIn61) {
  every_float<Mask::relu>(0, 61);
  every_float<Mask::leaky_relu>(17, 61);
  every_float<Mask::relu6>(23, 61);
  every_float<Mask::jax_relu>(29, 61);
  every_float<Mask::jax_leaky_relu>(37, 61);
  every_float<Mask::jax_relu6>(41, 61);
}
TEST(Mask, FloatsAtTheBoundaries) {
  for (const std::uint32_t upper : {0x0000, 0x8000, 0x40bf, 0x40c0, 0x7f7f, 0x7f80, 0x7fff, 0xff80, 0xffff, 0xff7f}) {
    ASSERT_NO_FATAL_FAILURE(check_row(DType::f32, upper));
  }
}
TEST(MaskExhaustive, EveryFloat) {
  if (!std::getenv("UNSWAG_EXHAUSTIVE")) GTEST_SKIP() << "2^32 values; make test-exhaustive";
  every_float<Mask::relu>(0, 1);
  every_float<Mask::leaky_relu>(0, 1);
  every_float<Mask::relu6>(0, 1);
  every_float<Mask::jax_relu>(0, 1);
  every_float<Mask::jax_leaky_relu>(0, 1);
  every_float<Mask::jax_relu6>(0, 1);
}

TEST(Mask, PackedBytesAreTheSameInEveryRow) {
  Matrix x(DType::f32, 5, 1000, 1003);
  x.fill_normal(3);
  std::vector<std::vector<char>> bytes;
  for (const Kernels* k : backends()) {
    PackedRows packed(5, 1000, 4);
    k->mask_forward({Mask::relu, 0, false, x, {}, packed}, {});
    bytes.emplace_back(packed.memory.data(), packed.memory.data() + packed.memory.size());
  }
  for (const auto& b : bytes) ASSERT_EQ(b, bytes[0]);
  // by hand: a byte holds eight elements, the first in its lowest bit
  const float y[] = {1, -1, 0, 2, -0.f, NAN, -3, 4, 5};
  std::uint8_t packed[4];
  for (const Kernels* k : backends()) {
    k->mask_forward({Mask::relu, 0, false, {y, DType::f32, 1, 9, 9}, {}, {packed, 4}}, {});
    ASSERT_EQ(packed[0], 0b10101001);
    ASSERT_EQ(packed[1], 1);
    ASSERT_EQ(packed[2] | packed[3], 0);
  }
}

#ifdef __SSE__
TEST(Mask, SubnormalsHaveTheSameMaskWhenTheyAreFlushed) {
  Matrix x(DType::f32, 1, 4096), y(DType::f32, 1, 4096);
  Random random(4);
  x.fill([&](std::int64_t, std::int64_t) { return random.normal() * 1e-40L; });
  for (const Kernels* k : backends()) {
    for (const Mask act : every<Mask>()) {
      PackedRows plain(1, 4096), flushed(1, 4096);
      k->mask_forward({act, slope, false, x, y, plain}, {});
      const unsigned before = _mm_getcsr();
      _mm_setcsr(before | 0x8040);  // FTZ, DAZ
      k->mask_forward({act, slope, false, x, y, flushed}, {});
      _mm_setcsr(before);
      ASSERT_EQ(0, std::memcmp(plain.row(0), flushed.row(0), 512)) << k->name;
    }
  }
}
#endif

// Flushed, a subnormal has the mask and the value of the zero of its sign; where the mask is 1, the value is the number itself.
// Half is computed in float, where its subnormals are normal.
TEST(Mask, FlushedSubnormalsAreZerosToJax) {
  for (const DType dtype : all_dtypes) {
    const long double least = std::ldexp(1.0L, format(dtype).min_exponent), step = ulp(dtype, 0);
    const long double edges[] = {step, 3 * step, least - step, least, least + step, 1, 5.98L, 6, std::nanl("")};
    Matrix x(dtype, 1, 64), y(dtype, 1, 64);
    x.fill([&](std::int64_t, std::int64_t c) { return (c < 32 ? 1 : -1) * edges[c % 9]; });
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (const Mask act : every<Mask>(is_of_jax)) {
        PackedRows packed(1, 64);
        k->mask_forward({act, slope, true, x, y, packed}, {});
        for (std::int64_t c = 0; c < 64; ++c) {
          const long double v = x.get(0, c);
          const bool zero = dtype != DType::f16 && std::fabs(v) < least;
          ASSERT_EQ(packed.bit(0, c), passes(act, zero ? 0 * v : v)) << k->name << " " << name_of(act) << " of " << v;
          ASSERT_PRED2(same, y.get(0, c), zero && passes(act, 0) ? v : value(dtype, act, zero ? 0 * v : v))
              << k->name << " " << name_of(act) << " of " << v;
        }
      }
    }
  }
}

TEST(Mask, MisalignedAndLargeEnoughToStream) {
  const std::int64_t n = (std::int64_t{16} << 20) + 77;  // bytes; streamed when the dtype is wider than a byte
  for (const Kernels* k : backends()) {
    for (const std::int64_t offset : {0, 1, 5}) {
      Memory x(std::size_t(2 * (n + offset))), y(std::size_t(2 * (n + offset)));
      auto* in = reinterpret_cast<std::uint16_t*>(x.data()) + offset;
      auto* out = reinterpret_cast<std::uint16_t*>(y.data()) + offset;
      for (std::int64_t i = 0; i < n; ++i) in[i] = std::uint16_t(i * 40503u >> 3);
      PackedRows packed(1, n);
      k->mask_forward({Mask::relu, 0, false, {in, DType::bf16, 1, n, n}, {out, DType::bf16, 1, n, n}, packed}, {});
      std::int64_t wrong = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const bool negative = in[i] > 0x8000 && in[i] <= 0xff80;
        wrong += out[i] != (negative ? 0 : in[i]);
        wrong += packed.bit(0, i) != (!negative && in[i] != 0 && in[i] != 0x8000);
      }
      ASSERT_EQ(wrong, 0) << k->name << " offset " << offset;
      std::memset(y.data(), 0, y.size());
      k->mask_backward({Mask::relu, 0, {in, DType::bf16, 1, n, n}, packed, {out, DType::bf16, 1, n, n}}, {});
      for (std::int64_t i = 0; i < n; ++i) wrong += out[i] != (packed.bit(0, i) ? in[i] : 0);
      ASSERT_EQ(wrong, 0) << k->name << " offset " << offset;
    }
  }
}

TEST(Mask, TheSameBitsForAnyNumberOfThreads) {
  Matrix x(DType::bf16, 3, 100003), y(DType::bf16, 3, 100003), again(DType::bf16, 3, 100003);
  x.fill_normal(5);
  for (const Kernels* k : backends()) {
    PackedRows packed(3, 100003), packed_again(3, 100003);
    k->mask_forward({Mask::leaky_relu, slope, false, x, y, packed}, {nullptr, 1});
    for (const int threads : {2, 3, 8}) {
      k->mask_forward({Mask::leaky_relu, slope, false, x, again, packed_again}, {nullptr, threads});
      ASSERT_EQ(y.bytes(), again.bytes());
      ASSERT_EQ(0, std::memcmp(packed.row(0), packed_again.row(0), packed.memory.size()));
    }
  }
}

// 2^31 + 64 elements in one row, then rows more than 2^31 bytes apart.  Untouched pages read as 0: the probes are not.
TEST(Mask, BeyondTwoToThe31) {
  const std::int64_t n = (std::int64_t{1} << 31) + 64;
  const std::int64_t probes[] = {0, 1, (std::int64_t{1} << 30) + 3, (std::int64_t{1} << 31) - 1, std::int64_t{1} << 31, n - 1};
  const Kernels& k = *backends().back();
  Memory dy(std::size_t(2 * n)), dx(std::size_t(2 * n)), packed(std::size_t(packed_row_bytes(n, 1)));
  auto* in = reinterpret_cast<std::uint16_t*>(dy.data());
  auto* out = reinterpret_cast<std::uint16_t*>(dx.data());
  for (const std::int64_t i : probes) in[i] = std::uint16_t(0x3f80 + i % 5);
  auto* bits = reinterpret_cast<std::uint8_t*>(packed.data());
  k.mask_forward({Mask::relu, 0, false, {in, DType::bf16, 1, n, n}, {}, {bits, std::int64_t(packed.size())}}, {});
  std::int64_t set = 0;
  for (std::size_t i = 0; i < packed.size(); ++i) set += __builtin_popcount(bits[i]);
  ASSERT_EQ(set, 6);
  for (const std::int64_t i : probes) ASSERT_TRUE(bits[i / 8] >> (i % 8) & 1) << i;

  const std::int64_t stride = (std::int64_t{1} << 31) / 2 + 1000;  // elements of 2 bytes
  k.mask_backward({Mask::relu,
                   0,
                   {in, DType::bf16, 2, 10, stride},
                   {bits, std::int64_t(packed.size()) / 2 / 4 * 4},
                   {out, DType::bf16, 2, 10, stride}},
                  {});
  ASSERT_EQ(out[0], in[0]);
  in[stride + 1] = 0x4040;
  bits[std::int64_t(packed.size()) / 2 / 4 * 4] = 2;
  k.mask_backward({Mask::relu,
                   0,
                   {in, DType::bf16, 2, 10, stride},
                   {bits, std::int64_t(packed.size()) / 2 / 4 * 4},
                   {out, DType::bf16, 2, 10, stride}},
                  {});
  ASSERT_EQ(out[stride + 1], 0x4040);
  ASSERT_EQ(out[stride], 0);
}

}  // namespace
}  // namespace unswag::test
