// Packed fields of every width, bit by bit.
#include "math/fields.hpp"

#include <gtest/gtest.h>

#include <utility>

#include "packed.hpp"
#include "values.hpp"

namespace unswag::test {
namespace {

template <int bits>
void check(int count) {
  Random random(std::uint64_t(bits * 1000 + count));
  PackedRows packed(1, std::int64_t{count} * bits / 8);  // ends at a guard page
  std::vector<std::uint8_t> codes, again(std::size_t(count), 0xa5);
  for (int i = 0; i < count; ++i) codes.push_back(std::uint8_t(random.bits() % (1 << bits)));
  math::pack_fields<bits>(codes.data(), packed.row(0), count);
  for (std::int64_t i = 0; i < count; ++i)
    ASSERT_EQ(packed.field(0, i * bits, bits), codes[std::size_t(i)]) << bits << ", " << i;
  packed.read_only();
  math::unpack_fields<bits>(packed.row(0), again.data(), count);
  ASSERT_EQ(again, codes) << bits << " bits";
}

template <int... less_one>
void check_all(int count, std::integer_sequence<int, less_one...>) {
  (check<less_one + 1>(count), ...);
}

TEST(Fields, EveryWidthIsBitsOneAfterTheOther) {
  for (const int count : {8, 16, 24, 120, 1024}) check_all(count, std::make_integer_sequence<int, 8>());
}

TEST(Fields, OneOfMany) {
  EXPECT_EQ(math::field(0xfedcba98u, 2, 4), 0xau);
  EXPECT_EQ(math::field(std::uint64_t{5} << 42, 7, 6), 5u);
}

}  // namespace
}  // namespace unswag::test
