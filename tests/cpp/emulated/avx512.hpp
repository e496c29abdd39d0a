// AVX-512 on a processor that has AVX2 only: forced in front of src/cpu for the row avx512-emulated, so that the tests run
// src/cpu/simd/avx512.hpp as it stands.  SIMDe makes 512-bit operations of 256-bit instructions (fma rounds once, min, max
// and sqrt are the processor's); what SIMDe 0.7.4 lacks stands below, written from Intel's intrinsics guide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#ifdef SIMDE_X86_AVX512F_NATIVE
#error "the emulated row is compiled without -mavx512f"
#endif
#ifndef SIMDE_X86_FMA_NATIVE
#error "without -mfma SIMDe would round a fused product twice"
#endif

namespace unswag::emulated {

using Float = simde__m512_private;
using Int = simde__m512i_private;

[[gnu::always_inline]] inline __m512 floats(__m256 low, __m256 high) {
  Float r;
  r.m256[0] = low, r.m256[1] = high;
  return simde__m512_from_private(r);
}
[[gnu::always_inline]] inline __m512i ints(__m256i low, __m256i high) {
  Int r;
  r.m256i[0] = low, r.m256i[1] = high;
  return simde__m512i_from_private(r);
}
template <int Half>
[[gnu::always_inline]] inline __m256 half(__m512 a) {
  return simde__m512_to_private(a).m256[Half];
}
template <int Half>
[[gnu::always_inline]] inline __m256i half(__m512i a) {
  return simde__m512i_to_private(a).m256i[Half];
}
template <int Half>
[[gnu::always_inline]] inline __m128i quarter(__m256i a) {
  return _mm256_extracti128_si256(a, Half);
}

// Where the processor faults.
[[gnu::always_inline]] inline void need_64_byte_alignment(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) std::abort();
}

template <class T, int Relation>
[[gnu::always_inline]] inline std::uint32_t compare(__m512i a, __m512i b) {
  T x[64 / sizeof(T)], y[64 / sizeof(T)];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  std::uint32_t mask = 0;
  for (std::size_t i = 0; i < 64 / sizeof(T); ++i) {
    const bool is = Relation == _MM_CMPINT_EQ    ? x[i] == y[i]
                    : Relation == _MM_CMPINT_LT  ? x[i] < y[i]
                    : Relation == _MM_CMPINT_LE  ? x[i] <= y[i]
                    : Relation == _MM_CMPINT_NE  ? x[i] != y[i]
                    : Relation == _MM_CMPINT_NLT ? !(x[i] < y[i])
                                                 : !(x[i] <= y[i]);
    mask |= std::uint32_t(is) << i;
  }
  return mask;
}

// The low half of each 32-bit lane, in order.
[[gnu::always_inline]] inline __m256i low_halves(__m512i a) {
  std::uint32_t wide[16];
  std::uint16_t narrow[16];
  __builtin_memcpy(wide, &a, 64);
  for (int i = 0; i < 16; ++i) narrow[i] = std::uint16_t(wide[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(narrow));
}

// The named lanes side by side, and apart again; zeros after and between them.
[[gnu::always_inline]] inline __m512i compress(std::uint32_t mask, __m512i a) {
  std::uint32_t from[16], to[16] = {};
  __builtin_memcpy(from, &a, 64);
  for (int i = 0, k = 0; i < 16; ++i)
    if (mask >> i & 1) to[k++] = from[i];
  return _mm512_loadu_si512(to);
}
[[gnu::always_inline]] inline __m512i expand(std::uint32_t mask, __m512i a) {
  std::uint32_t from[16], to[16] = {};
  __builtin_memcpy(from, &a, 64);
  for (int i = 0, k = 0; i < 16; ++i)
    if (mask >> i & 1) to[i] = from[k++];
  return _mm512_loadu_si512(to);
}

// The lowest byte of each 32-bit lane, in order.
[[gnu::always_inline]] inline __m128i low_bytes(__m512i a) {
  std::uint32_t wide[16];
  std::uint8_t narrow[16];
  __builtin_memcpy(wide, &a, 64);
  for (int i = 0; i < 16; ++i) narrow[i] = std::uint8_t(wide[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow));
}

}  // namespace unswag::emulated

#define _mm512_cvtph_ps(a) \
  unswag::emulated::floats(_mm256_cvtph_ps(unswag::emulated::quarter<0>(a)), _mm256_cvtph_ps(unswag::emulated::quarter<1>(a)))
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding)                                          \
  _mm256_set_m128i(_mm256_cvtps_ph(unswag::emulated::half<1>(a), (rounding)), \
                   _mm256_cvtps_ph(unswag::emulated::half<0>(a), (rounding)))
#define _mm512_cvtepu16_epi32(a)                                                 \
  unswag::emulated::ints(_mm256_cvtepu16_epi32(unswag::emulated::quarter<0>(a)), \
                         _mm256_cvtepu16_epi32(unswag::emulated::quarter<1>(a)))
#define _mm512_cvtepi16_epi32(a)                                                 \
  unswag::emulated::ints(_mm256_cvtepi16_epi32(unswag::emulated::quarter<0>(a)), \
                         _mm256_cvtepi16_epi32(unswag::emulated::quarter<1>(a)))
#define _mm512_cvtepi32_ps(a) \
  unswag::emulated::floats(_mm256_cvtepi32_ps(unswag::emulated::half<0>(a)), _mm256_cvtepi32_ps(unswag::emulated::half<1>(a)))
#define _mm512_cvtepi32_epi16(a) unswag::emulated::low_halves(a)
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32(mask, a) unswag::emulated::compress(mask, a)
#undef _mm512_maskz_expand_epi32
#define _mm512_maskz_expand_epi32(mask, a) unswag::emulated::expand(mask, a)
#define _mm512_cvtepi32_epi8(a) unswag::emulated::low_bytes(a)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, which) unswag::emulated::half<which>(a)
#undef _mm512_cmp_epi32_mask
#define _mm512_cmp_epi32_mask(a, b, relation) __mmask16(unswag::emulated::compare<std::int32_t, relation>(a, b))
#undef _mm512_cmp_epi16_mask
#define _mm512_cmp_epi16_mask(a, b, relation) __mmask32(unswag::emulated::compare<std::int16_t, relation>(a, b))
#define _mm512_stream_ps(p, a) (unswag::emulated::need_64_byte_alignment(p), _mm512_storeu_ps(p, a))
#define _mm512_stream_si512(p, a) (unswag::emulated::need_64_byte_alignment(p), _mm512_storeu_si512(p, a))

// What src/cpu/simd.hpp and backend.cpp ask; the row runs wherever the 256-bit instructions do.
#define __AVX512F__ 1
#define __builtin_cpu_supports(feature) __builtin_cpu_supports("avx2")
