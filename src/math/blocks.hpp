// Block codecs: a block of n numbers as n codes of a few bits and one scale (docs/format.md section 9).
//
// Up to sixteen blocks lie side by side in a row: element i of a group of 16 n belongs to block i % 16, as its number i / 16,
// so that sixteen lanes work on sixteen blocks and nothing crosses between lanes.  Every step is one rounded operation, in one
// order, so that all backends write the same bytes.
#pragma once

#include "math/philox.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

inline constexpr int block_lanes = 16;

// The whole-number codecs: q in [low, low + 2^bits - 1] from code = q - low (int2: q = 2 code - 3).
template <int N, int Bits>
struct IntBlocks {
  static constexpr int n = N, bits = Bits;
  static constexpr bool rotated = true;
  static constexpr float low = -float(1 << (Bits - 1)), codes = float((1 << Bits) - 1);
};
struct Int8Blocks : IntBlocks<32, 8> {};
struct Int4Blocks : IntBlocks<16, 4> {};
struct Int2Blocks : IntBlocks<64, 2> {};
// Eight-bit floats, as in Micikevicius et al. 2022: no infinities in e4m3.
template <int Mantissa, int Bias, int Largest>
struct Fp8Blocks {
  static constexpr int n = 32, bits = 8, mantissa = Mantissa, bias = Bias, largest_code = Largest;
  static constexpr bool rotated = false;
  static constexpr float largest = Mantissa == 3 ? 448.f : 57344.f;
};
struct E4m3Blocks : Fp8Blocks<3, 7, 0x7e> {};
struct E5m2Blocks : Fp8Blocks<2, 15, 0x7b> {};

template <class F>
UNSWAG_HOST inline void visit_blocks(Block codec, const F& f) {
  switch (codec) {
    case Block::int8: return f(Int8Blocks{});
    case Block::int4: return f(Int4Blocks{});
    case Block::int2: return f(Int2Blocks{});
    case Block::e4m3: return f(E4m3Blocks{});
    case Block::e5m2: return f(E5m2Blocks{});
  }
}

// A row of `cols` numbers: whole groups of 16 n, and a last one of fewer blocks, as many as its numbers need.
template <class B>
struct BlockRow {
  static constexpr std::int64_t group = std::int64_t{B::n} * block_lanes;
  std::int64_t cols;
  UNSWAG_HD constexpr std::int64_t blocks() const { return (cols + B::n - 1) / B::n; }
  UNSWAG_HD constexpr std::int64_t groups() const { return (cols + group - 1) / group; }
  UNSWAG_HD constexpr int lanes(std::int64_t g) const {
    const std::int64_t left = blocks() - g * block_lanes;
    return left < block_lanes ? int(left) : block_lanes;
  }
  UNSWAG_HD constexpr int elements(std::int64_t g) const { return int(cols - g * group < group ? cols - g * group : group); }
  UNSWAG_HD constexpr std::int64_t code_byte(std::int64_t g) const { return g * group * B::bits / 8; }
  UNSWAG_HD constexpr std::int64_t scale_byte(std::int64_t g) const {
    return blocks() * B::n * B::bits / 8 + g * block_lanes * 2;
  }
};

// One step of the Walsh-Hadamard transform H, entries +-1, of n numbers in natural order: pairs i, i + half for half = 1, 2, 4,
// ..., n / 2.  H H = n, so H / n takes it back.  It spreads what is large in one number over the block.
template <class V>
UNSWAG_HD inline void butterfly(V& a, V& b) {
  const V sum = a + b, difference = a - b;
  a = sum, b = difference;
}

template <class V>
UNSWAG_HD inline V round_whole(V x) {  // to nearest even, |x| < 2^22
  const V magic(12582912.f);
  return (x + magic) - magic;
}
template <class V>
UNSWAG_HD inline V floor_whole(V x) {
  const V near = round_whole(x);
  return select(near > x, near - V(1.f), near);
}

// What a scale is made of: of the whole-number codecs the t of largest magnitude, the first of several, with its sign; int2,
// unless rounded stochastically, takes the sum of squares.
template <class B>
inline constexpr bool scale_of_squares = B::bits == 2;

struct BlockScale {
  std::uint16_t bits;  // bfloat16, its magnitude rounded up
  float inverse;       // 1 / scale, 0 for a scale that is 0 or NaN
};

// `of` is what the scale is made of; first: t[0], the sum of the block (of fp8: a sum of 0 x), by which NaN and infinity show.
template <class B>
UNSWAG_HD inline BlockScale block_scale(float of, float first, bool stochastic) {
  constexpr float huge = 3.402823466e+38f;
  if (!(::fabsf(first) <= huge) || !(::fabsf(of) <= huge)) return {0x7fc0, 0.f};
  float scale;
  if constexpr (!B::rotated) {
    scale = ::fabsf(of) / B::largest;
  } else if constexpr (scale_of_squares<B>) {
    scale = stochastic ? ::fabsf(of) / 3.f : 0.498f * ::sqrtf(of / float(B::n));
  } else {
    scale = stochastic ? ::fabsf(of) / (-B::low - 1.f) : of / B::low;
  }
  if (scale == 0) return {0, 0.f};
  if (::fabsf(scale) < 0x1p-100f) scale = scale < 0 ? -0x1p-100f : 0x1p-100f;  // whose inverse is a normal number, too
  const std::uint32_t up = (bit_cast<std::uint32_t>(scale) + 0xffff) & 0xffff0000;
  return {std::uint16_t(up >> 16), 1.f / bit_cast<float>(up)};
}

// The code of t.  u: stochastic rounding with a number of (0, 1), else nearest.
template <class B, class V, class... U>
UNSWAG_HD inline V block_code(V t, V inverse, U... u) {
  const V v = t * inverse;
  if constexpr (B::bits == 2) {  // q = 2 code - 3
    if constexpr (sizeof...(U) == 0) {
      return select(v > V(2.f), V(3.f), select(v > V(0.f), V(2.f), select(v > V(-2.f), V(1.f), V(0.f))));
    } else {
      return max(min(floor_whole((v + V(3.f)) * V(0.5f) + (u, ...)), V(3.f)), V(0.f));
    }
  } else {
    const V high(B::low + B::codes);
    if constexpr (sizeof...(U) == 0) {
      return max(min(round_whole(v), high), V(B::low)) - V(B::low);
    } else {
      return max(min(floor_whole(v + (u, ...)), high), V(B::low)) - V(B::low);
    }
  }
}
// q of a code.
template <class B, class V>
UNSWAG_HD inline V block_whole(V code) {
  return B::bits == 2 ? code + code - V(3.f) : code + V(B::low);
}
// What H q is multiplied by.
template <class B>
UNSWAG_HD inline float block_factor(std::uint16_t scale) {
  return bit_cast<float>(std::uint32_t{scale} << 16) * (B::rotated ? 1.f / float(B::n) : 1.f);
}

// x as an 8-bit float: to nearest even, what is too large to the largest, NaN to 0.
template <class B>
UNSWAG_HD inline std::uint8_t fp8_code(float x) {
  constexpr int shift = 23 - B::mantissa;
  constexpr float least_normal = B::bias == 7 ? 0x1p-6f : 0x1p-14f;
  constexpr float magic = B::bias == 7 ? 0x1p14f : 0x1p7f;  // its unit in the last place is that of the subnormals
  const std::uint32_t sign = bit_cast<std::uint32_t>(x) >> 24 & 0x80, u = bit_cast<std::uint32_t>(x) & 0x7fffffff;
  const float magnitude = bit_cast<float>(u);
  if (x != x) return 0;
  std::uint32_t code;
  if (!(magnitude < B::largest)) {
    code = B::largest_code;
  } else if (magnitude < least_normal) {
    code = bit_cast<std::uint32_t>(magnitude + magic) - bit_cast<std::uint32_t>(magic);
  } else {
    code = (u + ((1u << (shift - 1)) - 1) + (u >> shift & 1)) >> shift;
    code -= std::uint32_t(127 - B::bias) << B::mantissa;
  }
  return std::uint8_t(sign | code);
}
template <class B>
UNSWAG_HD inline float fp8_value(std::uint8_t code) {
  constexpr int shift = 23 - B::mantissa;
  constexpr float unit = B::bias == 7 ? 0x1p-9f : 0x1p-16f;
  const std::uint32_t magnitude = code & 0x7f;
  const float value = magnitude >> B::mantissa ? bit_cast<float>((magnitude << shift) + (std::uint32_t(127 - B::bias) << 23))
                                               : float(magnitude) * unit;
  return code & 0x80 ? -value : value;
}

}  // namespace unswag::math
