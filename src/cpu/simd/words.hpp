// Words of math/philox.hpp, of many blocks side by side: 64-bit lanes of which the lower half counts, because that is what the
// instruction sets multiply.  What stands in the upper half is left there.
//
// Lane 2 i is block i, lane 2 i + 1 block size / 2 + i, so that the four words of the blocks leave the registers in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.hpp"
#include "math/philox.hpp"

namespace unswag::UNSWAG_ISA_NS {

#if defined(UNSWAG_ISA_PORTABLE)

struct words {
  static constexpr int size = 1;
  std::uint64_t v;
  UNSWAG_INLINE explicit words(std::uint32_t x) : v(x) {}
  UNSWAG_INLINE explicit words(std::uint64_t x) : v(x) {}
  UNSWAG_INLINE static words counted(std::uint64_t first) { return words(first); }
  UNSWAG_INLINE friend words operator^(words a, words b) { return words(a.v ^ b.v); }
  UNSWAG_INLINE friend words wide_product(words a, std::uint32_t b) { return words(std::uint64_t{std::uint32_t(a.v)} * b); }
  UNSWAG_INLINE friend words upper_word(words a) { return words(a.v >> 32); }
};
UNSWAG_INLINE void store_blocks(std::uint32_t* out, const math::PhiloxWords<words>& a) {
  for (int w = 0; w < 4; ++w) out[w] = std::uint32_t(a.word[w].v);
}

#elif defined(__AVX512F__)

struct words {
  static constexpr int size = 8;
  __m512i v;
  UNSWAG_INLINE words(__m512i x) : v(x) {}
  UNSWAG_INLINE explicit words(std::uint32_t x) : v(_mm512_set1_epi64(x)) {}
  UNSWAG_INLINE static words counted(std::uint64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64((long long)first), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
  }
  UNSWAG_INLINE friend words operator^(words a, words b) { return _mm512_xor_si512(a.v, b.v); }
  UNSWAG_INLINE friend words wide_product(words a, std::uint32_t b) { return _mm512_mul_epu32(a.v, _mm512_set1_epi64(b)); }
  UNSWAG_INLINE friend words upper_word(words a) { return _mm512_srli_epi64(a.v, 32); }
};
UNSWAG_INLINE void store_blocks(std::uint32_t* out, const math::PhiloxWords<words>& a) {
  const __m512i first = _mm512_mask_blend_epi32(0xaaaa, a.word[0].v, _mm512_slli_epi64(a.word[1].v, 32));
  const __m512i second = _mm512_mask_blend_epi32(0xaaaa, a.word[2].v, _mm512_slli_epi64(a.word[3].v, 32));
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(first, second));
}

#elif defined(__AVX2__)

struct words {
  static constexpr int size = 4;
  __m256i v;
  UNSWAG_INLINE words(__m256i x) : v(x) {}
  UNSWAG_INLINE explicit words(std::uint32_t x) : v(_mm256_set1_epi64x(x)) {}
  UNSWAG_INLINE static words counted(std::uint64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)first), _mm256_setr_epi64x(0, 2, 1, 3));
  }
  UNSWAG_INLINE friend words operator^(words a, words b) { return _mm256_xor_si256(a.v, b.v); }
  UNSWAG_INLINE friend words wide_product(words a, std::uint32_t b) { return _mm256_mul_epu32(a.v, _mm256_set1_epi64x(b)); }
  UNSWAG_INLINE friend words upper_word(words a) { return _mm256_srli_epi64(a.v, 32); }
};
UNSWAG_INLINE void store_blocks(std::uint32_t* out, const math::PhiloxWords<words>& a) {
  const __m256i first = _mm256_blend_epi32(a.word[0].v, _mm256_slli_epi64(a.word[1].v, 32), 0xaa);
  const __m256i second = _mm256_blend_epi32(a.word[2].v, _mm256_slli_epi64(a.word[3].v, 32), 0xaa);
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256((__m256i*)(out + 8), _mm256_unpackhi_epi64(first, second));
}

#else

struct words {
  static constexpr int size = 2;
  __m128i v;
  UNSWAG_INLINE words(__m128i x) : v(x) {}
  UNSWAG_INLINE explicit words(std::uint32_t x) : v(_mm_set1_epi64x(x)) {}
  UNSWAG_INLINE static words counted(std::uint64_t first) {
    return _mm_add_epi64(_mm_set1_epi64x((long long)first), _mm_set_epi64x(1, 0));
  }
  UNSWAG_INLINE friend words operator^(words a, words b) { return _mm_xor_si128(a.v, b.v); }
  UNSWAG_INLINE friend words wide_product(words a, std::uint32_t b) { return _mm_mul_epu32(a.v, _mm_set1_epi64x(b)); }
  UNSWAG_INLINE friend words upper_word(words a) { return _mm_srli_epi64(a.v, 32); }
};
UNSWAG_INLINE void store_blocks(std::uint32_t* out, const math::PhiloxWords<words>& a) {
  const __m128i first = _mm_unpacklo_epi32(_mm_shuffle_epi32(a.word[0].v, 0x08), _mm_shuffle_epi32(a.word[1].v, 0x08));
  const __m128i second = _mm_unpacklo_epi32(_mm_shuffle_epi32(a.word[2].v, 0x08), _mm_shuffle_epi32(a.word[3].v, 0x08));
  _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi64(first, second));
  _mm_storeu_si128((__m128i*)(out + 4), _mm_unpackhi_epi64(first, second));
}

#endif

UNSWAG_INLINE words lower_word(words product) { return product; }

}  // namespace unswag::UNSWAG_ISA_NS
