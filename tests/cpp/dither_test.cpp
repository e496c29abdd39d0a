// Subtractive dither: codes and factors by their formula, the mean over draws, and draws that depend on the position alone.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "matrix.hpp"
#include "packed.hpp"

namespace unswag::test {
namespace {

constexpr std::uint64_t seed = 0x123456789abcdef0, offset = ~std::uint64_t{0} - 2;  // the counter carries

double lowest(Activation act) {
  if (act == Activation::silu) return -0.09983932012886692;
  if (act == Activation::gelu) return -0.12890414518515479;
  EXPECT_EQ(act, Activation::gelu_tanh) << name_of(act);
  return -0.12899306865877177;
}
double step(Activation act, int bits) { return (1 - 2 * lowest(act)) / ((1 << bits) - 1); }

// (2 h + 1) / 2^17 of half draws.
std::vector<double> units(std::int64_t n) {
  std::vector<std::uint32_t> draw(std::size_t(n / 2 + 1));
  all_kernels().front()->philox_fill(draw.data(), n / 2 + 1, seed, offset, {});
  std::vector<double> v;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t word = draw[std::size_t(i / 2)], half = i % 2 ? word >> 16 : word & 0xffff;
    v.push_back((2 * half + 1) * 0x1p-17);
  }
  return v;
}

// In the type of the computation, each step rounded.
template <class S>
S factor(Activation act, int bits, unsigned code, double v) {
  const S product = S(step(act, bits)) * (S(code) + S(0.5) - S(v));
  return S(lowest(act)) + product;
}

TEST(Dither, CodesAndFactorsAreThoseOfTheFormulaWhateverTheStrides) {
  for (const DType dtype : all_dtypes) {
    const bool f64 = dtype == DType::f64;
    for (const Kernels* k : backends(f64)) {
      for (const std::int64_t cols : {1, 7, 32, 33, 1037}) {
        const std::int64_t rows = 3, stride = cols % 2 ? -cols - 3 : cols;
        const std::vector<double> v = units(rows * cols);
        for (const Activation act : every<Activation>(has_dither)) {
          for (const int bits : {1, 2, 3, 4}) {
            Matrix x(dtype, rows, cols, stride), dy(dtype, rows, cols, stride), y(dtype, rows, cols), value(dtype, rows, cols);
            x.fill_normal(3, 2), dy.fill_normal(4);
            if (cols > 30) x.set(0, 3, -2.3993573L), x.set(1, 4, 2.3993573L), x.set(2, 5, std::nanl(""));
            if (cols > 30) x.set(0, 20, (long double)INFINITY), x.set(1, 20, -(long double)INFINITY), x.set(2, 20, -0.0L);
            // The derivative, of f32 copies where x has 16 bits.
            const DType wide = f64 ? dtype : DType::f32;
            Matrix copy(wide, rows, cols), one(wide, rows, cols), slope(wide, rows, cols), dx(dtype, rows, cols, stride);
            copy.fill([&](std::int64_t r, std::int64_t c) { return x.get(r, c); });
            one.fill([](auto, auto) { return 1; });
            k->activation_backward({act, copy, one, slope}, {});
            k->activation_forward({act, x, value}, {});
            PackedRows packed(rows, packed_row_bytes(cols, bits), 3), alone(rows, packed_row_bytes(cols, bits));
            x.read_only(), dy.read_only();
            k->dither_forward({act, bits, seed, offset, x, y, packed}, {});
            k->dither_forward({act, bits, seed, offset, x, {}, alone}, {});
            packed.read_only();
            k->dither_backward({act, bits, seed, offset, dy, packed, dx}, {});
            ASSERT_EQ(y.bytes(), value.bytes());
            ASSERT_EQ(packed.bytes(), alone.bytes());
            const double slack = dtype == DType::bf16 ? 1e-3 : 1e-5;  // bf16 has shorter polynomials
            for (std::int64_t r = 0; r < rows; ++r) {
              for (std::int64_t c = 0; c < cols; ++c) {
                const double u = v[std::size_t(r * cols + c)];
                const unsigned code = packed.field(r, c * bits, bits);
                if (std::isnan(x.get(r, c))) {
                  ASSERT_EQ(code, 0u);
                } else {
                  const long double t = (slope.get(r, c) - lowest(act)) / step(act, bits) + u;
                  ASSERT_TRUE(code >= t - 1 - slack && code <= t + slack) << k->name << " " << x.get(r, c) << " " << t;
                }
                const long double f = f64 ? factor<double>(act, bits, code, u) : factor<float>(act, bits, code, u);
                ASSERT_EQ(dx.get(r, c), rounded(dtype, product(wide, dy.get(r, c), f))) << k->name << " " << r << ", " << c;
              }
              for (std::int64_t i = cols * bits; i < packed_row_bytes(cols, bits) * 8; ++i)
                ASSERT_EQ(packed.field(r, i, 1), 0u) << "tail bit " << i;
            }
            ASSERT_TRUE(dx.gaps_untouched() && packed.gaps_untouched());
          }
        }
      }
    }
  }
}

// The mean of n factors is within five standard deviations of step / sqrt(12 n) of f', their variance is step^2 / 12.
TEST(Dither, TheMeanOverDrawsIsTheDerivativeWhateverXIs) {
  const std::int64_t n = 1 << 14;
  const Kernels& k = *backends().back();
  for (const Activation act : every<Activation>(has_dither)) {
    for (const int bits : {1, 2, 3, 4}) {
      for (const double x0 : {-9.0, -2.3993573, -1.41421356, -1.0, -0.3, 0.0, 0.05, 0.7, 1.41421356, 2.4, 8.0}) {
        Matrix x(DType::f32, 1, n), one(DType::f32, 1, n), slope(DType::f32, 1, n), q(DType::f32, 1, n);
        x.fill([&](auto, auto) { return x0; });
        one.fill([](auto, auto) { return 1; });
        k.activation_backward({act, x, one, slope}, {});
        PackedRows packed(1, packed_row_bytes(n, bits));
        k.dither_forward({act, bits, seed, 5, x, {}, packed}, {});
        k.dither_backward({act, bits, seed, 5, one, packed, q}, {});
        long double sum = 0, squares = 0;
        for (std::int64_t i = 0; i < n; ++i) {
          const long double error = q.get(0, i) - slope.get(0, i);
          ASSERT_LE(std::fabs(error), step(act, bits) / 2 * (1 + 1e-5L));
          sum += error, squares += error * error;
        }
        const long double s = step(act, bits);
        EXPECT_LE(std::fabs(sum / n), 5 * s / std::sqrt(12.0L * n)) << "bits " << bits << " x " << x0;
        EXPECT_NEAR(double(squares / n / (s * s / 12)), 1, 0.04) << "bits " << bits << " x " << x0;
      }
    }
  }
}

TEST(Dither, DrawsDependOnThePositionAlone) {
  for (const Kernels* k : backends()) {
    Matrix x(DType::f32, 12, 32);
    x.fill_normal(1);
    const ConstRows all = x, long_rows{all.data, DType::f32, 3, 128, 128};
    PackedRows a(12, 8), b(3, 32);
    k->dither_forward({Activation::silu, 2, seed, offset, all, {}, a}, {});
    k->dither_forward({Activation::silu, 2, seed, offset, long_rows, {}, b}, {});
    ASSERT_EQ(a.bytes(), b.bytes()) << k->name;
  }
}

TEST(Dither, TheSameInEveryRowAndForAnyThreads) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 7, 20009), dy(dtype, 7, 20009), first(dtype, 7, 20009);
    x.fill_normal(5, 2), dy.fill_normal(6);
    PackedRows codes(7, packed_row_bytes(20009, 3));
    backends().front()->dither_forward({Activation::gelu, 3, seed, offset, x, {}, codes}, {nullptr, 1});
    backends().front()->dither_backward({Activation::gelu, 3, seed, offset, dy, codes, first}, {nullptr, 1});
    for (const Kernels* k : backends()) {
      PackedRows one(7, packed_row_bytes(20009, 3)), five(7, packed_row_bytes(20009, 3));
      k->dither_forward({Activation::gelu, 3, seed, offset, x, {}, one}, {nullptr, 1});
      k->dither_forward({Activation::gelu, 3, seed, offset, x, {}, five}, {nullptr, 5});
      ASSERT_EQ(one.bytes(), five.bytes()) << k->name;
      for (const int threads : {1, 5}) {
        Matrix dx(dtype, 7, 20009);
        k->dither_backward({Activation::gelu, 3, seed, offset, dy, codes, dx}, {nullptr, threads});
        ASSERT_EQ(dx.bytes(), first.bytes()) << k->name;
      }
    }
  }
}

}  // namespace
}  // namespace unswag::test
