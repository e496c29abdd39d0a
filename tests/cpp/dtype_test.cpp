// Conversions between float and the 16-bit formats: the functions of src/math/dtype.hpp, and loads and stores of every row that
// runs here, seen through an RMSNorm whose rstd is 1.  What they must give is written from the formats (values.hpp).
#include "math/dtype.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <string>
#include <vector>

#include "matrix.hpp"

namespace unswag::test {
namespace {

constexpr DType narrow_dtypes[] = {DType::f16, DType::bf16};
constexpr float inf = std::numeric_limits<float>::infinity();

std::uint32_t infinity_bits(DType dtype) { return dtype == DType::f16 ? 0x7C00 : 0x7F80; }
long double value_of(DType dtype, std::uint64_t bits) { return read(dtype, &bits, 0); }  // little-endian

using Bits = std::vector<std::uint16_t>;
using Floats = std::vector<float>;

// A way to convert: the scalar functions, or a row.
struct Way {
  std::string name;
  std::function<Floats(DType, const Bits&)> widen;
  std::function<Bits(DType, const Floats&)> narrow;
};

template <class From, class To>
std::vector<To> multiply_by_one(const Kernels& k, DType from, const std::vector<From>& in, DType to) {
  std::vector<To> out(in.size());
  const auto n = std::int64_t(in.size());
  float one = 1;
  k.rms_norm_forward(
      {.x = {in.data(), from, 1, n, n}, .rstd_given = true, .y = {out.data(), to, 1, n, n}, .rstd = {&one, DType::f32, 1}}, {});
  return out;
}

std::vector<Way> ways() {
  std::vector<Way> all{{"scalar",
                        [](DType dtype, const Bits& in) {
                          Floats out;
                          for (const std::uint16_t b : in)
                            out.push_back(dtype == DType::f16 ? math::to_float(f16{b}) : math::to_float(bf16{b}));
                          return out;
                        },
                        [](DType dtype, const Floats& in) {
                          Bits out;
                          for (const float x : in)
                            out.push_back(dtype == DType::f16 ? math::from_float<f16>(x).bits : math::from_float<bf16>(x).bits);
                          return out;
                        }}};
  for (const Kernels* k : backends())
    all.push_back(
        {k->name, [k](DType dtype, const Bits& in) { return multiply_by_one<std::uint16_t, float>(*k, dtype, in, DType::f32); },
         [k](DType dtype, const Floats& in) { return multiply_by_one<float, std::uint16_t>(*k, DType::f32, in, dtype); }});
  return all;
}

Bits every_value() {
  Bits all(1 << 16);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = std::uint16_t(i);
  return all;
}

TEST(DType, EveryNarrowValueWidensExactlyAndComesBack) {
  const Bits all = every_value();
  for (const DType dtype : narrow_dtypes)
    for (const Way& way : ways()) {
      const Floats wide = way.widen(dtype, all);
      const Bits back = way.narrow(dtype, wide);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const long double truth = value_of(dtype, all[i]);
        ASSERT_EQ(std::signbit(wide[i]), bool(all[i] >> 15)) << way.name << ' ' << name_of(dtype) << ' ' << i;
        if (std::isnan(truth)) {
          const std::uint32_t quiet = infinity_bits(dtype) | (dtype == DType::f16 ? 0x200 : 0x40);
          ASSERT_TRUE(std::isnan(wide[i])) << way.name << ' ' << name_of(dtype) << ' ' << i;
          ASSERT_EQ(back[i], all[i] | quiet) << way.name << ' ' << name_of(dtype);  // its payload is kept
        } else {
          ASSERT_EQ(wide[i], truth) << way.name << ' ' << name_of(dtype) << ' ' << i;
          ASSERT_EQ(back[i], all[i]) << way.name << ' ' << name_of(dtype);
        }
      }
    }
}

// Between each two neighbours of a format, and after the last: the middle goes to the even one, what is beside it to the
// nearer.
TEST(DType, NarrowingRoundsToNearestEvenAtEveryBorder) {
  for (const DType dtype : narrow_dtypes) {
    Floats x;
    Bits expected;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      for (std::uint32_t low = 0; low < infinity_bits(dtype); ++low) {
        const std::uint32_t high = low + 1;
        const long double below = value_of(dtype, low);
        const long double above = high == infinity_bits(dtype) ? below + ulp(dtype, below) : value_of(dtype, high);
        const float middle = float((below + above) / 2);
        ASSERT_EQ(middle, (below + above) / 2);
        for (const auto& [v, bits] : {std::pair{std::nextafter(middle, 0.f), low},
                                      {middle, low % 2 == 0 ? low : high},
                                      {std::nextafter(middle, inf), high}}) {
          x.push_back(sign ? -v : v);
          expected.push_back(std::uint16_t(sign | bits));
        }
      }
    }
    for (const Way& way : ways()) {
      const Bits got = way.narrow(dtype, x);
      for (std::size_t i = 0; i < x.size(); ++i)
        ASSERT_EQ(got[i], expected[i]) << way.name << ' ' << name_of(dtype) << ' ' << x[i];
    }
  }
}

TEST(DType, FloatsAllOverRoundAsTheFormatsSay) {
  Floats x;
  for (std::uint64_t bits = 5; bits < std::uint64_t{1} << 32; bits += 9973)
    x.push_back(std::bit_cast<float>(std::uint32_t(bits)));
  x.insert(x.end(), {inf, -inf, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(), -0.f});
  for (const DType dtype : narrow_dtypes) {
    for (const Way& way : ways()) {
      const Bits got = way.narrow(dtype, x);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const long double truth = rounded(dtype, x[i]), y = value_of(dtype, got[i]);
        ASSERT_TRUE(std::isnan(truth) ? std::isnan(y) : y == truth) << way.name << ' ' << name_of(dtype) << ' ' << x[i];
        ASSERT_EQ(got[i] >> 15, std::bit_cast<std::uint32_t>(x[i]) >> 31) << way.name << ' ' << name_of(dtype) << ' ' << x[i];
      }
    }
  }
}

// One in each place of a register: instructions that convert to bf16 take it for 0.
TEST(DType, ASubnormalAmongNormalNumbersIsKept) {
  for (const DType dtype : narrow_dtypes)
    for (const Way& way : ways())
      for (std::size_t place = 0; place < 64; ++place) {
        Bits bits(64, std::uint16_t(infinity_bits(dtype) / 2));
        bits[place] = 3;
        ASSERT_EQ(way.narrow(dtype, way.widen(dtype, bits)), bits) << way.name << ' ' << name_of(dtype) << ' ' << place;
      }
}

// A double beside the middle of two neighbours: its float is the middle, and would be rounded a second time, to even.
TEST(DType, ADoubleOnItsWayToSixteenBitsRoundsOnce) {
  const auto infinity = double(inf);
  for (const DType dtype : narrow_dtypes) {
    const auto narrow = [&](double x) -> std::uint32_t {
      const float odd = math::to_odd(x);
      return dtype == DType::f16 ? math::from_float<f16>(odd).bits : math::from_float<bf16>(odd).bits;
    };
    for (std::uint32_t low = 0; low < infinity_bits(dtype); ++low) {
      const long double below = value_of(dtype, low);
      const double middle =
          double(below + (low + 1 == infinity_bits(dtype) ? below + ulp(dtype, below) : value_of(dtype, low + 1))) / 2;
      for (const double sign : {1.0, -1.0}) {
        const std::uint32_t bit = sign < 0 ? 0x8000 : 0;
        ASSERT_EQ(narrow(sign * std::nextafter(middle, 0.0)), bit | low) << name_of(dtype) << ' ' << middle;
        ASSERT_EQ(narrow(sign * middle), bit | (low + low % 2)) << name_of(dtype) << ' ' << middle;
        ASSERT_EQ(narrow(sign * std::nextafter(middle, infinity)), bit | (low + 1)) << name_of(dtype) << ' ' << middle;
      }
    }
    for (const double x : {1e300, 1e-320, 0.0, infinity}) {
      EXPECT_EQ(narrow(x), x < 1 ? 0 : infinity_bits(dtype)) << name_of(dtype) << ' ' << x;
      EXPECT_EQ(narrow(-x), 0x8000 | (x < 1 ? 0 : infinity_bits(dtype))) << name_of(dtype) << ' ' << -x;
    }
    EXPECT_GT(narrow(std::nan("")) & 0x7FFF, infinity_bits(dtype));
  }
}

// Cut to float, and odd where something was cut off.
TEST(DType, ToOddKeepsWhatItCutOff) {
  Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const double x = random.normal() * std::ldexp(1.0, int(random.bits() % 260) - 140);
    const float odd = math::to_odd(x);
    if (odd == x) continue;
    ASSERT_EQ(std::bit_cast<std::uint32_t>(odd) & 1, 1u) << x;
    ASSERT_LT(std::fabs(odd - x), double(ulp(DType::f32, x))) << x;
  }
  EXPECT_EQ(math::to_odd(0.1f), 0.1f);
}

TEST(DType, VisitNamesTheTypeOfADtype) {
  for (const DType dtype : all_dtypes) {
    int visits = 0;
    math::visit(dtype, [&](auto tag) {
      using T = typename decltype(tag)::of;
      ++visits;
      EXPECT_EQ(std::int64_t(sizeof(T)), size_of(dtype));
      EXPECT_EQ((std::is_same_v<T, bf16>), dtype == DType::bf16);
    });
    EXPECT_EQ(visits, 1);
  }
}

}  // namespace
}  // namespace unswag::test
