#include <gtest/gtest.h>

#include "matrix.hpp"

namespace {

using namespace unswag;
using test::Matrix;

constexpr long double inf = std::numeric_limits<long double>::infinity();
constexpr long double nan = std::numeric_limits<long double>::quiet_NaN();

DType sums(DType logits) { return logits == DType::f64 ? DType::f64 : DType::f32; }

struct Options {
  double softcap = 0, logit_scale = 1, label_smoothing = 0, gradient_scale = 1;
  bool class_weight = false, row_scale = false;
};

// A call, and the truth in long double from the formula in unswag.hpp.
struct Loss {
  Options o;
  Matrix logits, weight, scale, loss, lse;
  std::vector<std::int64_t> labels;
  std::vector<long double> given;  // logits before they are overwritten

  Loss(DType dtype, std::int64_t rows, std::int64_t classes, const Options& o = {}, double spread = 3, std::int64_t stride = 0)
      : o(o),
        logits(dtype, rows, classes, stride),
        weight(sums(dtype), 1, classes),
        scale(sums(dtype), 1, rows),
        loss(sums(dtype), 1, rows),
        lse(sums(dtype), 1, rows) {
    logits.fill_normal(std::uint64_t(rows + classes), spread);
    test::Random random(7);
    weight.fill([&](auto, auto) { return 0.5 + random.uniform(); });
    scale.fill([&](auto, auto) { return random.normal(); });
    for (std::int64_t r = 0; r < rows; ++r) labels.push_back(std::int64_t(random.bits() % std::uint64_t(classes)));
    weight.read_only(), scale.read_only();
  }
  CrossEntropy args() {
    CrossEntropy a;
    a.logits = logits, a.labels = labels.data(), a.loss = loss.vector(), a.lse = lse.vector();
    if (o.class_weight) a.class_weight = static_cast<const Matrix&>(weight).vector();
    if (o.row_scale) a.row_scale = static_cast<const Matrix&>(scale).vector();
    a.softcap = o.softcap, a.logit_scale = o.logit_scale, a.label_smoothing = o.label_smoothing,
    a.gradient_scale = o.gradient_scale;
    return a;
  }
  void run(const Kernels* k, int threads = 0) {
    given.clear();
    for (std::int64_t r = 0; r < logits.rows(); ++r)
      for (std::int64_t c = 0; c < logits.cols(); ++c) given.push_back(logits.get(r, c));
    k->cross_entropy(args(), {nullptr, threads});
  }

  long double w(std::int64_t c) const { return o.class_weight ? weight.get(0, c) : 1; }
  void expect_right() const {
    const std::int64_t classes = logits.cols();
    const long double unit = test::ulp(loss.dtype(), 1.0L);
    std::vector<long double> z(std::size_t(classes), 0), slope(std::size_t(classes), 0);
    for (std::int64_t r = 0; r < logits.rows(); ++r) {
      long double top = -inf;
      for (std::int64_t c = 0; c < classes; ++c) {
        const long double x = o.logit_scale * given[std::size_t(r * classes + c)];
        const long double t = o.softcap > 0 ? std::tanh(x / o.softcap) : 0;
        z[std::size_t(c)] = o.softcap > 0 ? o.softcap * t : x;
        slope[std::size_t(c)] = o.logit_scale * (1 - t * t);
        top = std::max(top, z[std::size_t(c)]);
      }
      const std::int64_t y = labels[std::size_t(r)];
      long double others = 0;
      for (std::int64_t c = 0; c < classes; ++c) others += c == y ? 0 : std::exp(z[std::size_t(c)] - top);
      const long double own = std::exp(z[std::size_t(y)] - top), total = own + others, log_sum = top + std::log(total);
      const long double nll = std::log1p(others / own), confidence = (1 - o.label_smoothing) * w(y),
                        smoothing = o.label_smoothing / double(classes);
      long double truth = confidence * nll, weights = 0, size = std::fabs(log_sum);
      for (std::int64_t c = 0; c < classes; ++c) {
        weights += w(c);
        if (smoothing > 0) truth += smoothing * w(c) * (log_sum - z[std::size_t(c)]);
        size = std::max(size, std::fabs(z[std::size_t(c)]));
      }
      // Errors of z are relative to its size when it comes out of tanh or a product.
      const long double z_error = unit * (o.softcap > 0 ? 4 * o.softcap : o.logit_scale != 1 ? size : 0);
      ASSERT_LE(std::fabs(loss.get(0, r) - truth), 4 * unit * truth + 2 * z_error + (smoothing > 0 ? unit * size : 0))
          << "row " << r;
      ASSERT_LE(std::fabs(lse.get(0, r) - log_sum), unit * std::fabs(log_sum) + unit + z_error) << "row " << r;

      const long double factor = (o.row_scale ? scale.get(0, r) : 1) * o.gradient_scale;
      for (std::int64_t c = 0; c < classes; ++c) {
        const long double p = std::exp(z[std::size_t(c)] - top) / total;
        const long double p_minus_y = c == y ? -others / total : p;
        const long double g = confidence * p_minus_y + smoothing * (weights * p - w(c));
        const long double expected = factor * g * slope[std::size_t(c)];
        const long double far = std::fabs(top - z[std::size_t(c)]);  // z - max is rounded once
        const long double terms =
            std::fabs(factor * o.logit_scale) *
            ((confidence + smoothing * weights) * (c == y ? std::fabs(p_minus_y) : p) * (4 + far) + 2 * smoothing * w(c));
        const long double slack = unit * terms + z_error * std::fabs(factor * o.logit_scale) * p;
        ASSERT_LE(std::fabs(logits.get(r, c) - expected),
                  0.5L * test::ulp(logits.dtype(), expected) + slack + test::ulp(logits.dtype(), 0))
            << "row " << r << " class " << c << (c == y ? " label" : "");
      }
    }
  }
};

std::vector<Options> options() {
  std::vector<Options> all{{},
                           {.softcap = 30},
                           {.logit_scale = 0.0625},
                           {.logit_scale = -1.7},
                           {.softcap = 5, .logit_scale = -1.7},
                           {.label_smoothing = 0.1},
                           {.gradient_scale = 1.0 / 512},
                           {.class_weight = true},
                           {.row_scale = true}};
  all.push_back({.label_smoothing = 0.2, .class_weight = true});
  all.push_back({.softcap = 20,
                 .logit_scale = 0.5,
                 .label_smoothing = 0.3,
                 .gradient_scale = -3,
                 .class_weight = true,
                 .row_scale = true});
  return all;
}

TEST(CrossEntropy, LossLseAndGradientAreRight) {
  const std::vector<Options> all = options();
  for (DType dtype : test::all_dtypes)
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (const Options& o : all)
        for (std::int64_t classes : {1, 2, 15, 16, 17, 67, 2047, 2048, 2049, 5003}) {
          SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype) + " classes " + std::to_string(classes) + " option " +
                       std::to_string(&o - all.data()));
          Loss loss(dtype, 3, classes, o, 3, classes % 2 ? -(classes + 3) : 0);
          loss.run(k);
          loss.expect_right();
          ASSERT_TRUE(loss.logits.gaps_untouched());
        }
}

TEST(CrossEntropy, WithoutGradientLogitsAreOnlyRead) {
  for (const Kernels* k : test::backends()) {
    Loss with(DType::bf16, 3, 2053, {.softcap = 30, .label_smoothing = 0.1}), without(DType::bf16, 3, 2053, with.o);
    with.run(k);
    CrossEntropy a = without.args();
    a.write_gradient = false;
    without.logits.read_only();
    k->cross_entropy(a, {});
    EXPECT_EQ(with.loss.bytes(), without.loss.bytes()) << k->name;
    EXPECT_EQ(with.lse.bytes(), without.lse.bytes()) << k->name;
    a.lse = {};
    k->cross_entropy(a, {});
    EXPECT_EQ(with.loss.bytes(), without.loss.bytes()) << k->name;
  }
}

// A whole vocabulary, where PyTorch's own fp32 loss is off by 8e-6 and its softmax rows do not sum up to 1 within 1e-5.
TEST(CrossEntropy, KeepsItsDigitsOverALargeVocabulary) {
  constexpr std::int64_t classes = 49152;
  for (const Kernels* k : test::backends())
    for (double spread : {0.02, 1.0, 4.0}) {
      Loss loss(DType::f32, 4, classes, {}, spread);
      loss.run(k);
      for (std::int64_t r = 0; r < 4; ++r) {
        long double total = 0, sum = 0;
        const long double* z = loss.given.data() + r * classes;
        for (std::int64_t c = 0; c < classes; ++c) total += std::exp(z[c]);
        const long double truth = std::log(total) - z[loss.labels[std::size_t(r)]];
        EXPECT_LE(std::fabs(loss.loss.get(0, r) - truth), 2e-7L * truth) << k->name << " spread " << spread;
        for (std::int64_t c = 0; c < classes; ++c) sum += loss.logits.get(r, c);
        EXPECT_LE(std::fabs(sum), 2e-7L) << k->name << " spread " << spread;  // sum of p, less the label's 1
      }
    }
}

TEST(CrossEntropy, AnAlmostCertainLabelKeepsItsDigits) {
  for (const Kernels* k : test::backends())
    for (const long double sure : {25.0L, 60.0L}) {  // 1 + others is 1: in float, in double
      Loss loss(DType::f32, 1, 100);
      loss.logits.fill([&](auto, std::int64_t c) { return c == loss.labels[0] ? sure : 0.0L; });
      loss.run(k);
      const long double others = 99 * std::exp(-sure);
      EXPECT_LE(std::fabs(loss.loss.get(0, 0) - std::log1p(others)), 1e-6L * others) << k->name << " " << sure;
      EXPECT_LE(std::fabs(loss.logits.get(0, loss.labels[0]) + others / (1 + others)), 1e-6L * others)
          << k->name << " " << sure;
    }
}

TEST(CrossEntropy, IgnoredRowsAreNotRead) {
  for (DType dtype : test::all_dtypes)
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (std::int64_t ignore : {std::int64_t{-100}, std::int64_t{5}}) {
        Loss loss(dtype, 4, 67, {.label_smoothing = 0.1, .row_scale = true});
        for (std::int64_t c = 0; c < 67; ++c) loss.logits.set(2, c, nan);
        loss.labels = {1, ignore, ignore, 2};
        CrossEntropy a = loss.args();
        a.ignore_index = ignore;
        k->cross_entropy(a, {});
        for (std::int64_t r = 0; r < 4; ++r) {
          const bool ignored = r == 1 || r == 2;
          EXPECT_EQ(loss.loss.get(0, r) == 0 && loss.lse.get(0, r) == 0, ignored) << k->name << r;
          for (std::int64_t c = 0; c < 67; ++c) EXPECT_EQ(loss.logits.get(r, c) == 0, ignored) << k->name << r << c;
        }
      }
}

TEST(CrossEntropy, MaskedClassesHaveNoPart) {
  for (DType dtype : test::all_dtypes)
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (std::int64_t live : {3, 2050, 5000}) {  // the last live class: all later tiles are masked, or all earlier ones
        constexpr std::int64_t classes = 5003;
        Loss masked(dtype, 2, classes), small(dtype, 2, 2);
        masked.labels = small.labels = {0, 1};
        masked.logits.fill([](auto, auto) { return -inf; });
        for (std::int64_t r = 0; r < 2; ++r) {
          masked.labels[std::size_t(r)] = live + r;
          for (std::int64_t c = 0; c < 2; ++c) masked.logits.set(r, live + c, small.logits.get(r, c));
        }
        masked.run(k), small.run(k);
        for (std::int64_t r = 0; r < 2; ++r) {
          EXPECT_NEAR(double(masked.loss.get(0, r)), double(small.loss.get(0, r)), 2e-7 * double(small.loss.get(0, r)));
          for (std::int64_t c = 0; c < classes; ++c) {
            if (c == live || c == live + 1) {
              EXPECT_NEAR(double(masked.logits.get(r, c)), double(small.logits.get(r, c - live)), 1e-3);
              EXPECT_NE(masked.logits.get(r, c), 0);
            } else {
              ASSERT_EQ(masked.logits.get(r, c), 0) << k->name << " " << test::name_of(dtype) << " " << c;
            }
          }
        }
      }
}

// The label is masked: loss is inf, the other classes' gradient is their softmax.  As torch.
TEST(CrossEntropy, AMaskedLabelCostsInfinity) {
  for (const Kernels* k : test::backends()) {
    Loss loss(DType::f32, 1, 33);
    loss.logits.fill([&](auto, std::int64_t c) { return c == loss.labels[0] ? -inf : 0; });
    loss.run(k);
    EXPECT_EQ(loss.loss.get(0, 0), inf);
    EXPECT_NEAR(double(loss.lse.get(0, 0)), std::log(32.0), 1e-6);
    for (std::int64_t c = 0; c < 33; ++c) EXPECT_NEAR(double(loss.logits.get(0, c)), c == loss.labels[0] ? -1 : 1.0 / 32, 1e-8);
  }
}

TEST(CrossEntropy, RowsWithoutAnAnswerAreNanAndTheirNeighboursAreNot) {
  for (DType dtype : test::all_dtypes)
    for (const Kernels* k : test::backends(dtype == DType::f64))
      for (std::int64_t classes : {1, 5, 40, 4100})
        for (std::int64_t where : {std::int64_t{0}, classes - 1}) {
          Loss loss(dtype, 7, classes);
          loss.labels = {0, classes - 1, 0, classes - 1, 0, classes - 1, 0};
          for (std::int64_t c = 0; c < classes; ++c) loss.logits.set(1, c, -inf);
          loss.logits.set(3, where, nan);
          for (std::int64_t c = 0; c < classes; ++c) loss.logits.set(5, c, c == where ? nan : -inf);
          if (classes > 1) loss.logits.set(6, where, inf);
          loss.run(k);
          for (std::int64_t r : {0, 2, 4}) {
            ASSERT_TRUE(std::isfinite(loss.loss.get(0, r)));
            for (std::int64_t c = 0; c < classes; ++c) ASSERT_TRUE(std::isfinite(loss.logits.get(r, c)));
          }
          for (std::int64_t r : {1, 3, 5}) {
            ASSERT_TRUE(std::isnan(loss.loss.get(0, r))) << k->name << " row " << r << " classes " << classes;
            for (std::int64_t c = 0; c < classes; ++c)
              ASSERT_TRUE(std::isnan(loss.logits.get(r, c))) << k->name << " " << test::name_of(dtype) << " row " << r
                                                             << " class " << c << " of " << classes << " " << where;
          }
          ASSERT_TRUE(classes == 1 || std::isnan(loss.logits.get(6, where)))
              << k->name << " " << test::name_of(dtype) << " " << classes;
        }
}

TEST(CrossEntropy, ExtremesDoNotOverflow) {
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends()) {
      const long double most = test::format(dtype).largest;
      Loss loss(dtype, 2, 40);
      loss.labels = {3, 4};
      loss.logits.fill([&](auto, std::int64_t c) { return c == 3 ? most : -most; });
      loss.run(k);
      EXPECT_EQ(loss.loss.get(0, 0), 0) << k->name;
      EXPECT_EQ(loss.loss.get(0, 1), test::rounded(DType::f32, 2 * most)) << k->name;
      EXPECT_EQ(loss.logits.get(0, 3), 0) << k->name;
      EXPECT_EQ(loss.logits.get(1, 3), 1) << k->name;
      EXPECT_EQ(loss.logits.get(1, 4), -1) << k->name;
      EXPECT_EQ(loss.logits.get(1, 5), 0) << k->name;
      Loss lowest(dtype, 1, 40);  // masked with the lowest number instead of -inf, all of it
      lowest.logits.fill([&](auto, auto) { return -most; });
      lowest.run(k);
      EXPECT_NEAR(double(lowest.loss.get(0, 0)), std::log(40.0), 1e-6) << k->name;
      EXPECT_NEAR(double(lowest.logits.get(0, (lowest.labels[0] + 1) % 40)), 1 / 40.0, 1e-4) << k->name;
    }
}

// From normal numbers to subnormal ones and to 0, in tiles that have them all and in tiles that do not.
TEST(CrossEntropy, ExponentialsAreRightToTheEndOfTheirRange) {
  for (DType dtype : test::float_dtypes)
    for (const Kernels* k : test::backends())
      for (const double scale : {1.0, 0.75, -0.75})
        for (const std::int64_t classes : {40, 67, 5003}) {
          SCOPED_TRACE(std::string(k->name) + " " + test::name_of(dtype) + " " + std::to_string(classes));
          Loss loss(dtype, 3, classes, {.logit_scale = scale});
          for (std::int64_t c = 0; c < 30; ++c) loss.logits.set(1, c, (-86 - c / 4.0L) / scale);
          for (std::int64_t c = 0; c < 30; ++c) loss.logits.set(2, classes - 1 - c, (-86 - c / 4.0L) / scale);
          loss.labels = {1, 31, 2};
          loss.run(k);
          loss.expect_right();
        }
}

TEST(CrossEntropy, NanOfAnyBitsStaysNan) {
  for (const Kernels* k : test::backends())
    for (const std::int64_t where : {0, 40, 4099}) {
      Loss loss(DType::f32, 2, 4100);
      loss.logits.set_odd_nan(1, where);
      loss.run(k);
      EXPECT_TRUE(std::isfinite(loss.loss.get(0, 0)) && std::isnan(loss.loss.get(0, 1))) << k->name << " " << where;
      for (std::int64_t c = 0; c < 4100; ++c) ASSERT_TRUE(std::isnan(loss.logits.get(1, c))) << k->name << " " << c;
    }
  for (const Kernels* k : test::backends()) {  // of a row's scale
    Loss loss(DType::bf16, 2, 100, {.row_scale = true});
    CrossEntropy a = loss.args();
    Matrix scale(DType::f32, 1, 2);
    scale.set(0, 0, 1), scale.set_odd_nan(0, 1);
    a.row_scale = static_cast<const Matrix&>(scale).vector();
    k->cross_entropy(a, {});
    for (std::int64_t c = 0; c < 100; ++c) {
      EXPECT_TRUE(std::isfinite(loss.logits.get(0, c))) << k->name << " " << c;
      EXPECT_TRUE(std::isnan(loss.logits.get(1, c))) << k->name << " " << c;
    }
  }
}

TEST(CrossEntropy, ThreadsDoNotChangeTheBits) {
  for (const Kernels* k : test::backends()) {
    Loss one(DType::f32, 61, 3001, {.label_smoothing = 0.1}), three(DType::f32, 61, 3001, one.o);
    one.run(k, 1);
    three.run(k, 3);
    EXPECT_EQ(one.logits.bytes(), three.logits.bytes()) << k->name;
    EXPECT_EQ(one.loss.bytes(), three.loss.bytes()) << k->name;
  }
}

// Rows more than 2^31 bytes apart.
TEST(CrossEntropy, StridesPast31Bits) {
  Loss near(DType::bf16, 3, 67), far(DType::bf16, 3, 67, {}, 3, (std::int64_t{1} << 30) + 7);
  near.run(test::backends().back());
  far.run(test::backends().back());
  EXPECT_EQ(near.loss.bytes(), far.loss.bytes());
  for (std::int64_t r = 0; r < 3; ++r)
    for (std::int64_t c = 0; c < 67; ++c) EXPECT_EQ(near.logits.get(r, c), far.logits.get(r, c));
}

}  // namespace
