#include <gtest/gtest.h>

#include "unswag/unswag.hpp"

namespace {

TEST(Version, HasThreeNumbers) { EXPECT_EQ(unswag::version(), "0.1.0"); }

}  // namespace
