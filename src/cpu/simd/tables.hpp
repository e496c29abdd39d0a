// Sixteen whole numbers below 16, and tables that they look up in: in registers, where there are shuffles for it.
//
//   twice_and(a, mask)      2 a + 1 where the mask, which a comparison has given, is true, else 2 a
//   store_bytes(p, a, b)    32 numbers, a byte each
//   load_fields<bits>(p)    sixteen fields from 2 bits bytes; what stands above them is not cleared
//   table<bits, S>(p)[a]    p[i] for the lowest `bits` bits i of each number
#pragma once

#include <cstring>

#include "cpu/fields.hpp"
#include "cpu/simd.hpp"

namespace unswag::UNSWAG_ISA_NS {

#if defined(__AVX512F__) && !defined(UNSWAG_ISA_PORTABLE)

struct whole16 {
  __m512i v;
  UNSWAG_INLINE whole16(__m512i x) : v(x) {}
  UNSWAG_INLINE whole16(int x) : v(_mm512_set1_epi32(x)) {}
};
UNSWAG_INLINE whole16 twice_and(whole16 a, mask16 m) {
  const __m512i doubled = _mm512_add_epi32(a.v, a.v);
  return _mm512_mask_sub_epi32(doubled, m.m, doubled, _mm512_set1_epi32(-1));
}
UNSWAG_INLINE void store_bytes(std::uint8_t* p, whole16 low, whole16 high) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(low.v));
  _mm_storeu_si128((__m128i*)(p + 16), _mm512_cvtepi32_epi8(high.v));
}
template <int bits>
UNSWAG_INLINE whole16 load_fields(const std::uint8_t* p) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::uint32_t low = 0, high = 0;
  if constexpr (bits <= 2) {
    memcpy(&low, p, 2 * bits);
    return _mm512_srlv_epi32(_mm512_set1_epi32(int(low)), _mm512_mullo_epi32(lane, _mm512_set1_epi32(bits)));
  } else {
    load_bytes<bits>(low, p), load_bytes<bits>(high, p + bits);
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(int(low)), 0xff00, int(high));
    const __m512i in_eight = _mm512_and_si512(lane, _mm512_set1_epi32(7));
    return _mm512_srlv_epi32(both, _mm512_mullo_epi32(in_eight, _mm512_set1_epi32(bits)));
  }
}

template <int bits, class S>
struct table {
  __m512 of;
  table() = default;
  UNSWAG_INLINE explicit table(const float* p) {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = p[i % (1 << bits)];
    of = _mm512_loadu_ps(all);
  }
  UNSWAG_INLINE f32x16 operator[](whole16 i) const { return _mm512_permutexvar_ps(i.v, of); }
};

#elif defined(__AVX2__) && !defined(UNSWAG_ISA_PORTABLE)

struct whole16 {
  __m256i low, high;
  UNSWAG_INLINE whole16(__m256i l, __m256i h) : low(l), high(h) {}
  UNSWAG_INLINE whole16(int x) : low(_mm256_set1_epi32(x)), high(low) {}
};
UNSWAG_INLINE whole16 twice_and(whole16 a, mask16 m) {
  return {_mm256_sub_epi32(_mm256_add_epi32(a.low, a.low), _mm256_castps_si256(m.low.m)),
          _mm256_sub_epi32(_mm256_add_epi32(a.high, a.high), _mm256_castps_si256(m.high.m))};
}
UNSWAG_INLINE void store_bytes(std::uint8_t* p, whole16 low, whole16 high) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(low.low, low.high), _mm256_packs_epi32(high.low, high.high));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
}
template <int bits>
UNSWAG_INLINE whole16 load_fields(const std::uint8_t* p) {
  const __m256i place = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits);
  std::uint32_t low = 0, high = 0;
  load_bytes<bits>(low, p), load_bytes<bits>(high, p + bits);
  return {_mm256_srlv_epi32(_mm256_set1_epi32(int(low)), place), _mm256_srlv_epi32(_mm256_set1_epi32(int(high)), place)};
}

template <int bits, class S>
struct table {
  __m256 first, second;  // of[0] to of[7], of[8] to of[15]
  table() = default;
  UNSWAG_INLINE explicit table(const float* p) {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = p[i % (1 << bits)];
    first = _mm256_loadu_ps(all), second = _mm256_loadu_ps(all + 8);
  }
  UNSWAG_INLINE f32x16 operator[](whole16 i) const { return {of(i.low), of(i.high)}; }

 private:
  UNSWAG_INLINE __m256 of(__m256i i) const {
    const __m256 found = _mm256_permutevar8x32_ps(first, i);
    if constexpr (bits <= 3) return found;
    const __m256 eight = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // the sign: whether i has its bit 3
    return _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(second, i), eight);
  }
};

#else

struct whole16 {
  std::uint8_t lane[16];
  UNSWAG_INLINE whole16(int x) { memset(lane, x, sizeof lane); }
};
template <class M>
UNSWAG_INLINE whole16 twice_and(whole16 a, M m) {
  const unsigned bits = m.bits();
  for (int i = 0; i < 16; ++i) a.lane[i] = std::uint8_t(2 * a.lane[i] + (bits >> i & 1));
  return a;
}
UNSWAG_INLINE void store_bytes(std::uint8_t* p, whole16 low, whole16 high) {
  memcpy(p, low.lane, 16), memcpy(p + 16, high.lane, 16);
}
template <int bits>
UNSWAG_INLINE whole16 load_fields(const std::uint8_t* p) {
  std::uint64_t fields = 0;
  memcpy(&fields, p, 2 * bits);
  whole16 a(0);
  for (int i = 0; i < 16; ++i) a.lane[i] = std::uint8_t(fields >> (bits * i));
  return a;
}

template <int bits, class S>
struct table {
  S of[1 << bits];
  table() = default;
  UNSWAG_INLINE explicit table(const S* p) { memcpy(of, p, sizeof of); }
  UNSWAG_INLINE lanes_t<S> operator[](whole16 i) const {
    S found[16];
    for (int k = 0; k < 16; ++k) found[k] = of[i.lane[k] % (1 << bits)];
    return lanes_t<S>::load(found);
  }
};

#endif

}  // namespace unswag::UNSWAG_ISA_NS
