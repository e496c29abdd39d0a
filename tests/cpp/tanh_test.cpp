#include "math/tanh.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cstdlib>

#include "unfused.hpp"
#include "values.hpp"

namespace unswag::test {
namespace {

template <class V>
class Tanh : public testing::Test {};
using Arithmetic = testing::Types<float, Unfused>;
TYPED_TEST_SUITE(Tanh, Arithmetic);

// Every 997th float, which are four million, and its negative.
TYPED_TEST(Tanh, IsOddAndRightToTwoUlp) {
  const auto tanh = [](float x) { return to_scalar(math::tanh(TypeParam(x))); };
  for (std::uint32_t bits = 0; bits <= 0x7F800000; bits += 997) {
    const float x = std::bit_cast<float>(bits), y = tanh(x);
    const long double truth = std::tanh(static_cast<long double>(x));
    ASSERT_LE(std::fabs(y - truth), 2 * ulp(DType::f32, truth)) << x;
    ASSERT_LE(y, 1) << x;
    ASSERT_EQ(tanh(-x), -y) << x;
  }
}

// The cross-entropy takes the largest z from the largest logit.  All floats with UNSWAG_EXHAUSTIVE; else runs of them, and
// those around the seam at 0.6.
TYPED_TEST(Tanh, DoesNotFall) {
  const auto check = [](std::uint32_t first, std::uint32_t last) {
    float before = 0;
    for (std::uint32_t bits = first; bits <= last; ++bits) {
      const float x = std::bit_cast<float>(bits), y = to_scalar(math::tanh(TypeParam(x)));
      ASSERT_GE(y, before) << x;
      before = y;
    }
  };
  if (std::getenv("UNSWAG_EXHAUSTIVE")) return check(0, 0x7F800000);
  for (std::uint32_t bits = 0; bits < 0x7F800000; bits += 0x20000) check(bits, bits + 127);
  const auto seam = std::bit_cast<std::uint32_t>(0.6f);
  check(seam - 0x8000, seam + 0x8000);
}

TYPED_TEST(Tanh, SpecialValues) {
  const auto tanh = [](float x) { return to_scalar(math::tanh(TypeParam(x))); };
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(tanh(inf), 1);
  EXPECT_EQ(tanh(-inf), -1);
  EXPECT_TRUE(std::isnan(tanh(std::nanf(""))));
  EXPECT_EQ(tanh(-0.f), 0);
  EXPECT_EQ(tanh(0.f), 0);
}

}  // namespace
}  // namespace unswag::test
