// Gated units against the definition in long double: forward, both gradients, the product again; shapes, strides, threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "matrix.hpp"
#include "truth.hpp"

namespace unswag::test {
namespace {

struct Case {
  Matrix gate, up, dh, dgate, dup, h;
  Case(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t stride = 0)
      : gate(dtype, rows, cols, stride),
        up(dtype, rows, cols),
        dh(dtype, rows, cols, stride),
        dgate(dtype, rows, cols),
        dup(dtype, rows, cols, stride),
        h(dtype, rows, cols) {
    gate.fill_normal(1, 2);
    up.fill_normal(2);
    dh.fill_normal(3);
  }
};

// Large outputs go past the cache, in blocks that end wherever a gate is not plain: the bits of small ones, and no byte too
// many.
TEST(Gated, LargeOutputsAreThoseOfSmallOnes) {
  const std::int64_t tile = 4096, tiles = 2053, n = tiles * tile - 11;  // above 16 MiB; sixteen and five after the last 100
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const auto repeated = [&](const Matrix& from, Matrix& to) {
      const std::int64_t bytes = tile * size_of(dtype), all = n * size_of(dtype);
      for (std::int64_t at = 0; at < all; at += bytes)
        std::memcpy(static_cast<char*>(to.row(0)) + at, from.row(0), std::size_t(std::min(bytes, all - at)));
    };
    Case small(dtype, 1, tile);
    for (std::int64_t i = 0; i < tile; i += 16 * (1 + i / 16 % 7)) small.gate.set(0, i, i % 32 ? 100 : -100);
    Matrix gate(dtype, 1, n), up(dtype, 1, n), dh(dtype, 1, n), dgate(dtype, 1, n), dup(dtype, 1, n), h(dtype, 1, n);
    repeated(small.gate, gate);
    repeated(small.up, up);
    repeated(small.dh, dh);
    Matrix expected(dtype, 1, n);
    for (const Kernels* k : backends()) {
      k->gated_backward({Activation::silu, small.gate, small.up, small.dh, small.dgate, small.dup, small.h}, {});
      k->gated_backward({Activation::silu, gate, up, dh, dgate, dup, h}, {});
      for (const auto& [large, wanted] : {std::pair{&dgate, &small.dgate}, {&dup, &small.dup}, {&h, &small.h}}) {
        repeated(*wanted, expected);
        EXPECT_EQ(0, std::memcmp(large->row(0), expected.row(0), std::size_t(n * size_of(dtype)))) << k->name;
      }
    }
  }
}

TEST(Gated, EveryActivationDtypeAndShape) {
  for (const DType dtype : all_dtypes) {
    for (const Kernels* k : backends(dtype == DType::f64)) {
      for (const Activation act : every<Activation>()) {
        for (const std::int64_t cols : {0, 1, 15, 16, 17, 33, 1536}) {
          const std::int64_t rows = cols > 100 ? 2 : 3;
          Case c(dtype, rows, cols, cols % 2 ? cols + 3 : -cols - 1);
          c.gate.read_only();
          c.up.read_only();
          c.dh.read_only();
          Matrix product(dtype, rows, cols), dgate(dtype, rows, cols), dup(dtype, rows, cols);
          k->gated_forward({act, c.gate, c.up, product}, {});
          k->gated_backward({act, c.gate, c.up, c.dh, c.dgate, c.dup, c.h}, {});
          k->gated_backward({act, c.gate, c.up, c.dh, dgate, dup, {}}, {});
          ASSERT_TRUE(c.dup.gaps_untouched());
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t i = 0; i < cols; ++i) {
              const Real g = c.gate.get(r, i), u = c.up.get(r, i), d = c.dh.get(r, i);
              const Truth t = truth(act, g);
              // half a unit of the dtype for the rounding, and 2^-21 for the arithmetic: f and f' are right to 2 ulp, or to
              // 2^-23 where f' is below 0.1
              const Real scale = std::max(std::fabs(t.value), Real(0.25));
              const auto near = [&](Real got, Real want, Real factor) {
                const Real arithmetic = dtype == DType::f64 ? 1e-11L : 0x1p-21L;
                return std::fabs(got - want) <= ulp(dtype, want) / 2 + arithmetic * std::fabs(factor);
              };
              ASSERT_TRUE(near(product.get(r, i), t.value * u, scale * u)) << k->name << " h of " << g << ", " << u;
              ASSERT_TRUE(near(c.dup.get(r, i), d * t.value, d * scale))
                  << k->name << " dup of " << g << ", " << d << ": " << c.dup.get(r, i);
              ASSERT_TRUE(near(c.dgate.get(r, i), d * u * t.slope, d * u * std::max(Real(1), t.slope)))
                  << k->name << " dgate of " << g;
              ASSERT_EQ(product.get(r, i), c.h.get(r, i));
              ASSERT_EQ(dgate.get(r, i), c.dgate.get(r, i));
              ASSERT_EQ(dup.get(r, i), c.dup.get(r, i));
            }
          }
        }
      }
    }
  }
}

TEST(Gated, RegluSelectsAndNeverMultiplies) {
  const float gate[] = {-1, -1, 0, 2}, up[] = {INFINITY, NAN, INFINITY, 3}, dh[] = {1, 1, NAN, 5};
  float dgate[4], dup[4];
  const auto in = [](const float* p) { return ConstRows{p, DType::f32, 1, 4, 4}; };
  const auto out = [](float* p) { return Rows{p, DType::f32, 1, 4, 4}; };
  for (const Kernels* k : backends()) {
    k->gated_backward({Activation::relu, in(gate), in(up), in(dh), out(dgate), out(dup), {}}, {});
    EXPECT_EQ(dgate[0], 0);
    EXPECT_EQ(dgate[1], 0);
    EXPECT_EQ(dgate[2], 0);
    EXPECT_EQ(dgate[3], 15);
    EXPECT_EQ(dup[3], 10);
  }
}

// reglu of all numbers of a 16-bit format: the product of two is exact in float, so this is one rounding, ties included.
TEST(Gated, ProductsOf16BitNumbersAreRoundedToNearestEven) {
  const std::int64_t n = 1 << 16;
  for (const DType dtype : {DType::f16, DType::bf16}) {
    Matrix gate(dtype, 1, n), up(dtype, 1, n), h(dtype, 1, n);
    for (std::int64_t i = 0; i < n; ++i) std::memcpy(static_cast<char*>(up.row(0)) + 2 * i, &i, 2);
    for (const Real factor : {1.0L, 1.5L, 1.25L, 1.0078125L, 3.0L, 0.0078125L, 0x1p-13L, 120.0L}) {
      gate.fill([&](std::int64_t, std::int64_t) { return factor; });
      for (const Kernels* k : backends()) {
        k->gated_forward({Activation::relu, gate, up, h}, {});
        for (std::int64_t i = 0; i < n; ++i) {
          const Real u = up.get(0, i), want = rounded(dtype, u * factor), got = h.get(0, i);
          ASSERT_TRUE(std::isnan(u) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(u))
              << k->name << ' ' << name_of(dtype) << ": " << u << " times " << factor << " gives " << got;
        }
      }
    }
  }
}

// One subnormal result in each place of a step: instructions that convert to bf16 take it for 0.
TEST(Gated, ASubnormalAmongNormalNumbersIsKept) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    Matrix one(dtype, 1, 96), h(dtype, 1, 96), dgate(dtype, 1, 96), dup(dtype, 1, 96);
    one.fill([](std::int64_t, std::int64_t) { return 1; });
    for (std::int64_t place = 0; place < 96; ++place) {
      Matrix x(dtype, 1, 96);
      x.fill([&](std::int64_t, std::int64_t c) { return c == place ? 3 * ulp(dtype, 0) : Real(c); });
      for (const Kernels* k : backends()) {
        k->gated_forward({Activation::relu, one, x, h}, {});
        k->gated_backward({Activation::relu, one, one, x, dgate, dup, {}}, {});
        for (const Matrix* got : {&h, &dgate, &dup}) ASSERT_EQ(got->bytes(), x.bytes()) << k->name << ' ' << place;
      }
    }
  }
}

TEST(Gated, TheSameBitsForAnyNumberOfThreadsAndAnyCut) {
  for (const DType dtype : float_dtypes) {
    const std::int64_t rows = 5, cols = 70001;
    Case c(dtype, rows, cols);
    for (const Kernels* k : backends()) {
      k->gated_backward({Activation::silu, c.gate, c.up, c.dh, c.dgate, c.dup, c.h}, {nullptr, 1});
      for (const int threads : {2, 5}) {
        Matrix dgate(dtype, rows, cols), dup(dtype, rows, cols), h(dtype, rows, cols);
        k->gated_backward({Activation::silu, c.gate, c.up, c.dh, dgate, dup, h}, {nullptr, threads});
        ASSERT_EQ(c.dgate.bytes(), dgate.bytes()) << k->name;
        ASSERT_EQ(c.dup.bytes(), dup.bytes());
        ASSERT_EQ(c.h.bytes(), h.bytes());
      }
      const auto part = [&](const Matrix& m, std::int64_t skip, std::int64_t n) {
        return ConstRows{static_cast<const char*>(m.row(0)) + skip * size_of(dtype), dtype, 1, n, n};
      };
      for (const std::int64_t n : {1, 17, 100, 4097}) {
        Matrix h(dtype, 1, n);
        k->gated_forward({Activation::silu, part(c.gate, 3, n), part(c.up, 3, n), h}, {});
        ASSERT_EQ(0, std::memcmp(h.row(0), static_cast<const char*>(c.h.row(0)) + 3 * size_of(dtype),
                                 std::size_t(n * size_of(dtype))));
      }
    }
  }
}

}  // namespace
}  // namespace unswag::test
