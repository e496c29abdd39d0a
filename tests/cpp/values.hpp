// Numbers of every dtype as long double, and the rounding of long double to them: the tests' own, written from the formats
// (IEEE 754 binary16/32/64 and bfloat16) and not from the library.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "unswag/tensor.hpp"

namespace unswag::test {

// The values of a list of unswag/lists.hpp, in its order; those of them for which `which` holds.
template <class Enum, class Which>
std::vector<Enum> every(const Which& which) {
  std::vector<Enum> values;
  for (const auto& entry : list_of(Enum{}))
    if (which(entry.value)) values.push_back(entry.value);
  return values;
}
template <class Enum>
std::vector<Enum> every() {
  return every<Enum>([](Enum) { return true; });
}
template <class Enum>
std::string name_of(Enum value) {
  return std::string(listed(value).name);
}

inline constexpr auto all_dtypes = [] {
  std::array<DType, dtypes.size()> all{};
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = dtypes[i].value;
  return all;
}();
// All but float64, which the portable row alone has.
inline constexpr auto float_dtypes = [] {
  std::array<DType, dtypes.size() - 1> floats{};
  std::size_t n = 0;
  for (const DType dtype : all_dtypes)
    if (dtype != DType::f64) floats[n++] = dtype;
  return floats;
}();

struct Format {
  int bytes, digits, min_exponent;  // of the significand, hidden bit included; of the smallest normal number
  long double largest;
};
inline Format format(DType dtype) {
  switch (dtype) {
    case DType::f16: return {2, 11, -14, 65504.0L};
    case DType::bf16: return {2, 8, -126, std::ldexp(255.0L, 120)};
    case DType::f32: return {4, 24, -126, std::numeric_limits<float>::max()};
    case DType::f64: return {8, 53, -1022, std::numeric_limits<double>::max()};
  }
  return {};
}
inline std::int64_t size_of(DType dtype) { return format(dtype).bytes; }

// The distance between neighbours of the format at x.
inline long double ulp(DType dtype, long double x) {
  const Format f = format(dtype);
  if (x == 0 || !std::isfinite(x)) return std::ldexp(1.0L, f.min_exponent - f.digits + 1);
  return std::ldexp(1.0L, std::max(std::ilogb(x), f.min_exponent) - f.digits + 1);
}

// x rounded to the format, to nearest, ties to even.
inline long double rounded(DType dtype, long double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const long double unit = ulp(dtype, x);
  const long double r = std::nearbyint(x / unit) * unit;  // exact: unit is a power of two
  return std::fabs(r) > format(dtype).largest ? std::copysign(std::numeric_limits<long double>::infinity(), x) : r;
}

// a b rounded once to the format.  Long double holds the product of two floats, but not that of two doubles.
inline long double product(DType dtype, long double a, long double b) {
  return dtype == DType::f64 ? double(a) * double(b) : rounded(dtype, a * b);
}

inline long double read(DType dtype, const void* data, std::int64_t i) {
  const char* p = static_cast<const char*>(data) + i * size_of(dtype);
  if (dtype == DType::f64) {
    double v;
    return std::memcpy(&v, p, 8), v;
  }
  std::uint32_t bits = 0;
  std::memcpy(&bits, p, std::size_t(size_of(dtype)));
  if (dtype == DType::f16) {
    const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
    const long double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31)
      return fraction ? std::numeric_limits<long double>::quiet_NaN() : sign * std::numeric_limits<long double>::infinity();
    return sign *
           (exponent ? std::ldexp((long double)(1024 + fraction), exponent - 25) : std::ldexp((long double)fraction, -24));
  }
  if (dtype == DType::bf16) bits <<= 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline void write(DType dtype, void* data, std::int64_t i, long double x) {
  char* p = static_cast<char*>(data) + i * size_of(dtype);
  x = rounded(dtype, x);
  if (dtype == DType::f64) {
    const double v = double(x);
    std::memcpy(p, &v, 8);
    return;
  }
  const float v = float(x);  // exact, every narrower format is part of binary32
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (dtype == DType::bf16) bits >>= 16;
  if (dtype == DType::f16) {
    const std::uint32_t sign = bits >> 16 & 0x8000;
    if (std::isnan(v))
      bits = sign | 0x7E00;
    else if (std::isinf(v))
      bits = sign | 0x7C00;
    else if (std::fabs(v) < 0x1p-14f)
      bits = sign | std::uint32_t(std::fabs(v) * 0x1p24f);
    else
      bits = sign | ((bits & 0x7FFFFFFF) - (112u << 23)) >> 13;
  }
  std::memcpy(p, &bits, std::size_t(size_of(dtype)));
}

// Numbers that look random, the same in every run and on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::uint64_t bits() {  // splitmix64
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }

 private:
  std::uint64_t state_;
};

}  // namespace unswag::test
