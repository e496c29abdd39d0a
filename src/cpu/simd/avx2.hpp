// Eight lanes in a register of AVX2 (with FMA and F16C).
#pragma once

#include <immintrin.h>

namespace unswag::UNSWAG_ISA_NS {

struct mask8 {
  static constexpr int size = 8;
  __m256 m;  // a lane's sign bit counts, and nothing else does
  UNSWAG_INLINE static mask8 from_bits(unsigned bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane))};
  }
  UNSWAG_INLINE unsigned bits() const { return unsigned(_mm256_movemask_ps(m)); }
  UNSWAG_INLINE friend mask8 operator&(mask8 a, mask8 b) { return {_mm256_and_ps(a.m, b.m)}; }
  UNSWAG_INLINE friend mask8 operator|(mask8 a, mask8 b) { return {_mm256_or_ps(a.m, b.m)}; }
  UNSWAG_INLINE friend mask8 operator~(mask8 a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
};

struct f32x8 {
  using scalar = float;
  using mask = mask8;
  static constexpr int size = 8;
  __m256 v;

  f32x8() = default;
  UNSWAG_INLINE f32x8(__m256 x) : v(x) {}
  UNSWAG_INLINE f32x8(float x) : v(_mm256_set1_ps(x)) {}

  UNSWAG_INLINE static f32x8 load(const float* p) { return _mm256_loadu_ps(p); }
  UNSWAG_INLINE static f32x8 load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  UNSWAG_INLINE static f32x8 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  UNSWAG_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  UNSWAG_INLINE void store(f16* p) const { _mm_storeu_si128((__m128i*)p, to_f16()); }
  UNSWAG_INLINE void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, to_bf16()); }
  UNSWAG_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  UNSWAG_INLINE void stream(f16* p) const { _mm_stream_si128((__m128i*)p, to_f16()); }
  UNSWAG_INLINE void stream(bf16* p) const { _mm_stream_si128((__m128i*)p, to_bf16()); }

  UNSWAG_INLINE friend f32x8 operator-(f32x8 a) { return -a.v; }  // may become part of an FMA
  UNSWAG_INLINE friend f32x8 operator+(f32x8 a, f32x8 b) { return _mm256_add_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 operator-(f32x8 a, f32x8 b) { return _mm256_sub_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 operator*(f32x8 a, f32x8 b) { return _mm256_mul_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 operator/(f32x8 a, f32x8 b) { return _mm256_div_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  UNSWAG_INLINE friend f32x8 min(f32x8 a, f32x8 b) { return _mm256_min_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 max(f32x8 a, f32x8 b) { return _mm256_max_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x8 abs(f32x8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v); }
  UNSWAG_INLINE friend f32x8 sqrt(f32x8 a) { return _mm256_sqrt_ps(a.v); }
  UNSWAG_INLINE friend mask8 operator<(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  UNSWAG_INLINE friend mask8 operator<=(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
  UNSWAG_INLINE friend mask8 operator>(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  UNSWAG_INLINE friend mask8 operator>=(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
  UNSWAG_INLINE friend mask8 operator==(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  UNSWAG_INLINE friend mask8 operator!=(f32x8 a, f32x8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
  UNSWAG_INLINE friend mask8 negative(f32x8 a) { return {a.v}; }
  UNSWAG_INLINE friend f32x8 select(mask8 m, f32x8 a, f32x8 b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
  UNSWAG_INLINE friend float reduce_add(f32x8 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  UNSWAG_INLINE friend float reduce_max(f32x8 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  UNSWAG_INLINE friend f32x8 product_error(f32x8 a, f32x8 b, f32x8 p) { return _mm256_fmsub_ps(a.v, b.v, p.v); }
  UNSWAG_INLINE friend f32x8 times_pow2(f32x8 m, f32x8 z) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(z.v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(m.v), n));
  }

 private:
  UNSWAG_INLINE __m128i to_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  UNSWAG_INLINE __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 upper = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(upper), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08));
  }
};

using f32x16 = twice<f32x8>;

// The even lanes, then the odd ones.
UNSWAG_INLINE f32x16 load_shuffled(const bf16* p) {
  const __m256i all = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(all, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(int(0xffff0000))))};
}
// Without a case for NaN: its lower half is 0, so rounding cannot carry into the exponent.
UNSWAG_INLINE __m256i shuffled_bf16(f32x16 x) {
  const auto rounded = [](__m256 v) __attribute__((always_inline)) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  };
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(x.low.v), 16), rounded(x.high.v), 0xaa);
}
UNSWAG_INLINE void store_shuffled(bf16* p, f32x16 x) { _mm256_storeu_si256((__m256i*)p, shuffled_bf16(x)); }
UNSWAG_INLINE void stream_shuffled(bf16* p, f32x16 x) { _mm256_stream_si256((__m256i*)p, shuffled_bf16(x)); }

// 32-bit or 16-bit integers, for the masks.
template <class I>
struct ints_mask {
  static constexpr int size = 32 / int(sizeof(I));
  __m256i m;  // all ones or all zeros per lane
  UNSWAG_INLINE static ints_mask from_bits(unsigned bits) {
    if constexpr (sizeof(I) == 4) {
      return {_mm256_castps_si256(mask8::from_bits(bits).m)};
    } else {
      const __m256i lane = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
      return {_mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(short(bits)), lane), lane)};
    }
  }
  UNSWAG_INLINE unsigned bits() const {
    static_assert(sizeof(I) == 4, "two masks of 16-bit lanes give their bits together, below");
    return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
  }
  UNSWAG_INLINE friend ints_mask operator&(ints_mask a, ints_mask b) { return {_mm256_and_si256(a.m, b.m)}; }
  UNSWAG_INLINE friend ints_mask operator|(ints_mask a, ints_mask b) { return {_mm256_or_si256(a.m, b.m)}; }
  UNSWAG_INLINE friend ints_mask operator~(ints_mask a) { return {_mm256_xor_si256(a.m, _mm256_set1_epi32(-1))}; }
};
template <>
UNSWAG_INLINE unsigned twice_mask<ints_mask<std::int16_t>>::bits() const {
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low.m, high.m), 0xd8);
  return unsigned(_mm256_movemask_epi8(bytes));
}

template <class I>
struct ints {
  using scalar = I;
  using mask = ints_mask<I>;
  static constexpr int size = mask::size;
  __m256i v;

  ints() = default;
  UNSWAG_INLINE ints(__m256i x) : v(x) {}
  UNSWAG_INLINE ints(I x) : v(sizeof(I) == 4 ? _mm256_set1_epi32(x) : _mm256_set1_epi16(short(x))) {}

  UNSWAG_INLINE static ints load(const I* p) { return _mm256_loadu_si256((const __m256i*)p); }
  UNSWAG_INLINE void store(I* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  UNSWAG_INLINE void stream(I* p) const { _mm256_stream_si256((__m256i*)p, v); }

  UNSWAG_INLINE friend mask operator>(ints a, ints b) {
    return {sizeof(I) == 4 ? _mm256_cmpgt_epi32(a.v, b.v) : _mm256_cmpgt_epi16(a.v, b.v)};
  }
  UNSWAG_INLINE friend mask operator==(ints a, ints b) {
    return {sizeof(I) == 4 ? _mm256_cmpeq_epi32(a.v, b.v) : _mm256_cmpeq_epi16(a.v, b.v)};
  }
  UNSWAG_INLINE friend mask operator<(ints a, ints b) { return b > a; }
  UNSWAG_INLINE friend mask operator<=(ints a, ints b) { return ~(a > b); }
  UNSWAG_INLINE friend mask operator>=(ints a, ints b) { return ~(b > a); }
  UNSWAG_INLINE friend mask operator!=(ints a, ints b) { return ~(a == b); }
  UNSWAG_INLINE friend ints select(mask m, ints a, ints b) { return _mm256_blendv_epi8(b.v, a.v, m.m); }
};

using i32x32 = twice<twice<ints<std::int32_t>>>;
using i16x32 = twice<ints<std::int16_t>>;

// Copies 32 bytes past the cache, to where 32 bytes begin.
UNSWAG_INLINE void stream_32_bytes(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// Makes streamed stores visible to other threads in order.
UNSWAG_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace unswag::UNSWAG_ISA_NS
