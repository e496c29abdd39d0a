// Block codecs: a block of n numbers as n codes of a few bits and one scale (docs/format.md section 9).
//
// Up to sixteen blocks lie side by side in a row: element i of a group of 16 n belongs to block i % 16, as its number i / 16,
// so that sixteen lanes work on sixteen blocks and nothing crosses between lanes.  Every step is one rounded operation, in one
// order, so that all backends write the same bytes.
#pragma once

#include <utility>

#include "math/philox.hpp"
#include "math/scalar.hpp"
#include "unswag/unswag.hpp"

namespace unswag::math {

inline constexpr int block_lanes = 16;

// A codec of the list (include/unswag/lists.hpp).
template <Block Codec>
struct BlockOf {
  static constexpr int n = listed(Codec).n, bits = listed(Codec).bits, bytes = listed(Codec).bytes();
  static constexpr bool rotated = listed(Codec).rotated;
  static_assert(8 <= n && n <= 512 && (n & (n - 1)) == 0, "a block has a power of two of numbers, from 8 to 512");
  static_assert(rotated ? 2 <= bits && bits <= 8 : bits == 8, "a whole number has 2 to 8 bits, a float 8");
};
// The whole-number codecs: q in [low, low + 2^bits - 1] from code = q - low (int2: q = 2 code - 3).
template <class B>
inline constexpr float lowest_whole = -float(1 << (B::bits - 1));
// The 8-bit floats, as in Micikevicius et al. 2022: no infinities in e4m3.
template <class B>
struct Fp8;
template <>
struct Fp8<BlockOf<Block::e4m3>> {
  static constexpr int mantissa = 3, bias = 7, largest_code = 0x7e;
  static constexpr float largest = 448.f;
};
template <>
struct Fp8<BlockOf<Block::e5m2>> {
  static constexpr int mantissa = 2, bias = 15, largest_code = 0x7b;
  static constexpr float largest = 57344.f;
};

// f(BlockOf<codec>{}) for the one that is asked for.
template <class F, std::size_t... I>
UNSWAG_HOST inline void visit_blocks(Block codec, const F& f, std::index_sequence<I...>) {
  ((codec == Block(I) ? f(BlockOf<Block(I)>{}) : void()), ...);
}
template <class F>
UNSWAG_HOST inline void visit_blocks(Block codec, const F& f) {
  visit_blocks(codec, f, std::make_index_sequence<blocks.size()>());
}

// A row of `cols` numbers: whole groups of 16 n, and a last one of fewer blocks, as many as its numbers need.
template <class B>
struct BlockRow {
  static constexpr std::int64_t group = std::int64_t{B::n} * block_lanes;
  std::int64_t cols;
  UNSWAG_HD constexpr std::int64_t blocks() const { return (cols + B::n - 1) / B::n; }
  UNSWAG_HD constexpr std::int64_t bytes() const { return (blocks() * B::bytes + 3) / 4 * 4; }  // block_row_bytes
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

// Element e of a group of so many blocks stands here in n sixteens.
UNSWAG_HD constexpr int block_place(int e, int blocks) {
  return blocks == block_lanes ? e : e / blocks * block_lanes + e % blocks;
}

// One step of the Walsh-Hadamard transform H, entries +-1, of n numbers in natural order: pairs i, i + half for half = 1, 2, 4,
// ..., n / 2.  H H = n, so H / n takes it back.  It spreads what is large in one number over the block.
template <class V>
UNSWAG_HD inline void butterfly(V& a, V& b) {
  const V sum = a + b, difference = a - b;
  a = sum, b = difference;
}

// x + whole_rest is x rounded to a whole number, to nearest even, and whole_rest more, for |x| < 2^22: where it lies, floats
// are whole numbers.
inline constexpr float whole_rest = 12582912.f;  // 1.5 2^23

template <class V>
UNSWAG_HD inline V floor_whole(V x) {
  const V near = (x + V(whole_rest)) - V(whole_rest);
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
// Without a branch, so that compilers make lanes of a loop of it.
template <class B>
UNSWAG_HD inline BlockScale block_scale(float of, float first, bool stochastic) {
  constexpr float huge = 3.402823466e+38f, least = 0x1p-100f;  // whose inverse is a normal number, too
  const bool finite = (::fabsf(first) <= huge) & (::fabsf(of) <= huge);
  float scale;
  if constexpr (!B::rotated) {
    scale = ::fabsf(of) / Fp8<B>::largest;
  } else if constexpr (scale_of_squares<B>) {
    scale = stochastic ? ::fabsf(of) / 3.f : 0.498f * ::sqrtf(of / float(B::n));
  } else {
    constexpr float low = lowest_whole<B>;
    scale = stochastic ? ::fabsf(of) / (-low - 1.f) : of / low;
  }
  const float enough = ::fabsf(scale) < least ? (scale < 0 ? -least : least) : scale;
  const std::uint32_t up = (bit_cast<std::uint32_t>(enough) + 0xffff) & 0xffff0000;
  const float inverse = 1.f / bit_cast<float>(up);
  const bool some = scale != 0;
  return {std::uint16_t(finite ? (some ? up >> 16 : 0) : 0x7fc0), finite & some ? inverse : 0.f};
}

// The code of t, and whole_rest more, so that it is the lowest byte.  u: stochastic rounding with a number of (0, 1), else
// nearest.  No code is below 0: |t inverse| is at most -lowest_whole and two roundings.
template <class B, class V, class... U>
UNSWAG_HD inline V block_code_and_rest(V t, V inverse, U... u) {
  const V v = t * inverse;
  if constexpr (B::bits == 2) {  // q = 2 code - 3
    if constexpr (sizeof...(U) == 0) {
      return select(v > V(2.f), V(whole_rest + 3.f),
                    select(v > V(0.f), V(whole_rest + 2.f), select(v > V(-2.f), V(whole_rest + 1.f), V(whole_rest))));
    } else {
      return max(min(floor_whole((v + V(3.f)) * V(0.5f) + (u, ...)), V(3.f)), V(0.f)) + V(whole_rest);
    }
  } else {
    constexpr float low = lowest_whole<B>;
    const V largest(whole_rest - 2.f * low - 1.f);
    if constexpr (sizeof...(U) == 0) {
      return min(v + V(whole_rest - low), largest);
    } else {
      return min(floor_whole(v + (u, ...)) + V(whole_rest - low), largest);
    }
  }
}
template <class B, class V, class... U>
UNSWAG_HD inline V block_code(V t, V inverse, U... u) {
  return block_code_and_rest<B>(t, inverse, u...) - V(whole_rest);
}
// q of a code, as a float or as a whole number of 16 bits, in which H q has room.
template <class B, class V>
UNSWAG_HD inline V block_whole(V code) {
  static_assert(B::n * -lowest_whole<B> < 32768.f);
  using S = scalar_t<V>;
  return B::bits == 2 ? code + code - V(S(3)) : code + V(S(lowest_whole<B>));
}
// What H q is multiplied by.
template <class B>
UNSWAG_HD inline float block_factor(std::uint16_t scale) {
  return bit_cast<float>(std::uint32_t{scale} << 16) * (B::rotated ? 1.f / float(B::n) : 1.f);
}

// x as an 8-bit float: to nearest even, what is too large to the largest, NaN to 0.
template <class B>
UNSWAG_HD inline std::uint8_t fp8_code(float x) {
  using F = Fp8<B>;
  constexpr int shift = 23 - F::mantissa;
  constexpr float least_normal = F::bias == 7 ? 0x1p-6f : 0x1p-14f;
  constexpr float magic = F::bias == 7 ? 0x1p14f : 0x1p7f;  // its unit in the last place is that of the subnormals
  const std::uint32_t sign = bit_cast<std::uint32_t>(x) >> 24 & 0x80, u = bit_cast<std::uint32_t>(x) & 0x7fffffff;
  const float magnitude = bit_cast<float>(u);
  if (x != x) return 0;
  std::uint32_t code;
  if (!(magnitude < F::largest)) {
    code = F::largest_code;
  } else if (magnitude < least_normal) {
    code = bit_cast<std::uint32_t>(magnitude + magic) - bit_cast<std::uint32_t>(magic);
  } else {
    code = (u + ((1u << (shift - 1)) - 1) + (u >> shift & 1)) >> shift;
    code -= std::uint32_t(127 - F::bias) << F::mantissa;
  }
  return std::uint8_t(sign | code);
}
template <class B>
UNSWAG_HD inline float fp8_value(std::uint8_t code) {
  using F = Fp8<B>;
  constexpr int shift = 23 - F::mantissa;
  constexpr float unit = F::bias == 7 ? 0x1p-9f : 0x1p-16f;
  const std::uint32_t magnitude = code & 0x7f;
  const float value = magnitude >> F::mantissa ? bit_cast<float>((magnitude << shift) + (std::uint32_t(127 - F::bias) << 23))
                                               : float(magnitude) * unit;
  return code & 0x80 ? -value : value;
}

}  // namespace unswag::math
