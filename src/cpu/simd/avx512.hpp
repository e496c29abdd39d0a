// Sixteen lanes in a register of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <type_traits>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 warns of its own _mm512_undefined_ps (GCC bug 105593)
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace unswag::UNSWAG_ISA_NS {

struct mask_of_16 {
  static constexpr int size = 16;
  __mmask16 m;
  UNSWAG_INLINE static mask_of_16 from_bits(unsigned bits) { return {__mmask16(bits)}; }
  UNSWAG_INLINE unsigned bits() const { return m; }
  UNSWAG_INLINE friend mask_of_16 operator&(mask_of_16 a, mask_of_16 b) { return {__mmask16(a.m & b.m)}; }
  UNSWAG_INLINE friend mask_of_16 operator|(mask_of_16 a, mask_of_16 b) { return {__mmask16(a.m | b.m)}; }
  UNSWAG_INLINE friend mask_of_16 operator~(mask_of_16 a) { return {__mmask16(~a.m)}; }
};

struct f32x16 {
  using scalar = float;
  using mask = mask_of_16;
  static constexpr int size = 16;
  __m512 v;

  f32x16() = default;
  UNSWAG_INLINE f32x16(__m512 x) : v(x) {}
  UNSWAG_INLINE f32x16(float x) : v(_mm512_set1_ps(x)) {}

  UNSWAG_INLINE static f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
  UNSWAG_INLINE static f32x16 load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  UNSWAG_INLINE static f32x16 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  UNSWAG_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  UNSWAG_INLINE void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, to_f16()); }
  UNSWAG_INLINE void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, to_bf16()); }
  UNSWAG_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  UNSWAG_INLINE void stream(f16* p) const { _mm256_stream_si256((__m256i*)p, to_f16()); }
  UNSWAG_INLINE void stream(bf16* p) const { _mm256_stream_si256((__m256i*)p, to_bf16()); }

  UNSWAG_INLINE friend f32x16 operator-(f32x16 a) { return -a.v; }  // may become part of an FMA
  UNSWAG_INLINE friend f32x16 operator+(f32x16 a, f32x16 b) { return _mm512_add_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 operator-(f32x16 a, f32x16 b) { return _mm512_sub_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 operator*(f32x16 a, f32x16 b) { return _mm512_mul_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 operator/(f32x16 a, f32x16 b) { return _mm512_div_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  UNSWAG_INLINE friend f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x16 abs(f32x16 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a.v); }
  UNSWAG_INLINE friend f32x16 sqrt(f32x16 a) { return _mm512_sqrt_ps(a.v); }
  UNSWAG_INLINE friend mask operator<(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  UNSWAG_INLINE friend mask operator<=(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  UNSWAG_INLINE friend mask operator>(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  UNSWAG_INLINE friend mask operator>=(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  UNSWAG_INLINE friend mask operator==(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  UNSWAG_INLINE friend mask operator!=(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
  UNSWAG_INLINE friend mask negative(f32x16 a) { return a < f32x16(0.f); }
  UNSWAG_INLINE friend f32x16 select(mask m, f32x16 a, f32x16 b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
  UNSWAG_INLINE friend float reduce_add(f32x16 a) {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  UNSWAG_INLINE friend float reduce_max(f32x16 a) {
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  UNSWAG_INLINE friend f32x16 product_error(f32x16 a, f32x16 b, f32x16 p) { return _mm512_fmsub_ps(a.v, b.v, p.v); }
  UNSWAG_INLINE friend f32x16 times_pow2(f32x16 m, f32x16 z) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(z.v), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(m.v), n));
  }

#ifdef __AVX512BF16__
  // Lanes that the processor's own conversion to bf16 takes for zeros; all else it rounds as to_bf16 does.
  UNSWAG_INLINE __mmask16 subnormal() const { return _mm512_fpclass_ps_mask(v, 0x20); }
#endif

 private:
  UNSWAG_INLINE __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  UNSWAG_INLINE __m256i to_bf16() const {
#ifdef __AVX512BF16__
    if (subnormal() == 0) [[likely]]
      return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i upper = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16));
  }
};

// The even lanes, then the odd ones.
UNSWAG_INLINE twice<f32x16> load_shuffled(const bf16* p) {
  const __m512i all = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(all, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(int(0xffff0000))))};
}
// Without a case for NaN: its lower half is 0, so rounding cannot carry into the exponent.
UNSWAG_INLINE __m512i shuffled_bf16(twice<f32x16> x) {
#ifdef __AVX512BF16__
  if (_kortestz_mask16_u8(x.low.subnormal(), x.high.subnormal())) [[likely]] {
    alignas(64) static constexpr std::int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.high.v, x.low.v));
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
  }
#endif
  const auto rounded = [](__m512 v) __attribute__((always_inline)) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  };
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(x.low.v), 16), rounded(x.high.v));
}
UNSWAG_INLINE void store_shuffled(bf16* p, twice<f32x16> x) { _mm512_storeu_si512(p, shuffled_bf16(x)); }
UNSWAG_INLINE void stream_shuffled(bf16* p, twice<f32x16> x) { _mm512_stream_si512((__m512i*)p, shuffled_bf16(x)); }

// 32-bit or 16-bit integers, for the masks.
template <class I>
struct ints_mask {
  static constexpr int size = 64 / int(sizeof(I));
  using Bits = std::conditional_t<sizeof(I) == 4, __mmask16, __mmask32>;
  Bits m;
  UNSWAG_INLINE static ints_mask from_bits(unsigned bits) { return {Bits(bits)}; }
  UNSWAG_INLINE unsigned bits() const { return m; }
  UNSWAG_INLINE friend ints_mask operator&(ints_mask a, ints_mask b) { return {Bits(a.m & b.m)}; }
  UNSWAG_INLINE friend ints_mask operator|(ints_mask a, ints_mask b) { return {Bits(a.m | b.m)}; }
  UNSWAG_INLINE friend ints_mask operator~(ints_mask a) { return {Bits(~a.m)}; }
};

template <class I>
struct ints {
  using scalar = I;
  using mask = ints_mask<I>;
  static constexpr int size = mask::size;
  __m512i v;

  ints() = default;
  UNSWAG_INLINE ints(__m512i x) : v(x) {}
  UNSWAG_INLINE ints(I x) : v(sizeof(I) == 4 ? _mm512_set1_epi32(x) : _mm512_set1_epi16(short(x))) {}

  UNSWAG_INLINE static ints load(const I* p) { return _mm512_loadu_si512(p); }
  UNSWAG_INLINE void store(I* p) const { _mm512_storeu_si512(p, v); }
  UNSWAG_INLINE void stream(I* p) const { _mm512_stream_si512((__m512i*)p, v); }

  UNSWAG_INLINE friend mask operator>(ints a, ints b) { return compare<_MM_CMPINT_NLE>(a, b); }
  UNSWAG_INLINE friend mask operator==(ints a, ints b) { return compare<_MM_CMPINT_EQ>(a, b); }
  UNSWAG_INLINE friend mask operator<(ints a, ints b) { return compare<_MM_CMPINT_LT>(a, b); }
  UNSWAG_INLINE friend mask operator<=(ints a, ints b) { return compare<_MM_CMPINT_LE>(a, b); }
  UNSWAG_INLINE friend mask operator>=(ints a, ints b) { return compare<_MM_CMPINT_NLT>(a, b); }
  UNSWAG_INLINE friend mask operator!=(ints a, ints b) { return compare<_MM_CMPINT_NE>(a, b); }
  UNSWAG_INLINE friend ints select(mask m, ints a, ints b) {
    if constexpr (sizeof(I) == 4) {
      return _mm512_mask_blend_epi32(m.m, b.v, a.v);
    } else {
      return _mm512_mask_blend_epi16(m.m, b.v, a.v);
    }
  }

 private:
  template <int Relation>
  UNSWAG_INLINE static mask compare(ints a, ints b) {
    if constexpr (sizeof(I) == 4) {
      return {_mm512_cmp_epi32_mask(a.v, b.v, Relation)};
    } else {
      return {_mm512_cmp_epi16_mask(a.v, b.v, Relation)};
    }
  }
};

using i32x32 = twice<ints<std::int32_t>>;
using i16x32 = ints<std::int16_t>;

// Copies 32 bytes past the cache, to where 32 bytes begin.
UNSWAG_INLINE void stream_32_bytes(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// Makes streamed stores visible to other threads in order.
UNSWAG_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace unswag::UNSWAG_ISA_NS
