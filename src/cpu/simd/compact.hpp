// Elements that a mask names, moved together and apart again: sixteen bytes at a time where there is a shuffle of bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// How many elements of type I are moved at a time, with loads and stores of all of them.
template <class I>
constexpr int moved = 16 / sizeof(I);

// to[0], to[1], ... = those of from[0] ... that `mask` names.
template <class I>
UNSWAG_INLINE void move_together(I* to, const I* from, unsigned mask) {
  const __m128i order = _mm_loadu_si128((const __m128i*)shuffles<moved<I>>.together[mask]);
  _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), order));
}
// The reverse: 0 where `mask` names none.
template <class I>
UNSWAG_INLINE void move_apart(I* to, const I* from, unsigned mask) {
  const __m128i order = _mm_loadu_si128((const __m128i*)shuffles<moved<I>>.apart[mask]);
  _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), order));
}

#else

template <class I>
constexpr int moved = 8;

template <class I>
UNSWAG_INLINE void move_together(I* to, const I* from, unsigned mask) {
  for (int i = 0; i < 8; ++i) {
    *to = from[i];
    to += mask >> i & 1;
  }
}
template <class I>
UNSWAG_INLINE void move_apart(I* to, const I* from, unsigned mask) {
  for (int i = 0; i < 8; ++i) {
    to[i] = (mask >> i & 1) ? *from : I(0);
    from += mask >> i & 1;
  }
}

#endif

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
