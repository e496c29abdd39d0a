// LayerNorm against the definition in long double: statistics, y and y again, gradients; means far from 0, shapes, strides,
// threads.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "matrix.hpp"

namespace {

using namespace unswag;
using test::Matrix;

constexpr std::int64_t some_cols[] = {1, 2, 15, 16, 17, 31, 33, 64, 67, 768, 2053};

struct Case {
  DType x, y, vectors;  // y: also that of dy; vectors: weight and bias
  bool has_weight, has_bias;
  double mean = 0.5;  // of x

  bool has_f64() const { return x == DType::f64 || y == DType::f64 || ((has_weight || has_bias) && vectors == DType::f64); }
  // What the kernel computes in, and the dtype of mean, rstd, dw and db.
  DType compute() const { return x == DType::f64 || y == DType::f64 ? DType::f64 : DType::f32; }
  DType sums() const { return x == DType::f64 ? DType::f64 : DType::f32; }
};
std::string text(const Kernels* k, const Case& c, std::int64_t rows, std::int64_t cols) {
  return std::string(k->name) + " x " + test::name_of(c.x) + " y " + test::name_of(c.y) + (c.has_weight ? " weight" : "") +
         (c.has_bias ? " bias " : " ") + test::name_of(c.vectors) + " " + std::to_string(rows) + " x " + std::to_string(cols);
}

// Every dtype of x, of y, and of the vectors; with both vectors, either, none.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType x : test::all_dtypes)
    for (DType y : test::all_dtypes) {
      all.push_back({x, y, x, false, false});
      all.push_back({x, y, y, true, false});
      all.push_back({x, y, y, false, true});
      for (DType vectors : test::all_dtypes) all.push_back({x, y, vectors, true, true});
    }
  return all;
}

long double of_vector(const Case& c, bool there, const Matrix& m, std::int64_t col, long double otherwise) {
  return there ? test::rounded(c.compute(), m.get(0, col)) : otherwise;
}
// (x - mean) rstd as it is rounded.
long double xhat(const Case& c, long double x, long double mean, long double rstd) {
  return test::product(c.compute(), test::rounded(c.compute(), x - mean), rstd);
}

struct Statistics {
  long double mean = 0, variance = 0, rstd;
  Statistics(const Matrix& x, std::int64_t r, long double eps) {
    for (std::int64_t i = 0; i < x.cols(); ++i) mean += x.get(r, i);
    mean /= x.cols();
    for (std::int64_t i = 0; i < x.cols(); ++i) variance += (x.get(r, i) - mean) * (x.get(r, i) - mean);
    variance /= x.cols();
    rstd = 1 / std::sqrt(variance + eps);
  }
};

struct Norm {
  Case c;
  Matrix x, weight, bias, y, mean, rstd;
  Norm(const Case& c, std::int64_t rows, std::int64_t cols, std::int64_t x_gap = 0, std::int64_t y_gap = 0)
      : c(c),
        x(c.x, rows, cols, cols + x_gap),
        weight(c.vectors, 1, cols),
        bias(c.vectors, 1, cols),
        y(c.y, rows, cols, cols + y_gap),
        mean(c.sums(), 1, rows),
        rstd(c.sums(), 1, rows) {
    test::Random random(std::uint64_t(rows * 131 + cols));
    x.fill([&](auto, auto) { return c.mean + random.normal(); });
    weight.fill_normal(std::uint64_t(cols + 7));
    bias.fill_normal(std::uint64_t(cols + 8));
    x.read_only(), weight.read_only(), bias.read_only();
  }
  LayerNormForward args(bool given = false) {
    LayerNormForward a;
    a.x = x;
    if (c.has_weight) a.weight = std::as_const(weight).vector();
    if (c.has_bias) a.bias = std::as_const(bias).vector();
    a.statistics_given = given;
    a.eps = 1e-5;
    a.y = y;
    a.mean = mean.vector();
    a.rstd = rstd.vector();
    return a;
  }
  void expect_statistics() const {
    const long double unit = test::ulp(c.compute(), 1.0L);
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      const Statistics truth(x, r, 1e-5L);
      ASSERT_LE(std::fabs(mean.get(0, r) - truth.mean),
                0.5L * test::ulp(mean.dtype(), truth.mean) + unit * std::sqrt(truth.variance))
          << r;
      ASSERT_LE(std::fabs(rstd.get(0, r) - truth.rstd), 0.5L * test::ulp(rstd.dtype(), truth.rstd) + 0.75L * unit * truth.rstd)
          << r;
    }
  }
};

TEST(LayerNormForward, StatisticsAndYAreRightAndYAgainIsYBitForBit) {
  for (const Case& c : cases())
    for (const Kernels* k : test::backends(c.has_f64()))
      for (std::int64_t cols : some_cols) {
        SCOPED_TRACE(text(k, c, 3, cols));
        Norm n(c, 3, cols, cols % 3, cols % 2 ? 0 : -2 * cols - 5);
        k->layer_norm_forward(n.args(), {});
        n.expect_statistics();
        for (std::int64_t r = 0; r < 3; ++r)
          for (std::int64_t i = 0; i < cols; ++i) {
            const long double h = xhat(c, n.x.get(r, i), n.mean.get(0, r), n.rstd.get(0, r));
            const long double hw = h * of_vector(c, c.has_weight, n.weight, i, 1);
            const long double b = of_vector(c, c.has_bias, n.bias, i, 0), got = n.y.get(r, i);
            // fused, or rounded before the bias is added
            const long double twice = c.has_weight && c.has_bias ? test::ulp(c.compute(), hw) : 0;
            const long double once = test::ulp(c.compute(), hw + b) / 2;
            ASSERT_LE(std::fabs(got - (hw + b)), test::ulp(c.y, got) / 2 + once + twice) << "row " << r << " col " << i;
          }
        ASSERT_TRUE(n.y.gaps_untouched());
        // y again from x: mean and rstd are only read.
        const std::vector<char> first = n.y.bytes();
        n.y.fill([](auto, auto) { return 0.0L; });
        n.mean.read_only(), n.rstd.read_only();
        k->layer_norm_forward(n.args(true), {});
        ASSERT_EQ(n.y.bytes(), first);
      }
}

// Where E[x^2] - E[x]^2 would have no digit left, and in long rows.
TEST(LayerNormForward, StatisticsAreExactFarFromZeroAndInLongRows) {
  for (const Kernels* k : test::backends())
    for (const double mean : {0.0, 100.0, -30000.0, 1e6})
      for (const std::int64_t cols : {3, 67, 4099, 1 << 18}) {
        SCOPED_TRACE(text(k, {}, 2, cols) + " mean " + std::to_string(mean));
        Norm n({DType::f32, DType::f32, DType::f32, false, false, mean}, 2, cols);
        k->layer_norm_forward(n.args(), {});
        n.expect_statistics();
      }
}

TEST(LayerNormForward, RowsOfOneValue) {
  for (const DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends())
      for (const long double value : {0.0L, 1.0L, -3.140625L, 60000.0L}) {
        Matrix x(dtype, 1, 77), y(dtype, 1, 77), mean(DType::f32, 1, 1), rstd(DType::f32, 1, 1);
        x.fill([&](auto, auto) { return value; });
        LayerNormForward a{.x = x, .eps = 1e-5, .y = y, .mean = mean.vector(), .rstd = rstd.vector()};
        k->layer_norm_forward(a, {});
        for (std::int64_t i = 0; i < 77; ++i) EXPECT_EQ(y.get(0, i), 0) << k->name << ' ' << value;
        EXPECT_EQ(mean.get(0, 0), x.get(0, 0));
        a.eps = 0;
        k->layer_norm_forward(a, {});
        EXPECT_EQ(rstd.get(0, 0), std::numeric_limits<long double>::infinity()) << k->name;  // as in torch
      }
}

TEST(LayerNormForward, NothingToDo) {
  for (const Kernels* k : test::backends()) {
    const Case c{DType::f32, DType::bf16, DType::f32, true, true};
    Norm none(c, 0, 16), empty(c, 3, 0);
    k->layer_norm_forward(none.args(), {});
    k->layer_norm_forward(empty.args(), {});
    for (std::int64_t r = 0; r < 3; ++r) EXPECT_TRUE(std::isnan(empty.mean.get(0, r))) << k->name;  // the mean of nothing
  }
}

TEST(LayerNormForward, NanAndInfStayInTheirRow) {
  const long double inf = std::numeric_limits<long double>::infinity(), nan = std::numeric_limits<long double>::quiet_NaN();
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      Matrix x(dtype, 4, 37), y(dtype, 4, 37), mean(DType::f32, 1, 4), rstd(DType::f32, 1, 4);
      x.fill_normal(1);
      x.set(1, 36, nan);
      x.set(2, 3, inf);
      k->layer_norm_forward({.x = x, .y = y, .mean = mean.vector(), .rstd = rstd.vector()}, {});
      for (std::int64_t i = 0; i < 37; ++i) {
        EXPECT_TRUE(std::isfinite(y.get(0, i)) && std::isfinite(y.get(3, i))) << k->name;
        EXPECT_TRUE(std::isnan(y.get(1, i)) && std::isnan(y.get(2, i))) << k->name;
      }
    }
}

TEST(LayerNormForward, ThreadsDoNotChangeTheBits) {
  for (const Kernels* k : test::backends()) {
    Norm one({DType::bf16, DType::bf16, DType::f32, true, true}, 517, 203), three(one.c, 517, 203);
    k->layer_norm_forward(one.args(), {nullptr, 1});
    k->layer_norm_forward(three.args(), {nullptr, 3});
    EXPECT_EQ(one.y.bytes(), three.y.bytes()) << k->name;
    EXPECT_EQ(one.mean.bytes(), three.mean.bytes()) << k->name;
    EXPECT_EQ(one.rstd.bytes(), three.rstd.bytes()) << k->name;
  }
}

struct Backward {
  Case c;
  Matrix x, weight, dy, mean, rstd, dx, dw, db;
  Backward(const Case& c, std::int64_t rows, std::int64_t cols, std::int64_t x_gap = 0, std::int64_t dy_gap = 0)
      : c(c),
        x(c.x, rows, cols, cols + x_gap),
        weight(c.vectors, 1, cols),
        dy(c.y, rows, cols, cols + dy_gap),
        mean(c.sums(), 1, rows),
        rstd(c.sums(), 1, rows),
        dx(c.x, rows, cols, cols + dy_gap),
        dw(c.sums(), 1, cols),
        db(c.sums(), 1, cols) {
    test::Random random(std::uint64_t(rows * 17 + cols));
    x.fill([&](auto, auto) { return c.mean + random.normal(); });
    dy.fill([&](auto, auto) { return 0.25 + random.normal(); });
    weight.fill_normal(std::uint64_t(cols + 5));
    for (std::int64_t r = 0; r < rows; ++r) {
      const Statistics found(x, r, 1e-6L);
      mean.set(0, r, cols ? found.mean : 0), rstd.set(0, r, cols ? found.rstd : 1);
    }
    x.read_only(), dy.read_only(), weight.read_only(), mean.read_only(), rstd.read_only();
  }
  LayerNormBackward args(bool want_dx = true, bool want_dw = true, bool want_db = true) {
    LayerNormBackward a;
    a.x = x, a.dy = dy;
    if (c.has_weight) a.weight = std::as_const(weight).vector();
    a.mean = std::as_const(mean).vector(), a.rstd = std::as_const(rstd).vector();
    if (want_dx) a.dx = dx;
    if (want_dw) a.dw = dw.vector();
    if (want_db) a.db = db.vector();
    return a;
  }
  // dx = rstd (g - mean(g) - xhat mean(g xhat)), g = w dy, and the size of its terms, which rounding errors are relative to.
  void expect_dx() const {
    const long double unit = test::ulp(c.compute(), 1.0L), n = (long double)x.cols();
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      const long double m = mean.get(0, r), s = rstd.get(0, r);
      long double sum = 0, size = 0, products = 0, size_of_products = 0;
      const auto g = [&](std::int64_t i) { return of_vector(c, c.has_weight, weight, i, 1) * dy.get(r, i); };
      for (std::int64_t i = 0; i < x.cols(); ++i) {
        const long double product = g(i) * (x.get(r, i) - m) * s;
        sum += g(i), size += std::fabs(g(i)), products += product, size_of_products += std::fabs(product);
      }
      for (std::int64_t i = 0; i < x.cols(); ++i) {
        const long double h = (x.get(r, i) - m) * s, truth = s * (g(i) - sum / n - h * products / n);
        const long double slack = 2 * unit * s * (std::fabs(g(i)) + size / n + std::fabs(h) * size_of_products / n);
        ASSERT_LE(std::fabs(dx.get(r, i) - truth), 0.5L * test::ulp(c.x, truth) + slack) << "row " << r << " col " << i;
      }
    }
  }
  void expect_dw_and_db() const {
    const long double unit = test::ulp(c.compute(), 1.0L);
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      long double w = 0, b = 0, w_size = 0, b_size = 0;
      for (std::int64_t r = 0; r < x.rows(); ++r) {
        const long double term = dy.get(r, i) * xhat(c, x.get(r, i), mean.get(0, r), rstd.get(0, r));
        w += term, w_size += std::fabs(term), b += dy.get(r, i), b_size += std::fabs(dy.get(r, i));
      }
      ASSERT_LE(std::fabs(dw.get(0, i) - w), 0.5L * test::ulp(dw.dtype(), w) + unit * w_size) << "col " << i;
      ASSERT_LE(std::fabs(db.get(0, i) - b), 0.5L * test::ulp(db.dtype(), b) + unit * b_size) << "col " << i;
    }
  }
};

TEST(LayerNormBackward, DxDwAndDbAreRightTogetherAndAlone) {
  for (const Case& c : cases())
    for (const Kernels* k : test::backends(c.has_f64()))
      for (std::int64_t cols : {1, 15, 16, 17, 67}) {
        const std::int64_t rows = cols == 17 ? 71 : 5, x_gap = cols % 4, dy_gap = cols % 2 ? 0 : -2 * cols - 3;
        SCOPED_TRACE(text(k, c, rows, cols));
        Backward all(c, rows, cols, x_gap, dy_gap);
        k->layer_norm_backward(all.args(), {});
        all.expect_dx();
        all.expect_dw_and_db();
        ASSERT_TRUE(all.dx.gaps_untouched());
        // Each alone gives the same bits, and leaves the memory of the others as it was.
        for (int wanted = 0; wanted < 3; ++wanted) {
          Backward one(c, rows, cols, x_gap, dy_gap);
          const std::vector<char> before[] = {one.dx.bytes(), one.dw.bytes(), one.db.bytes()};
          k->layer_norm_backward(one.args(wanted == 0, wanted == 1, wanted == 2), {});
          ASSERT_EQ(one.dx.bytes(), wanted == 0 ? all.dx.bytes() : before[0]);
          ASSERT_EQ(one.dw.bytes(), wanted == 1 ? all.dw.bytes() : before[1]);
          ASSERT_EQ(one.db.bytes(), wanted == 2 ? all.db.bytes() : before[2]);
        }
      }
}

TEST(LayerNormBackward, SumsOverManyRowsAreAccurateAndDoNotDependOnThreads) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f64})
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (std::int64_t rows : {1, 3, 4, 63, 64, 65, 1021, 4999}) {
        SCOPED_TRACE(std::string(k->name) + " rows " + std::to_string(rows));
        const Case c{dtype, dtype, DType::f32, true, true};
        Backward one(c, rows, 19), three(c, rows, 19);
        k->layer_norm_backward(one.args(), {nullptr, 1});
        k->layer_norm_backward(three.args(), {nullptr, 3});
        EXPECT_EQ(one.dx.bytes(), three.dx.bytes());
        EXPECT_EQ(one.dw.bytes(), three.dw.bytes());
        EXPECT_EQ(one.db.bytes(), three.db.bytes());
        one.expect_dx();
        one.expect_dw_and_db();
        if (dtype == DType::f64) continue;  // its blocks are not added up in anything wider
        // Much better than adding row after row: what is left is the rounding of db itself.
        for (std::int64_t i = 0; i < 19; ++i) {
          long double truth = 0, squares = 0;
          for (std::int64_t r = 0; r < rows; ++r) {
            const long double term = one.dy.get(r, i);
            truth += term, squares += term * term;
          }
          const long double unit = test::ulp(c.compute(), 1.0L);
          EXPECT_LE(std::fabs(one.db.get(0, i) - truth), 0.5L * test::ulp(c.sums(), truth) + 4 * unit * std::sqrt(squares));
        }
      }
}

TEST(LayerNormBackward, NoRowsGiveZeroDwAndDb) {
  for (const Kernels* k : test::backends()) {
    const Case c{DType::f32, DType::f32, DType::f32, true, true};
    Backward none(c, 0, 21), empty(c, 2, 0);
    k->layer_norm_backward(none.args(), {});
    k->layer_norm_backward(empty.args(), {});
    for (std::int64_t i = 0; i < 21; ++i) EXPECT_TRUE(none.dw.get(0, i) == 0 && none.db.get(0, i) == 0) << k->name;
  }
}

// More than 16 MiB go past the cache, where rows begin on cache lines.
TEST(LayerNorm, WritingPastTheCacheChangesNoBits) {
  constexpr std::int64_t cols = 1056;
  for (DType dtype : {DType::f32, DType::bf16}) {
    const std::int64_t rows = (std::int64_t{1} << 24) / (cols * test::size_of(dtype)) + 3;
    Matrix x(dtype, rows, cols), weight(DType::f32, 1, cols), mean(DType::f32, 1, rows), rstd(DType::f32, 1, rows);
    x.fill([](std::int64_t r, std::int64_t c) { return (r * 7919 + c * 104729) % 257 / 64.0L - 2; });
    weight.fill_normal(1);
    for (const Kernels* k : test::backends()) {
      if (test::is_cuda(*k)) continue;
      SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype));
      Matrix past(dtype, rows, cols), through(dtype, rows, cols, cols + 1);
      LayerNormForward f{.x = x, .weight = std::as_const(weight).vector(), .eps = 1e-5};
      f.mean = mean.vector(), f.rstd = rstd.vector();
      f.y = past, k->layer_norm_forward(f, {});
      f.y = through, k->layer_norm_forward(f, {});
      for (std::int64_t r = 0; r < rows; ++r)
        ASSERT_EQ(std::memcmp(past.row(r), through.row(r), std::size_t(cols * test::size_of(dtype))), 0) << "y, row " << r;
      LayerNormBackward b{.x = x, .weight = f.weight};
      b.mean = std::as_const(mean).vector(), b.rstd = std::as_const(rstd).vector(), b.dy = x;
      b.dx = past, k->layer_norm_backward(b, {});
      b.dx = through, k->layer_norm_backward(b, {});
      for (std::int64_t r = 0; r < rows; ++r)
        ASSERT_EQ(std::memcmp(past.row(r), through.row(r), std::size_t(cols * test::size_of(dtype))), 0) << "dx, row " << r;
      ASSERT_TRUE(through.gaps_untouched());
    }
  }
}

TEST(LayerNorm, NanOfAnyBitsStaysNan) {
  constexpr std::int64_t cols = 83;
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype));
      Matrix x(dtype, 4, cols), y(dtype, 4, cols), dx(dtype, 4, cols);
      Matrix weight(DType::f32, 1, cols), bias(DType::f32, 1, cols), mean(DType::f32, 1, 4), rstd(DType::f32, 1, 4);
      x.fill_normal(1), weight.fill_normal(2), bias.fill_normal(3), mean.fill_normal(4), rstd.fill_normal(5);
      mean.set_odd_nan(0, 1), rstd.set_odd_nan(0, 2), weight.set_odd_nan(0, 5);
      weight.set_odd_nan(0, cols - 1), bias.set_odd_nan(0, 7);
      LayerNormForward f{.x = x, .weight = std::as_const(weight).vector(), .bias = std::as_const(bias).vector()};
      f.statistics_given = true, f.y = y, f.mean = mean.vector(), f.rstd = rstd.vector();
      k->layer_norm_forward(f, {});
      LayerNormBackward b{.x = x};
      b.mean = std::as_const(mean).vector(), b.rstd = std::as_const(rstd).vector(), b.dy = x, b.dx = dx;
      k->layer_norm_backward(b, {});
      for (std::int64_t r = 0; r < 4; ++r)
        for (std::int64_t i = 0; i < cols; ++i) {
          EXPECT_EQ(std::isnan(y.get(r, i)), r == 1 || r == 2 || i == 5 || i == 7 || i == cols - 1) << r << " " << i;
          EXPECT_EQ(std::isnan(dx.get(r, i)), r == 1 || r == 2) << r << " " << i;
        }
      b.weight = f.weight;
      k->layer_norm_backward(b, {});
      for (std::int64_t i = 0; i < cols; ++i) EXPECT_TRUE(std::isnan(dx.get(0, i))) << i;
    }
}

// Rows more than 2^31 bytes apart.
TEST(LayerNorm, StridesPast31Bits) {
  const Kernels* k = test::backends().back();
  constexpr std::int64_t stride = (std::int64_t{1} << 30) + 7;  // elements; in bytes 2^31 and more
  const Case c{DType::bf16, DType::bf16, DType::bf16, true, true};
  Matrix x(c.x, 3, 67, stride), dy(c.y, 3, 67, -stride), dx(c.x, 3, 67, stride);
  Backward near(c, 3, 67);
  for (std::int64_t r = 0; r < 3; ++r)
    for (std::int64_t i = 0; i < 67; ++i) x.set(r, i, near.x.get(r, i)), dy.set(r, i, near.dy.get(r, i));
  LayerNormBackward a = near.args(), far = near.args();
  Matrix dw(DType::f32, 1, 67), db(DType::f32, 1, 67);
  far.x = x, far.dy = dy, far.dx = dx, far.dw = dw.vector(), far.db = db.vector();
  k->layer_norm_backward(a, {});
  k->layer_norm_backward(far, {});
  EXPECT_EQ(dw.bytes(), near.dw.bytes());
  EXPECT_EQ(db.bytes(), near.db.bytes());
  for (std::int64_t r = 0; r < 3; ++r)
    for (std::int64_t i = 0; i < 67; ++i) EXPECT_EQ(dx.get(r, i), near.dx.get(r, i));
}

}  // namespace
