#include "math/tanh.hpp"

#include <gtest/gtest.h>

#include <bit>

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
