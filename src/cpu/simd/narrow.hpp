// Sixteen lanes of 16-bit whole numbers, and what block codecs do between bytes, whole numbers and floats.
//
//   i16x16::load(p)  v.store(p)  + -    p to 16-bit numbers, or load from bytes; sums wrap
//   Scale<T>(factors).store(p, v)       p[i] = v[i] factors[i]; a factor that is NaN is one that bf16 has
//   load_numbers<R>(p)                  R::load(p)
//   store_low_bytes(p, a, b)            the lowest eight bits of 32 floats, as they stand in memory
//   butterfly(a, b)                     as in math/blocks.hpp
//   registers_at_once                   how many registers a kernel fills, so that some are left
#pragma once

#include <type_traits>

#include "cpu/simd.hpp"
#include "math/blocks.hpp"

namespace unswag::UNSWAG_ISA_NS {

using math::butterfly;

#if defined(__AVX2__) && !defined(UNSWAG_ISA_PORTABLE)

struct i16x16 {
  using scalar = std::int16_t;
  __m256i v;
  i16x16() = default;
  UNSWAG_INLINE i16x16(__m256i x) : v(x) {}
  UNSWAG_INLINE i16x16(std::int16_t x) : v(_mm256_set1_epi16(x)) {}
  UNSWAG_INLINE static i16x16 load(const std::int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  UNSWAG_INLINE static i16x16 load(const std::uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  UNSWAG_INLINE void store(std::int16_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  UNSWAG_INLINE friend i16x16 operator+(i16x16 a, i16x16 b) { return _mm256_add_epi16(a.v, b.v); }
  UNSWAG_INLINE friend i16x16 operator-(i16x16 a, i16x16 b) { return _mm256_sub_epi16(a.v, b.v); }
};

#else

struct i16x16 {
  using scalar = std::int16_t;
  std::int16_t lane[16];
  i16x16() = default;
  UNSWAG_INLINE i16x16(std::int16_t x) {
    for (std::int16_t& l : lane) l = x;
  }
  template <class T>
  UNSWAG_INLINE static i16x16 load(const T* p) {
    i16x16 a;
    for (int i = 0; i < 16; ++i) a.lane[i] = p[i];
    return a;
  }
  UNSWAG_INLINE void store(std::int16_t* p) const { memcpy(p, lane, sizeof lane); }
  UNSWAG_INLINE friend i16x16 operator+(i16x16 a, i16x16 b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = std::int16_t(a.lane[i] + b.lane[i]);
    return a;
  }
  UNSWAG_INLINE friend i16x16 operator-(i16x16 a, i16x16 b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = std::int16_t(a.lane[i] - b.lane[i]);
    return a;
  }
};

#endif

#if defined(__AVX512F__) && !defined(UNSWAG_ISA_PORTABLE)

constexpr int registers_at_once = 16;

// Zen adds and multiplies in different units: b times -1 is exact, so the difference is rounded once as well.
UNSWAG_INLINE void butterfly(f32x16& a, f32x16& b) {
  const f32x16 sum = a + b;
  b = fma(b, f32x16(-1.f), a), a = sum;
}
template <class R, class T>
UNSWAG_INLINE R load_numbers(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {  // one shuffle, in which each number gets its lower half, instead of two steps
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i numbers = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    return R(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_slli_epi32(lane, 16), numbers)));
  } else {
    return R::load(p);
  }
}
UNSWAG_INLINE void store_low_bytes(std::uint8_t* p, f32x16 a, f32x16 b) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v)));
  _mm_storeu_si128((__m128i*)(p + 16), _mm512_cvtepi32_epi8(_mm512_castps_si512(b.v)));
}
UNSWAG_INLINE f32x16 to_floats(i16x16 a) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(a.v)); }

#elif defined(__AVX2__) && !defined(UNSWAG_ISA_PORTABLE)

constexpr int registers_at_once = 8;

UNSWAG_INLINE void butterfly(f32x8& a, f32x8& b) {
  const f32x8 sum = a + b;
  b = fma(b, f32x8(-1.f), a), a = sum;
}
template <class R, class T>
UNSWAG_INLINE R load_numbers(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i order = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                           -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return R(_mm256_castsi256_ps(_mm256_shuffle_epi8(twice, order)));
  } else {
    return R::load(p);
  }
}
UNSWAG_INLINE void store_low_bytes(std::uint8_t* p, f32x16 a, f32x16 b) {
  const auto byte = [](f32x8 x) __attribute__((always_inline)) {
    return _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(255));
  };
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packus_epi32(byte(a.low), byte(a.high)), _mm256_packus_epi32(byte(b.low), byte(b.high)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
}
UNSWAG_INLINE f32x16 to_floats(i16x16 a) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a.v))),
          _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(a.v, 1)))};
}

#else

constexpr int registers_at_once = 8;

template <class R, class T>
UNSWAG_INLINE R load_numbers(const T* p) {
  return R::load(p);
}
UNSWAG_INLINE void store_low_bytes(std::uint8_t* p, f32x16 a, f32x16 b) {
  float all[32];
  std::uint32_t bits[32];
  a.store(all), b.store(all + 16);
  memcpy(bits, all, sizeof bits);
  for (int i = 0; i < 32; ++i) p[i] = std::uint8_t(bits[i]);
}
UNSWAG_INLINE f32x16 to_floats(i16x16 a) {
  float all[16];
  for (int i = 0; i < 16; ++i) all[i] = a.lane[i];
  return f32x16::load(all);
}

#endif

template <class T>
struct Scale {
  f32x16 factor;
  UNSWAG_INLINE explicit Scale(const float* factors) : factor(f32x16::load(factors)) {}
  UNSWAG_INLINE void store(T* p, i16x16 v) const { (to_floats(v) * factor).store(p); }
};
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(UNSWAG_ISA_PORTABLE)
template <>
struct Scale<bf16> {
  __m256 even, odd;  // as shuffled_bf16 takes them
  UNSWAG_INLINE explicit Scale(const float* factors) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(factors), order);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(factors + 8), order);
    even = _mm256_permute2f128_ps(low, high, 0x20), odd = _mm256_permute2f128_ps(low, high, 0x31);
  }
  UNSWAG_INLINE void store(bf16* p, i16x16 v) const {
    const __m256 of_even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v.v, 16), 16));
    const __m256 of_odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(v.v, 16));
    store_shuffled(p, f32x16(f32x8(_mm256_mul_ps(of_even, even)), f32x8(_mm256_mul_ps(of_odd, odd))));
  }
};
#endif

}  // namespace unswag::UNSWAG_ISA_NS
