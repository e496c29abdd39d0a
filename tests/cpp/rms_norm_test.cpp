#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#include "matrix.hpp"

namespace {

using namespace unswag;
using test::Matrix;

constexpr std::int64_t some_cols[] = {1, 2, 15, 16, 17, 31, 33, 64, 67, 576, 2053};

struct Case {
  DType x, y, weight;  // y: also that of dy
  bool has_weight, cast;
  double offset;

  bool has_f64() const { return x == DType::f64 || y == DType::f64 || (has_weight && weight == DType::f64); }
  // What the kernel computes in, and the dtype of rstd and dw.
  DType compute() const { return x == DType::f64 || y == DType::f64 ? DType::f64 : DType::f32; }
  DType sums() const { return x == DType::f64 ? DType::f64 : DType::f32; }
};
std::string text(const Kernels* k, const Case& c, std::int64_t rows, std::int64_t cols) {
  return std::string(k->name) + " x " + test::name_of(c.x) + " y " + test::name_of(c.y) + " weight " +
         (c.has_weight ? test::name_of(c.weight) : "none") + (c.cast ? " cast" : "") + " offset " + std::to_string(c.offset) +
         " " + std::to_string(rows) + " x " + std::to_string(cols);
}

// Every x, y and weight dtype.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType x : test::all_dtypes)
    for (DType y : test::all_dtypes) {
      for (bool cast : {true, false}) {
        all.push_back({x, y, x, false, cast, 0.0});
        for (DType weight : test::all_dtypes)
          for (double offset : {0.0, 1.0}) all.push_back({x, y, weight, true, cast, offset});
      }
    }
  return all;
}

// w' in the precision of the computation.
long double effective_weight(const Case& c, const Matrix& weight, std::int64_t col) {
  return c.has_weight ? test::rounded(c.compute(), c.offset + test::rounded(c.compute(), weight.get(0, col))) : 1.0L;
}
// x rstd as the forward rounds it: once to the computation's precision and, with cast, once to x's dtype.
long double xhat(const Case& c, long double x, long double rstd) {
  const long double v = test::product(c.compute(), x, rstd);
  return c.cast ? test::rounded(c.x, v) : v;
}

struct Norm {
  Case c;
  Matrix x, weight, y, rstd;
  Norm(const Case& c, std::int64_t rows, std::int64_t cols, std::int64_t x_gap = 0, std::int64_t y_gap = 0)
      : c(c),
        x(c.x, rows, cols, cols + x_gap),
        weight(c.weight, 1, cols),
        y(c.y, rows, cols, cols + y_gap),
        rstd(c.sums(), 1, rows) {
    x.fill_normal(std::uint64_t(rows * 131 + cols));
    weight.fill_normal(std::uint64_t(cols + 7));
    x.read_only();
    weight.read_only();
  }
  RmsNormForward args(bool rstd_given = false) {
    RmsNormForward a;
    a.x = x;
    if (c.has_weight) a.weight = static_cast<const Matrix&>(weight).vector();
    a.weight_offset = c.offset;
    a.cast_before_weight = c.cast;
    a.rstd_given = rstd_given;
    a.eps = 1e-5;
    a.y = y;
    a.rstd = rstd.vector();
    return a;
  }
};

TEST(RmsNormForward, RstdIsRightAndYIsTheRecipeBitForBit) {
  for (const Case& c : cases())
    for (const Kernels* k : test::backends(c.has_f64()))
      for (std::int64_t cols : some_cols) {
        SCOPED_TRACE(text(k, c, 3, cols));
        Norm n(c, 3, cols, cols % 3, cols % 2 ? 0 : -2 * cols - 5);
        k->rms_norm_forward(n.args(), {});
        for (std::int64_t r = 0; r < 3; ++r) {
          long double squares = 0;
          for (std::int64_t i = 0; i < cols; ++i) squares += n.x.get(r, i) * n.x.get(r, i);
          const long double truth = 1 / std::sqrt(squares / cols + 1e-5L), got = n.rstd.get(0, r);
          ASSERT_LE(std::fabs(got - truth),
                    0.5L * test::ulp(n.rstd.dtype(), truth) + 0.75L * test::ulp(c.compute(), 1.0L) * truth)
              << got << " " << truth;
          for (std::int64_t i = 0; i < cols; ++i) {
            const long double h = xhat(c, n.x.get(r, i), got);
            ASSERT_EQ(n.y.get(r, i), test::rounded(c.y, test::product(c.compute(), h, effective_weight(c, n.weight, i))))
                << "row " << r << " col " << i;
          }
        }
        ASSERT_TRUE(n.y.gaps_untouched());
        // y again from x: rstd is only read.
        const std::vector<char> first = n.y.bytes();
        n.y.fill([](auto, auto) { return 0.0L; });
        n.rstd.read_only();
        k->rms_norm_forward(n.args(true), {});
        ASSERT_EQ(n.y.bytes(), first);
      }
}

TEST(RmsNormForward, SumOfSquaresIsAccurateInLongRows) {
  constexpr std::int64_t cols = 1 << 20;
  for (const Kernels* k : test::backends()) {
    Norm n({DType::f32, DType::f32, DType::f32, false, true, 0}, 1, cols);
    long double squares = 0;
    for (std::int64_t i = 0; i < cols; ++i) squares += n.x.get(0, i) * n.x.get(0, i);
    k->rms_norm_forward(n.args(), {});
    const long double truth = 1 / std::sqrt(squares / cols + 1e-5L);
    EXPECT_LE(std::fabs(n.rstd.get(0, 0) - truth), 0.51L * test::ulp(DType::f32, truth)) << k->name;
  }
}

TEST(RmsNormForward, NothingToDo) {
  for (const Kernels* k : test::backends()) {
    Norm none({DType::f32, DType::bf16, DType::f32, true, true, 0}, 0, 16),
        empty({DType::f32, DType::bf16, DType::f32, true, true, 0}, 3, 0);
    k->rms_norm_forward(none.args(), {});
    k->rms_norm_forward(empty.args(), {});
    for (std::int64_t r = 0; r < 3; ++r) EXPECT_TRUE(std::isnan(empty.rstd.get(0, r))) << k->name;  // the mean of nothing
  }
}

TEST(RmsNormForward, NanAndInfStayInTheirRow) {
  const long double inf = std::numeric_limits<long double>::infinity(), nan = std::numeric_limits<long double>::quiet_NaN();
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      Matrix x(dtype, 4, 37), y(dtype, 4, 37), rstd(DType::f32, 1, 4);
      x.fill_normal(1);
      x.set(1, 36, nan);
      x.set(2, 3, inf);
      RmsNormForward a;
      a.x = x, a.y = y, a.rstd = rstd.vector();
      k->rms_norm_forward(a, {});
      for (std::int64_t i = 0; i < 37; ++i) {
        EXPECT_TRUE(std::isfinite(y.get(0, i)) && std::isfinite(y.get(3, i))) << k->name;
        EXPECT_TRUE(std::isnan(y.get(1, i))) << k->name;
        EXPECT_EQ(std::isnan(y.get(2, i)), i == 3) << k->name;  // inf * 0; finite * 0 = 0
      }
      EXPECT_EQ(rstd.get(0, 2), 0) << k->name;
    }
}

TEST(RmsNormForward, ThreadsDoNotChangeTheBits) {
  for (const Kernels* k : test::backends()) {
    Norm one({DType::bf16, DType::bf16, DType::f32, true, true, 0}, 517, 203), three(one.c, 517, 203);
    k->rms_norm_forward(one.args(), {nullptr, 1});
    k->rms_norm_forward(three.args(), {nullptr, 3});
    EXPECT_EQ(one.y.bytes(), three.y.bytes()) << k->name;
    EXPECT_EQ(one.rstd.bytes(), three.rstd.bytes()) << k->name;
  }
}

struct Backward {
  Case c;
  Matrix x, weight, dy, rstd, dx, dw;
  Backward(const Case& c, std::int64_t rows, std::int64_t cols, std::int64_t x_gap = 0, std::int64_t dy_gap = 0)
      : c(c),
        x(c.x, rows, cols, cols + x_gap),
        weight(c.weight, 1, cols),
        dy(c.y, rows, cols, cols + dy_gap),
        rstd(c.sums(), 1, rows),
        dx(c.x, rows, cols, cols + dy_gap),
        dw(c.sums(), 1, cols) {
    x.fill_normal(std::uint64_t(rows * 17 + cols));
    dy.fill_normal(std::uint64_t(rows * 19 + cols));
    weight.fill_normal(std::uint64_t(cols + 5));
    for (std::int64_t r = 0; r < rows; ++r) {
      long double squares = 0;
      for (std::int64_t i = 0; i < cols; ++i) squares += x.get(r, i) * x.get(r, i);
      rstd.set(0, r, cols ? 1 / std::sqrt(squares / cols + 1e-6L) : 1);
    }
    x.read_only(), dy.read_only(), weight.read_only(), rstd.read_only();
  }
  RmsNormBackward args(bool want_dx = true, bool want_dw = true) {
    RmsNormBackward a;
    a.x = x, a.dy = dy;
    if (c.has_weight) a.weight = static_cast<const Matrix&>(weight).vector();
    a.rstd = static_cast<const Matrix&>(rstd).vector();
    a.weight_offset = c.offset;
    a.cast_before_weight = c.cast;
    if (want_dx) a.dx = dx;
    if (want_dw) a.dw = dw.vector();
    return a;
  }
  // dx = rstd (g - xhat mean(g xhat)), g = w' dy, and the size of its terms, which rounding errors are relative to.
  void expect_dx() {
    const long double unit = test::ulp(c.compute(), 1.0L);
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      const long double s = rstd.get(0, r);
      long double sum = 0, size = 0;
      for (std::int64_t i = 0; i < x.cols(); ++i) {
        const long double term = effective_weight(c, weight, i) * dy.get(r, i) * x.get(r, i) * s;
        sum += term, size += std::fabs(term);
      }
      for (std::int64_t i = 0; i < x.cols(); ++i) {
        const long double h = x.get(r, i) * s, g = effective_weight(c, weight, i) * dy.get(r, i), mean = sum / x.cols();
        const long double truth = s * (g - h * mean);
        const long double slack = 2 * unit * s * (std::fabs(g) + std::fabs(h) * size / x.cols());
        ASSERT_LE(std::fabs(dx.get(r, i) - truth), 0.5L * test::ulp(c.x, truth) + slack) << "row " << r << " col " << i;
      }
    }
  }
  void expect_dw() {
    const long double unit = test::ulp(c.compute(), 1.0L);
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      long double truth = 0, size = 0;
      for (std::int64_t r = 0; r < x.rows(); ++r) {
        const long double term = dy.get(r, i) * xhat(c, x.get(r, i), rstd.get(0, r));
        truth += term, size += std::fabs(term);
      }
      ASSERT_LE(std::fabs(dw.get(0, i) - truth), 0.5L * test::ulp(dw.dtype(), truth) + unit * size) << "col " << i;
    }
  }
};

TEST(RmsNormBackward, DxAndDwAreRight) {
  for (const Case& c : cases())
    for (const Kernels* k : test::backends(c.has_f64()))
      for (std::int64_t cols : {1, 15, 16, 17, 67}) {
        const std::int64_t rows = cols == 17 ? 71 : 5;
        SCOPED_TRACE(text(k, c, rows, cols));
        Backward b(c, rows, cols, cols % 4, cols % 2 ? 0 : -2 * cols - 3);
        k->rms_norm_backward(b.args(), {});
        b.expect_dx();
        b.expect_dw();
        ASSERT_TRUE(b.dx.gaps_untouched());
        // Either alone gives the same bits, and leaves the other's memory as it was.
        Backward only_dx(c, rows, cols, cols % 4, cols % 2 ? 0 : -2 * cols - 3),
            only_dw(c, rows, cols, cols % 4, cols % 2 ? 0 : -2 * cols - 3);
        const std::vector<char> dx_before = only_dw.dx.bytes(), dw_before = only_dx.dw.bytes();
        k->rms_norm_backward(only_dx.args(true, false), {});
        k->rms_norm_backward(only_dw.args(false, true), {});
        ASSERT_EQ(only_dx.dx.bytes(), b.dx.bytes());
        ASSERT_EQ(only_dw.dw.bytes(), b.dw.bytes());
        ASSERT_EQ(only_dx.dw.bytes(), dw_before);
        ASSERT_EQ(only_dw.dx.bytes(), dx_before);
      }
}

TEST(RmsNormBackward, DwOverManyRowsIsAccurateAndDoesNotDependOnThreads) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (const Kernels* k : test::backends())
      for (std::int64_t rows : {1, 3, 4, 63, 64, 65, 1021, 4999}) {
        SCOPED_TRACE(std::string(k->name) + " rows " + std::to_string(rows));
        const Case c{dtype, dtype, DType::f32, true, true, 0};
        Backward one(c, rows, 19), three(c, rows, 19);
        k->rms_norm_backward(one.args(), {nullptr, 1});
        k->rms_norm_backward(three.args(), {nullptr, 3});
        EXPECT_EQ(one.dw.bytes(), three.dw.bytes());
        EXPECT_EQ(one.dx.bytes(), three.dx.bytes());
        one.expect_dx();
        one.expect_dw();
        // Much better than adding row after row: what is left is the rounding of dw itself and of single products.
        for (std::int64_t i = 0; i < 19; ++i) {
          long double truth = 0, squares = 0;
          for (std::int64_t r = 0; r < rows; ++r) {
            const long double term = one.dy.get(r, i) * xhat(c, one.x.get(r, i), one.rstd.get(0, r));
            truth += term, squares += term * term;
          }
          const long double unit = test::ulp(DType::f32, 1.0L);
          EXPECT_LE(std::fabs(one.dw.get(0, i) - truth), 0.5L * test::ulp(DType::f32, truth) + 4 * unit * std::sqrt(squares));
        }
      }
}

// In double, where nothing is rounded away afterwards.
TEST(RmsNormBackward, ThreadsDoNotChangeTheBitsOfDoubles) {
  for (const Kernels* k : test::backends(true)) {
    const Case c{DType::f64, DType::f64, DType::f64, true, true, 0};
    Backward one(c, 1021, 19), three(c, 1021, 19);
    k->rms_norm_backward(one.args(), {nullptr, 1});
    k->rms_norm_backward(three.args(), {nullptr, 3});
    EXPECT_EQ(one.dw.bytes(), three.dw.bytes());
    EXPECT_EQ(one.dx.bytes(), three.dx.bytes());
  }
}

TEST(RmsNormBackward, NoRowsGiveZeroDw) {
  for (const Kernels* k : test::backends()) {
    Backward none({DType::f32, DType::f32, DType::f32, true, true, 0}, 0, 21),
        empty({DType::f32, DType::f32, DType::f32, true, true, 0}, 2, 0);
    k->rms_norm_backward(none.args(), {});
    k->rms_norm_backward(empty.args(), {});
    for (std::int64_t i = 0; i < 21; ++i) EXPECT_EQ(none.dw.get(0, i), 0) << k->name;
  }
}

// More than 16 MiB go past the cache, where rows begin on cache lines.
TEST(RmsNorm, WritingPastTheCacheChangesNoBits) {
  constexpr std::int64_t cols = 1056;
  for (DType dtype : {DType::f32, DType::bf16}) {
    const std::int64_t rows = (std::int64_t{1} << 24) / (cols * test::size_of(dtype)) + 3;
    Matrix x(dtype, rows, cols), weight(DType::f32, 1, cols), rstd(DType::f32, 1, rows);
    x.fill([](std::int64_t r, std::int64_t c) { return (r * 7919 + c * 104729) % 257 / 64.0L - 2; });
    weight.fill_normal(1);
    for (const Kernels* k : test::backends()) {
      if (test::is_cuda(*k)) continue;
      SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype));
      Matrix past(dtype, rows, cols), through(dtype, rows, cols, cols + 1);
      Matrix dw_past(DType::f32, 1, cols), dw_through(DType::f32, 1, cols);
      RmsNormForward f{.x = x, .weight = std::as_const(weight).vector(), .eps = 1e-5};
      f.rstd = rstd.vector();
      f.y = past, k->rms_norm_forward(f, {});
      f.y = through, k->rms_norm_forward(f, {});
      for (std::int64_t r = 0; r < rows; ++r)
        ASSERT_EQ(std::memcmp(past.row(r), through.row(r), std::size_t(cols * test::size_of(dtype))), 0) << "y, row " << r;
      RmsNormBackward b{.x = x, .weight = f.weight, .rstd = std::as_const(rstd).vector(), .dy = x};
      b.dx = past, b.dw = dw_past.vector(), k->rms_norm_backward(b, {});
      b.dx = through, b.dw = dw_through.vector(), k->rms_norm_backward(b, {});
      for (std::int64_t r = 0; r < rows; ++r)
        ASSERT_EQ(std::memcmp(past.row(r), through.row(r), std::size_t(cols * test::size_of(dtype))), 0) << "dx, row " << r;
      EXPECT_EQ(dw_past.bytes(), dw_through.bytes());
      ASSERT_TRUE(through.gaps_untouched());
    }
  }
}

TEST(RmsNorm, NanOfAnyBitsStaysNan) {
  constexpr std::int64_t cols = 83;
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype));
      Matrix x(dtype, 3, cols), y(dtype, 3, cols), weight(DType::f32, 1, cols), rstd(DType::f32, 1, 3), dx(dtype, 3, cols);
      x.fill_normal(1), weight.fill_normal(2), rstd.fill_normal(3);
      rstd.set_odd_nan(0, 1);
      RmsNormBackward b{.x = x, .weight = std::as_const(weight).vector(), .rstd = std::as_const(rstd).vector(), .dy = x};
      b.dx = dx, k->rms_norm_backward(b, {});
      for (std::int64_t i : {std::int64_t{5}, cols - 1}) weight.set_odd_nan(0, i);
      RmsNormForward f{.x = x, .weight = std::as_const(weight).vector(), .cast_before_weight = true, .rstd_given = true};
      f.y = y, f.rstd = rstd.vector(), k->rms_norm_forward(f, {});
      for (std::int64_t r = 0; r < 3; ++r)
        for (std::int64_t i = 0; i < cols; ++i) {
          EXPECT_EQ(std::isnan(y.get(r, i)), r == 1 || i == 5 || i == cols - 1) << r << " " << i;
          EXPECT_EQ(std::isnan(dx.get(r, i)), r == 1) << r << " " << i;
        }
      k->rms_norm_backward(b, {});
      for (std::int64_t i = 0; i < cols; ++i) EXPECT_TRUE(std::isnan(dx.get(0, i))) << i;
    }
}

// 2^31 + 64 elements, and rows more than 2^31 bytes apart.  Untouched pages of x are zeros and cost nothing; y is bf16.
TEST(RmsNorm, SizesPast31Bits) {
  const Kernels* k = test::backends().back();
  {
    constexpr std::int64_t cols = (std::int64_t{1} << 31) + 64;
    Matrix x(DType::bf16, 1, cols), y(DType::bf16, 1, cols), rstd(DType::f32, 1, 1);
    for (std::int64_t i : {std::int64_t{3}, (std::int64_t{1} << 31) - 1, (std::int64_t{1} << 31) + 63}) x.set(0, i, 512);
    RmsNormForward a;
    a.x = x, a.y = y, a.rstd = rstd.vector(), a.eps = 1e-3;
    k->rms_norm_forward(a, {});
    const long double truth = 1 / std::sqrt(3 * 512.0L * 512 / cols + 1e-3L);
    EXPECT_LE(std::fabs(rstd.get(0, 0) - truth), test::ulp(DType::f32, truth));
    for (std::int64_t i : {std::int64_t{3}, (std::int64_t{1} << 31) - 1, (std::int64_t{1} << 31) + 63})
      EXPECT_EQ(y.get(0, i), test::rounded(DType::bf16, test::rounded(DType::f32, 512 * rstd.get(0, 0)))) << i;
    EXPECT_EQ(y.get(0, (std::int64_t{1} << 31)), 0);
  }
  {
    constexpr std::int64_t stride = (std::int64_t{1} << 30) + 7;  // elements; in bytes 2^31 and more
    Case c{DType::bf16, DType::bf16, DType::bf16, true, true, 0};
    Matrix x(c.x, 3, 67, stride), dy(c.y, 3, 67, -stride), dx(c.x, 3, 67, stride), y(c.y, 3, 67, stride);
    Backward near(c, 3, 67);
    for (std::int64_t r = 0; r < 3; ++r)
      for (std::int64_t i = 0; i < 67; ++i) x.set(r, i, near.x.get(r, i)), dy.set(r, i, near.dy.get(r, i));
    RmsNormBackward a = near.args(), far = near.args();
    Matrix dw(DType::f32, 1, 67);
    far.x = x, far.dy = dy, far.dx = dx, far.dw = dw.vector();
    k->rms_norm_backward(a, {});
    k->rms_norm_backward(far, {});
    EXPECT_EQ(dw.bytes(), near.dw.bytes());
    for (std::int64_t r = 0; r < 3; ++r)
      for (std::int64_t i = 0; i < 67; ++i) EXPECT_EQ(dx.get(r, i), near.dx.get(r, i));
  }
}

}  // namespace
