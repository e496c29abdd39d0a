#include "math/exp.hpp"

#include <gtest/gtest.h>

#include <bit>

#include "unfused.hpp"
#include "values.hpp"

namespace unswag::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// f(x) for about a million floats of [low, high], both ends among them.
template <class F>
void sweep(float low, float high, const F& f) {
  const auto bits = [](float x) {
    return std::int64_t(std::bit_cast<std::uint32_t>(std::fabs(x))) * (std::signbit(x) ? -1 : 1);
  };
  const std::int64_t first = bits(low), last = bits(high), step = (last - first) / 1000003 + 1;
  for (std::int64_t b = first; b <= last; b += step)
    f(std::copysign(std::bit_cast<float>(std::uint32_t(std::abs(b))), b < 0 ? -1.f : 1.f));
  f(high);
}

template <class V>
class Exp : public testing::Test {};
using Arithmetic = testing::Types<float, Unfused>;
TYPED_TEST_SUITE(Exp, Arithmetic);

template <class V>
void expect_near(V got, long double truth, double ulps, float x) {
  ASSERT_LE(std::fabs(to_scalar(got) - truth), ulps * ulp(DType::f32, truth)) << "e^" << x;
}

TYPED_TEST(Exp, IsRightToOneUlpSubnormalsToo) {
  using V = TypeParam;
  sweep(-104.5f, 88.72283f, [](float x) { expect_near(math::exp(V(x)), std::exp(static_cast<long double>(x)), 1, x); });
}

TYPED_TEST(Exp, BeyondTheRangeIsZeroOrInfinityAndNanStays) {
  using V = TypeParam;
  const auto exp = [](float x) { return to_scalar(math::exp(V(x))); };
  sweep(88.72284f, inf, [&](float x) { ASSERT_EQ(exp(x), inf) << x; });
  sweep(-inf, -103.98f, [&](float x) { ASSERT_EQ(exp(x), 0) << x; });
  EXPECT_TRUE(std::isnan(exp(std::nanf(""))));
  EXPECT_EQ(exp(0.f), 1);
  EXPECT_EQ(exp(-0.f), 1);
}

TYPED_TEST(Exp, NormalIsRightToOneUlp) {
  using V = TypeParam;
  sweep(-87.3365f, 88.3762f, [](float x) {
    const long double truth = std::exp(static_cast<long double>(x));
    expect_near(math::exp_normal(V(x)), truth, 1, x);
    // A tail of half a unit of x, which for large x is worth many units of e^x.
    const float tail = 0.49f * float(ulp(DType::f32, x));
    expect_near(math::exp_normal(V(x), V(-tail)), truth * std::exp(static_cast<long double>(-tail)), 1.25, x);
  });
}

// Without FMA the product n ln 2 is rounded too, which costs half a unit of x.
TYPED_TEST(Exp, ShortIsNearEnoughForPlainNumbers) {
  using V = TypeParam;
  sweep(-40.f, 40.f, [](float x) {
    const long double truth = std::exp(static_cast<long double>(x));
    const double ulps = std::is_same_v<V, float> ? 4 : 4 + std::fabs(x);
    expect_near(math::exp_short(V(x)), truth, ulps, x);
    expect_near(math::exp_short<-1>(V(x)), 1 / truth, ulps, x);
    expect_near(math::exp_short<-1, 2>(V(2 * x)), 1 / truth, ulps, x);
  });
}

TYPED_TEST(Exp, ScaledStaysNormalFarBelow) {
  using V = TypeParam;
  sweep(-217.9f, -0.f, [](float x) {
    const bool far = x < -100;
    const float tail = 0.49f * float(ulp(DType::f32, x));
    const long double truth = std::exp(static_cast<long double>(x) + tail);
    expect_near(math::exp_scaled(V(x), V(tail), far), std::ldexp(truth, far ? 192 : 64), 1.25, x);
  });
}

TEST(ExpDouble, ScaledIsE_xTimes2To64) {
  for (int i = 0; i < 540; ++i) {
    const double x = -0.37 * i;
    const long double truth = std::ldexp(std::exp(x + 1e-14L), 64);
    EXPECT_LE(std::fabs(math::exp_scaled(x, 1e-14, false) - truth), 2 * ulp(DType::f64, truth)) << x;
  }
}

}  // namespace
}  // namespace unswag::test
