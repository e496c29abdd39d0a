// Four lanes in a register of the x86-64 baseline (SSE2: no FMA, no blend, no 16-bit floats).
#pragma once

#include <emmintrin.h>

namespace unswag::UNSWAG_ISA_NS {

struct mask4 {
  static constexpr int size = 4;
  __m128 m;  // all ones or all zeros per lane
  UNSWAG_INLINE static mask4 from_bits(unsigned bits) {
    const __m128i lane = _mm_setr_epi32(1, 2, 4, 8);
    return {_mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(int(bits)), lane), lane))};
  }
  UNSWAG_INLINE unsigned bits() const { return unsigned(_mm_movemask_ps(m)); }
  UNSWAG_INLINE friend mask4 operator&(mask4 a, mask4 b) { return {_mm_and_ps(a.m, b.m)}; }
  UNSWAG_INLINE friend mask4 operator|(mask4 a, mask4 b) { return {_mm_or_ps(a.m, b.m)}; }
  UNSWAG_INLINE friend mask4 operator~(mask4 a) { return {_mm_xor_ps(a.m, _mm_castsi128_ps(_mm_set1_epi32(-1)))}; }
};

struct f32x4 {
  using scalar = float;
  using mask = mask4;
  static constexpr int size = 4;
  __m128 v;

  f32x4() = default;
  UNSWAG_INLINE f32x4(__m128 x) : v(x) {}
  UNSWAG_INLINE f32x4(float x) : v(_mm_set1_ps(x)) {}

  UNSWAG_INLINE static f32x4 load(const float* p) { return _mm_loadu_ps(p); }
  UNSWAG_INLINE static f32x4 load(const bf16* p) {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p)));
  }
  // math::to_float(f16) in lanes.
  UNSWAG_INLINE static f32x4 load(const f16* p) {
    const __m128i h = _mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
    const __m128i magnitude = _mm_and_si128(h, _mm_set1_epi32(0x7fff));
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x8000)), 16);
    const __m128i shifted = _mm_slli_epi32(magnitude, 13);
    const __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff));
    const __m128i nan = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7c00));
    const __m128i subnormal = _mm_cmpgt_epi32(_mm_set1_epi32(0x0400), magnitude);
    __m128i bits = _mm_add_epi32(shifted, _mm_set1_epi32(112 << 23));
    bits = _mm_add_epi32(bits, _mm_and_si128(special, _mm_set1_epi32(112 << 23)));
    bits = _mm_or_si128(bits, _mm_and_si128(nan, _mm_set1_epi32(0x400000)));
    const __m128i tiny = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(magnitude), _mm_set1_ps(0x1p-24f)));
    bits = _mm_or_si128(_mm_and_si128(subnormal, tiny), _mm_andnot_si128(subnormal, bits));
    return _mm_castsi128_ps(_mm_or_si128(sign, bits));
  }
  UNSWAG_INLINE void store(float* p) const { _mm_storeu_ps(p, v); }
  UNSWAG_INLINE void store(f16* p) const { _mm_storel_epi64((__m128i*)p, low_halves(to_f16())); }
  UNSWAG_INLINE void store(bf16* p) const { _mm_storel_epi64((__m128i*)p, low_halves(to_bf16())); }
  UNSWAG_INLINE void stream(float* p) const { _mm_stream_ps(p, v); }
  UNSWAG_INLINE void stream(f16* p) const { _mm_stream_si64((long long*)p, _mm_cvtsi128_si64(low_halves(to_f16()))); }
  UNSWAG_INLINE void stream(bf16* p) const { _mm_stream_si64((long long*)p, _mm_cvtsi128_si64(low_halves(to_bf16()))); }

  UNSWAG_INLINE friend f32x4 operator-(f32x4 a) { return _mm_xor_ps(a.v, _mm_set1_ps(-0.f)); }
  UNSWAG_INLINE friend f32x4 operator+(f32x4 a, f32x4 b) { return _mm_add_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 operator-(f32x4 a, f32x4 b) { return _mm_sub_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 operator*(f32x4 a, f32x4 b) { return _mm_mul_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 operator/(f32x4 a, f32x4 b) { return _mm_div_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 fma(f32x4 a, f32x4 b, f32x4 c) { return a * b + c; }
  UNSWAG_INLINE friend f32x4 min(f32x4 a, f32x4 b) { return _mm_min_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 max(f32x4 a, f32x4 b) { return _mm_max_ps(a.v, b.v); }
  UNSWAG_INLINE friend f32x4 abs(f32x4 a) { return _mm_andnot_ps(_mm_set1_ps(-0.f), a.v); }
  UNSWAG_INLINE friend f32x4 sqrt(f32x4 a) { return _mm_sqrt_ps(a.v); }
  UNSWAG_INLINE friend mask4 operator<(f32x4 a, f32x4 b) { return {_mm_cmplt_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 operator<=(f32x4 a, f32x4 b) { return {_mm_cmple_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 operator>(f32x4 a, f32x4 b) { return {_mm_cmpgt_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 operator>=(f32x4 a, f32x4 b) { return {_mm_cmpge_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 operator==(f32x4 a, f32x4 b) { return {_mm_cmpeq_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 operator!=(f32x4 a, f32x4 b) { return {_mm_cmpneq_ps(a.v, b.v)}; }
  UNSWAG_INLINE friend mask4 negative(f32x4 a) { return a < f32x4(0.f); }
  UNSWAG_INLINE friend f32x4 select(mask4 m, f32x4 a, f32x4 b) {
    return _mm_or_ps(_mm_and_ps(m.m, a.v), _mm_andnot_ps(m.m, b.v));
  }
  UNSWAG_INLINE friend float reduce_add(f32x4 a) {
    const __m128 x = _mm_add_ps(a.v, _mm_movehl_ps(a.v, a.v));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  UNSWAG_INLINE friend float reduce_max(f32x4 a) {
    const __m128 x = _mm_max_ps(a.v, _mm_movehl_ps(a.v, a.v));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  // Dekker 1971: both factors are split into halves whose products are exact.
  UNSWAG_INLINE friend f32x4 product_error(f32x4 a, f32x4 b, f32x4 p) {
    const f32x4 ah = upper_half(a), al = a - ah, bh = upper_half(b), bl = b - bh;
    return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
  }
  UNSWAG_INLINE friend f32x4 times_pow2(f32x4 m, f32x4 z) {
    const __m128i n = _mm_slli_epi32(_mm_castps_si128(z.v), 23);
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(m.v), n));
  }

 private:
  UNSWAG_INLINE static f32x4 upper_half(f32x4 a) { return _mm_and_ps(a.v, _mm_castsi128_ps(_mm_set1_epi32(int(0xfffff000)))); }
  UNSWAG_INLINE static __m128i choose(__m128i m, __m128i a, __m128i b) {
    return _mm_or_si128(_mm_and_si128(m, a), _mm_andnot_si128(m, b));
  }
  // The lower 16 bits of each lane, side by side (packs_epi32 saturates as signed, so they are sign-extended first).
  UNSWAG_INLINE static __m128i low_halves(__m128i x) {
    const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(x, 16), 16);
    return _mm_packs_epi32(extended, extended);
  }
  UNSWAG_INLINE __m128i to_bf16() const {
    const __m128i bits = _mm_castps_si128(v);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
    const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
    return _mm_srli_epi32(choose(_mm_castps_si128(_mm_cmpunord_ps(v, v)), quiet, rounded), 16);
  }
  // math::from_float<f16> in lanes.
  UNSWAG_INLINE __m128i to_f16() const {
    const __m128i bits = _mm_castps_si128(v);
    const __m128i sign = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x8000));
    const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff));
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
    const __m128i bias = _mm_set1_epi32(0xfff - (112 << 23));
    const __m128i normal = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(magnitude, bias), odd), 13);
    const __m128 half = _mm_set1_ps(0.5f);
    const __m128i tiny = _mm_sub_epi32(_mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(magnitude), half)), _mm_castps_si128(half));
    const __m128i payload = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(0x3ff));
    const __m128i nan = _mm_or_si128(payload, _mm_set1_epi32(0x7e00));
    __m128i result = choose(_mm_cmpgt_epi32(_mm_set1_epi32(0x38800000), magnitude), tiny, normal);
    result = choose(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x477fefff)), _mm_set1_epi32(0x7c00), result);
    result = choose(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7f800000)), nan, result);
    return _mm_or_si128(sign, result);
  }
};

using f32x16 = twice<twice<f32x4>>;

// 32-bit or 16-bit integers, for the masks.
template <class I>
struct ints_mask {
  static constexpr int size = 16 / int(sizeof(I));
  __m128i m;  // all ones or all zeros per lane
  UNSWAG_INLINE static ints_mask from_bits(unsigned bits) {
    if constexpr (sizeof(I) == 4) {
      return {_mm_castps_si128(mask4::from_bits(bits).m)};
    } else {
      const __m128i lane = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
      return {_mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(short(bits)), lane), lane)};
    }
  }
  UNSWAG_INLINE unsigned bits() const {
    if constexpr (sizeof(I) == 4) {
      return unsigned(_mm_movemask_ps(_mm_castsi128_ps(m)));
    } else {
      return unsigned(_mm_movemask_epi8(_mm_packs_epi16(m, _mm_setzero_si128())));
    }
  }
  UNSWAG_INLINE friend ints_mask operator&(ints_mask a, ints_mask b) { return {_mm_and_si128(a.m, b.m)}; }
  UNSWAG_INLINE friend ints_mask operator|(ints_mask a, ints_mask b) { return {_mm_or_si128(a.m, b.m)}; }
  UNSWAG_INLINE friend ints_mask operator~(ints_mask a) { return {_mm_xor_si128(a.m, _mm_set1_epi32(-1))}; }
};

template <class I>
struct ints {
  using scalar = I;
  using mask = ints_mask<I>;
  static constexpr int size = mask::size;
  __m128i v;

  ints() = default;
  UNSWAG_INLINE ints(__m128i x) : v(x) {}
  UNSWAG_INLINE ints(I x) : v(sizeof(I) == 4 ? _mm_set1_epi32(x) : _mm_set1_epi16(short(x))) {}

  UNSWAG_INLINE static ints load(const I* p) { return _mm_loadu_si128((const __m128i*)p); }
  UNSWAG_INLINE void store(I* p) const { _mm_storeu_si128((__m128i*)p, v); }
  UNSWAG_INLINE void stream(I* p) const { _mm_stream_si128((__m128i*)p, v); }

  UNSWAG_INLINE friend mask operator>(ints a, ints b) {
    return {sizeof(I) == 4 ? _mm_cmpgt_epi32(a.v, b.v) : _mm_cmpgt_epi16(a.v, b.v)};
  }
  UNSWAG_INLINE friend mask operator==(ints a, ints b) {
    return {sizeof(I) == 4 ? _mm_cmpeq_epi32(a.v, b.v) : _mm_cmpeq_epi16(a.v, b.v)};
  }
  UNSWAG_INLINE friend mask operator<(ints a, ints b) { return b > a; }
  UNSWAG_INLINE friend mask operator<=(ints a, ints b) { return ~(a > b); }
  UNSWAG_INLINE friend mask operator>=(ints a, ints b) { return ~(b > a); }
  UNSWAG_INLINE friend mask operator!=(ints a, ints b) { return ~(a == b); }
  UNSWAG_INLINE friend ints select(mask m, ints a, ints b) {
    return _mm_or_si128(_mm_and_si128(m.m, a.v), _mm_andnot_si128(m.m, b.v));
  }
};

using i32x32 = twice<twice<twice<ints<std::int32_t>>>>;
using i16x32 = twice<twice<ints<std::int16_t>>>;

// Copies 32 bytes past the cache, to where 32 bytes begin.
UNSWAG_INLINE void stream_32_bytes(void* to, const void* from) {
  for (int i = 0; i < 2; ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
}
// Makes streamed stores visible to other threads in order.
UNSWAG_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace unswag::UNSWAG_ISA_NS
