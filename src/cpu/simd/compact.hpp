// Elements that a mask names, moved together and apart again, thirty-two at a time:
//
//     move_together(to, from, mask)   to[0], to[1], ... = those of from[0], ..., from[31]; writes within to[0], ..., to[31]
//     move_apart(from, mask)          the reverse, 0 where the mask names none; reads within from[0], ..., from[31]
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/elementwise.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

#if defined(__AVX2__) && !defined(UNSWAG_ISA_PORTABLE)

// For sixteen bytes of n elements: which byte goes where, for each mask of n bits.  What goes nowhere becomes 0.
template <int n>
struct Shuffles {
  std::uint8_t together[1 << n][16];
  std::uint8_t apart[1 << n][16];
};
template <int n>
constexpr Shuffles<n> make_shuffles() {
  Shuffles<n> s{};
  constexpr int width = 16 / n;
  for (int mask = 0; mask < 1 << n; ++mask) {
    for (int i = 0; i < 16; ++i) s.together[mask][i] = s.apart[mask][i] = 0x80;
    int to = 0;
    for (int i = 0; i < n; ++i) {
      if ((mask >> i & 1) == 0) continue;
      for (int b = 0; b < width; ++b) {
        s.together[mask][to * width + b] = std::uint8_t(i * width + b);
        s.apart[mask][i * width + b] = std::uint8_t(to * width + b);
      }
      ++to;
    }
  }
  return s;
}
template <int n>
constexpr Shuffles<n> shuffles = make_shuffles<n>();

template <class I>
UNSWAG_INLINE __m128i shuffle(const I* from, const std::uint8_t* order) {
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(order)));
}

template <class I>
UNSWAG_INLINE void move_together(I* to, const I* from, std::uint32_t mask) {
  constexpr int n = 16 / sizeof(I);
#pragma GCC unroll 8
  for (int i = 0; i < 32; i += n) {
    const unsigned named = mask >> i & ((1u << n) - 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), shuffle(from + i, shuffles<n>.together[named]));
    to += __builtin_popcount(named);
  }
}

// Two times sixteen bytes; moves `from` past what they took.
template <class I>
UNSWAG_INLINE __m256i spread(const I*& from, std::uint32_t mask) {
  constexpr int n = 16 / sizeof(I);
  const unsigned first = mask & ((1u << n) - 1), second = mask >> n & ((1u << n) - 1);
  const __m128i low = shuffle(from, shuffles<n>.apart[first]);
  from += __builtin_popcount(first);
  const __m128i high = shuffle(from, shuffles<n>.apart[second]);
  from += __builtin_popcount(second);
  return _mm256_set_m128i(high, low);
}

#ifdef __AVX512F__
UNSWAG_INLINE void move_together(std::int32_t* to, const std::int32_t* from, std::uint32_t mask) {
  const __mmask16 low = __mmask16(mask), high = __mmask16(mask >> 16);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(low, _mm512_loadu_si512(from)));
  _mm512_storeu_si512(to + __builtin_popcount(low), _mm512_maskz_compress_epi32(high, _mm512_loadu_si512(from + 16)));
}
UNSWAG_INLINE i32x32 move_apart(const std::int32_t* from, std::uint32_t mask) {
  const __mmask16 low = __mmask16(mask), high = __mmask16(mask >> 16);
  return {_mm512_maskz_expand_epi32(low, _mm512_loadu_si512(from)),
          _mm512_maskz_expand_epi32(high, _mm512_loadu_si512(from + __builtin_popcount(low)))};
}
#else
UNSWAG_INLINE i32x32 move_apart(const std::int32_t* from, std::uint32_t mask) {
  const __m256i a = spread(from, mask), b = spread(from, mask >> 8), c = spread(from, mask >> 16), d = spread(from, mask >> 24);
  return {{a, b}, {c, d}};
}
#endif

#ifdef __AVX512VBMI2__
UNSWAG_INLINE void move_together(std::int16_t* to, const std::int16_t* from, std::uint32_t mask) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(from)));
}
UNSWAG_INLINE i16x32 move_apart(const std::int16_t* from, std::uint32_t mask) {
  return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from));
}
#else
UNSWAG_INLINE i16x32 move_apart(const std::int16_t* from, std::uint32_t mask) {
  const __m256i low = spread(from, mask), high = spread(from, mask >> 16);
#ifdef __AVX512F__
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  return {low, high};
#endif
}
#endif

#else

template <class I>
UNSWAG_INLINE void move_together(I* to, const I* from, std::uint32_t mask) {
  for (int i = 0; i < 32; ++i) {
    *to = from[i];
    to += mask >> i & 1;
  }
}
template <class I>
UNSWAG_INLINE ints32_t<I> move_apart(const I* from, std::uint32_t mask) {
  I all[32];
  for (int i = 0; i < 32; ++i) {
    all[i] = (mask >> i & 1) ? *from : I(0);
    from += mask >> i & 1;
  }
  return ints32_t<I>::load(all);
}

#endif

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
