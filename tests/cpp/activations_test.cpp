// Values and derivatives of the activations: all 16-bit values, floats, pairs of bf16, on every row that runs here.  The truth
// is computed in long double from the definitions.
#include "math/activations.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "matrix.hpp"
#include "truth.hpp"

namespace unswag::test {
namespace {

bool is_smooth(Activation act) { return act != Activation::relu && act != Activation::relu2; }
constexpr Real inf = std::numeric_limits<Real>::infinity();

// f'(x) of a kernel is its backward with dy = 1.
struct Both {
  Matrix value, slope;
  Both(const Kernels& k, Activation act, const Matrix& x)
      : value(x.dtype(), x.rows(), x.cols()), slope(x.dtype(), x.rows(), x.cols()) {
    Matrix one(x.dtype(), x.rows(), x.cols());
    one.fill([](std::int64_t, std::int64_t) { return 1; });
    k.activation_forward({act, x, value}, {});
    k.activation_backward({act, x, one, slope}, {});
  }
};

// The 65,536 values of a 16-bit format.
struct EveryValue : Matrix {
  explicit EveryValue(DType dtype) : Matrix(dtype, 1, 1 << 16) {
    for (std::uint32_t bits = 0; bits < 1 << 16; ++bits)
      std::memcpy(static_cast<char*>(row(0)) + std::ptrdiff_t{2} * bits, &bits, 2);
    read_only();
  }
};

TEST(Activations, Every16BitValueIsRightToOneUlp) {
  // Not correctly rounded among 65,536, value and slope: PyTorch 2.13 has 2 and 15 for silu in f16, and more elsewhere
  // (bench/results/rounding.json).
  for (const DType dtype : {DType::f16, DType::bf16}) {
    const EveryValue x(dtype);
    for (const Kernels* k : backends()) {
      for (const Activation act : every<Activation>()) {
        const Both got(*k, act, x);
        int value_off = 0, slope_off = 0;
        for (std::int64_t i = 0; i < 1 << 16; ++i) {
          const Real v = x.get(0, i);
          const Truth t = truth(act, v);
          const Real y = got.value.get(0, i), d = got.slope.get(0, i);
          if (std::isnan(v)) {
            ASSERT_TRUE(std::isnan(y)) << k->name;
            ASSERT_TRUE(act == Activation::relu ? d == 1 : std::isnan(d)) << k->name;
            continue;
          }
          if (std::isinf(rounded(dtype, t.value))) {
            ASSERT_EQ(y, rounded(dtype, t.value)) << k->name;
          } else {
            ASSERT_LE(std::fabs(y - t.value), ulp(dtype, t.value)) << k->name << " f(" << v << ")";
            value_off += y != rounded(dtype, t.value);
          }
          if (std::isinf(rounded(dtype, t.slope))) {
            ASSERT_EQ(d, rounded(dtype, t.slope)) << k->name;
            continue;
          }
          ASSERT_LE(std::fabs(d - t.slope), ulp(dtype, t.slope)) << k->name << " f'(" << v << ")";
          slope_off += d != rounded(dtype, t.slope);
        }
        const bool half = dtype == DType::f16, silu = act == Activation::silu;
        EXPECT_LE(value_off, half ? silu ? 2 : 5 : 1) << k->name << ' ' << name_of(act) << ' ' << name_of(dtype);
        EXPECT_LE(slope_off, half ? silu ? 15 : 5 : 1) << k->name << ' ' << name_of(act) << ' ' << name_of(dtype);
      }
    }
  }
}

// Right to 2 ulp, or to 2^-23 where the derivative is below 0.1.
void check_floats(std::uint32_t first, std::uint64_t step) {
  const std::int64_t n = 1 << 12;
  for (const Kernels* k : backends()) {
    for (const Activation act : every<Activation>(is_smooth)) {
      Matrix x(DType::f32, 1, n);
      for (std::uint64_t bits = first; bits < std::uint64_t{1} << 32;) {
        std::int64_t count = 0;
        for (; count < n; ++count, bits += step) {
          const std::uint32_t b = std::uint32_t(bits);
          std::memcpy(static_cast<char*>(x.row(0)) + 4 * count, &b, 4);
        }
        const Both got(*k, act, x);
        for (std::int64_t i = 0; i < n; ++i) {
          const Real v = x.get(0, i);
          const Truth t = truth(act, v);
          const Real y = got.value.get(0, i), d = got.slope.get(0, i);
          if (std::isnan(v) || std::isinf(v)) {
            ASSERT_TRUE(std::isnan(v) ? std::isnan(y) && std::isnan(d) : y == t.value && d == t.slope) << k->name << " " << v;
            continue;
          }
          const Real absolute = t.slope < 0.1L ? 0x1p-23L : 0;
          ASSERT_LE(std::fabs(y - t.value), std::max(2 * ulp(DType::f32, t.value), absolute))
              << k->name << ' ' << name_of(act) << " f(" << v << ")";
          ASSERT_LE(std::fabs(d - t.slope), std::max(2 * ulp(DType::f32, t.slope), absolute))
              << k->name << ' ' << name_of(act) << " f'(" << v << ")";
        }
      }
    }
  }
}
TEST(Activations, FloatsAreRightToTwoUlp) { check_floats(1, 16411); }
TEST(ActivationsExhaustive, EveryFloatIsRightToTwoUlp) {
  if (!std::getenv("UNSWAG_EXHAUSTIVE")) GTEST_SKIP() << "2^32 values; make test-exhaustive";
  check_floats(0, 1);
}

// dx for all (x, dy) of bf16: at most 1 ulp; the count of those not correctly rounded is recorded.
void check_pairs(std::uint32_t step) {
  const EveryValue dy(DType::bf16);
  Matrix x(DType::bf16, 1, 1 << 16), dx(DType::bf16, 1, 1 << 16);
  for (const Kernels* k : backends()) {
    for (const Activation act : {Activation::silu, Activation::gelu}) {
      std::int64_t off = 0, pairs = 0;
      double worst = 0.5;  // of those not correctly rounded, in ulp
      for (std::uint32_t bits = step / 2; bits < 1 << 16; bits += step) {
        for (std::int64_t i = 0; i < 1 << 16; ++i) std::memcpy(static_cast<char*>(x.row(0)) + 2 * i, &bits, 2);
        const double slope = double(truth(act, x.get(0, 0)).slope);
        k->activation_backward({act, x, dy, dx}, {});
        const auto* g = static_cast<const std::uint16_t*>(dy.row(0));
        const auto* got = static_cast<const std::uint16_t*>(dx.row(0));
        for (std::int64_t i = 0; i < 1 << 16; ++i) {
          const double d = math::to_float(bf16{g[i]}), r = math::to_float(bf16{got[i]}), t = slope * d;
          if (std::isinf(d) && std::fabs(slope) < 1e-76) continue;  // 0 inf or -inf, as the slope underflows or not
          if (std::isnan(t)) {
            ASSERT_TRUE(std::isnan(r)) << k->name << ' ' << x.get(0, 0) << ' ' << d;
            continue;
          }
          ++pairs;
          const double expected = math::to_float(math::from_float<bf16>(float(t)));  // float(t): exact enough to count by
          if (r == expected) continue;
          ++off;
          worst = std::max(worst, std::fabs(r - t) / double(ulp(DType::bf16, t)));
          ASSERT_LE(worst, 1) << k->name << ' ' << name_of(act) << " x " << x.get(0, 0) << " dy " << d;
        }
      }
      // For bench/exhaustive.py.
      testing::Test::RecordProperty(k->name + std::string(act == Activation::silu ? " silu backward" : " gelu backward"),
                                    "checked=" + std::to_string(pairs) + " not_correctly_rounded=" + std::to_string(off) +
                                        " worst_ulp=" + std::to_string(worst));
      EXPECT_LE(off, pairs / 10000);
    }
  }
}
TEST(Activations, PairsOfBf16AreRightToOneUlp) { check_pairs(257); }
TEST(ActivationsExhaustive, EveryPairOfBf16IsRightToOneUlp) {
  if (!std::getenv("UNSWAG_EXHAUSTIVE")) GTEST_SKIP() << "2^32 pairs; make test-exhaustive";
  check_pairs(1);
}

TEST(Activations, DoublesAreRightForGradcheck) {
  Matrix x(DType::f64, 3, 501, 511);
  x.fill([](std::int64_t r, std::int64_t c) { return (r - 1) * 0.5L + (c - 250) * 0.05L; });
  for (const Kernels* k : backends(true)) {
    for (const Activation act : every<Activation>()) {
      const Both got(*k, act, x);
      for (std::int64_t r = 0; r < 3; ++r) {
        for (std::int64_t c = 0; c < 501; ++c) {
          const Truth t = truth(act, x.get(r, c));
          ASSERT_NEAR(double(got.value.get(r, c)), double(t.value), std::max(4e-15L, ulp(DType::f64, t.value)))
              << name_of(act) << ' ' << x.get(r, c);
          ASSERT_NEAR(double(got.slope.get(r, c)), double(t.slope), 1e-15) << name_of(act) << ' ' << x.get(r, c);
        }
      }
    }
  }
}

TEST(Activations, SpecialValues) {
  for (const DType dtype : all_dtypes) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (const Activation act : every<Activation>()) {
        Matrix x(dtype, 1, 5);
        const Real values[] = {inf, -inf, std::nanl(""), 0.0L, -0.0L};
        x.fill([&](std::int64_t, std::int64_t c) { return values[c]; });
        const Both got(*k, act, x);
        EXPECT_EQ(got.value.get(0, 0), inf) << k->name << ' ' << name_of(act) << ' ' << name_of(dtype);
        EXPECT_EQ(got.value.get(0, 1), 0);
        EXPECT_TRUE(std::isnan(got.value.get(0, 2)));
        EXPECT_TRUE(got.value.get(0, 3) == 0 && !std::signbit(got.value.get(0, 3)));
        const bool square = act == Activation::relu2;
        EXPECT_TRUE(got.value.get(0, 4) == 0 && std::signbit(got.value.get(0, 4)) != square)
            << k->name << ' ' << name_of(act) << ' ' << name_of(dtype);
        EXPECT_EQ(got.slope.get(0, 0), square ? inf : 1);
        EXPECT_EQ(got.slope.get(0, 1), 0);
        EXPECT_EQ(got.slope.get(0, 4), square || act == Activation::relu ? 0 : 0.5L);
      }
    }
  }
}

// relu2 of every 16-bit number, and of floats: one rounding each, and the bits of relu2(relu(x)), so that relu(x) may be kept.
// On the left the gradient is selected: 0 whatever dy is.
TEST(Activations, Relu2IsRoundedOnceAndThatOfRelu) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 1, 1 << 16), dy(dtype, 1, 1 << 16);
    x.fill([](std::int64_t, std::int64_t c) { return (c - 32000) * 0.001L; });
    if (dtype != DType::f32)
      for (std::int64_t i = 0; i < 1 << 16; ++i) std::memcpy(static_cast<char*>(x.row(0)) + 2 * i, &i, 2);
    dy.fill_normal(4);
    for (std::int64_t i = 0; i < 1 << 16; i += 7) dy.set(0, i, i % 2 ? inf : std::nanl(""));
    Matrix kept(dtype, 1, 1 << 16), y(dtype, 1, 1 << 16), dx(dtype, 1, 1 << 16), y2(dtype, 1, 1 << 16), dx2(dtype, 1, 1 << 16);
    for (const Kernels* k : backends()) {
      k->activation_forward({Activation::relu, x, kept}, {});
      k->activation_forward({Activation::relu2, x, y}, {});
      k->activation_backward({Activation::relu2, x, dy, dx}, {});
      k->activation_forward({Activation::relu2, kept, y2}, {});
      k->activation_backward({Activation::relu2, kept, dy, dx2}, {});
      EXPECT_EQ(y.bytes(), y2.bytes()) << k->name << ' ' << name_of(dtype);
      EXPECT_EQ(dx.bytes(), dx2.bytes()) << k->name << ' ' << name_of(dtype);
      for (std::int64_t i = 0; i < 1 << 16; ++i) {
        const Real v = x.get(0, i), d = dy.get(0, i), got = dx.get(0, i);
        if (v <= 0) {
          ASSERT_TRUE(got == 0 && !std::signbit(got) && y.get(0, i) == 0 && !std::signbit(y.get(0, i))) << k->name << ' ' << v;
        } else if (std::isnan(v) || std::isnan(d)) {
          ASSERT_TRUE(std::isnan(got) && std::isnan(y.get(0, i)) == std::isnan(v)) << k->name << ' ' << v;
        } else {  // by way of float, as PyTorch: a subnormal 16-bit result may be rounded twice
          ASSERT_EQ(y.get(0, i), rounded(dtype, rounded(DType::f32, v * v))) << k->name << ' ' << v;
          ASSERT_EQ(got, rounded(dtype, rounded(DType::f32, rounded(DType::f32, 2 * v) * d)))
              << k->name << ' ' << v << ' ' << d;
        }
      }
    }
  }
}

// A loop's tail gives the same bits as its body, whatever the length, the alignment and the number of threads.
TEST(Activations, TailsHaveTheBitsOfTheBody) {
  const std::int64_t n = 4097;
  for (const DType dtype : all_dtypes) {
    Matrix x(dtype, 1, n), dy(dtype, 1, n);
    x.fill_normal(7, 3);
    for (std::int64_t i = 5; i < n; i += 29) x.set(0, i, x.get(0, i) * 16);  // lanes beyond Act::plain among others
    dy.fill_normal(8);
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (const Activation act : every<Activation>()) {
        Matrix y(dtype, 1, n), dx(dtype, 1, n);
        k->activation_forward({act, x, y}, {});
        k->activation_backward({act, x, dy, dx}, {});
        for (std::int64_t cols = 0; cols <= n; cols += cols < 70 ? 1 : 671) {
          for (const std::int64_t skip : {0, 1, 7}) {
            if (cols + skip > n) continue;
            const auto part = [&](const Matrix& m) {
              ConstRows rows = m;
              return ConstRows{static_cast<const char*>(rows.data) + skip * size_of(dtype), dtype, 1, cols, cols};
            };
            Matrix y_part(dtype, 1, cols), dx_part(dtype, 1, cols);
            k->activation_forward({act, part(x), y_part}, {});
            k->activation_backward({act, part(x), part(dy), dx_part}, {});
            const std::size_t bytes = std::size_t(cols * size_of(dtype));
            ASSERT_EQ(0, std::memcmp(y_part.row(0), static_cast<char*>(y.row(0)) + skip * size_of(dtype), bytes))
                << k->name << ' ' << cols;
            ASSERT_EQ(0, std::memcmp(dx_part.row(0), static_cast<char*>(dx.row(0)) + skip * size_of(dtype), bytes))
                << k->name << ' ' << cols;
          }
        }
      }
    }
  }
}

TEST(Activations, StreamedThreadedAndStridedHaveTheSameBits) {
  const std::int64_t rows = 3, cols = (std::int64_t{3} << 20) + 5;  // above 16 MiB: streamed
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Matrix x(dtype, rows, cols, cols + 3);
    x.fill([](std::int64_t r, std::int64_t c) {  // some beyond Act::plain
      return c % 9973 == 5 ? Real(c % 3 - 1) * 60 : Real((c * 7919 + r) % 20001 - 10000) / 1000;
    });
    x.read_only();
    for (const Kernels* k : backends()) {
      Matrix y(dtype, rows, cols, cols + 1), one(dtype, 1, cols);
      k->activation_forward({Activation::silu, x, y}, {nullptr, 2});
      EXPECT_TRUE(y.gaps_untouched());
      for (std::int64_t r = 0; r < rows; ++r) {
        const ConstRows row{x.row(r), dtype, 1, cols, cols};
        k->activation_forward({Activation::silu, row, one}, {nullptr, 1});  // stored
        ASSERT_EQ(0, std::memcmp(one.row(0), y.row(r), std::size_t(size_of(dtype) * cols))) << k->name << " row " << r;
      }
    }
  }
}

}  // namespace
}  // namespace unswag::test
