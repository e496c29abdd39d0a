// f32x16: sixteen float lanes on every instruction set, so that a kernel is written once.
//
//   portable  array16<float>, an array (and array16<double>: this is the row that has f64)
//   x86-64    4 registers of 4 (SSE2)      avx2  2 registers of 8      avx512  1 register of 16
//   avx512-bf16   the same, where the processor has instructions for bf16 and moves 16-bit elements (avx512_vbmi2)
//
// Each instruction set brings one register type (src/cpu/simd/), and `twice` puts two of a kind together.  They all offer
//
//   V::load(p)  v.store(p)  v.stream(p)      p to float, f16, bf16 (double); stores round to nearest even; no alignment is
//                                            asked for, except stream (past the cache): a multiple of 16 elements
//   + - * / unary -   fma min max abs sqrt   fma rounds twice where there is no such instruction; min and max give their
//                                            second operand when either is NaN
//   < <= > >= == !=   select(mask, a, b)     false for NaN, except !=;  mask.bits(), mask::from_bits(bits), & | ~
//   negative(x)                              x < 0, where it does not matter what -0 and NaN give
//   reduce_add reduce_max                    lane i with i + 8, then i + 4, i + 2, i + 1: the same order everywhere
//   product_error times_pow2                 as in math/scalar.hpp, where float and double have the same functions
//
// i32x32 and i16x32 (i64x32): thirty-two elements seen as integers, for the masks; one word of a packed row.  They have
// load store stream, the comparisons, select, and masks as above.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/dtype.hpp"
#include "math/exp.hpp"

#ifndef UNSWAG_ISA_NS
#error "compile src/cpu once per instruction set, with -DUNSWAG_ISA_NS=portable, x86_64, avx2, avx512 or avx512_bf16"
#endif

// A call for every operation is slow, but the portable row is the last resort, and takes minutes to compile without calls.
#ifdef UNSWAG_ISA_PORTABLE
#define UNSWAG_INLINE inline
#else
#define UNSWAG_INLINE [[gnu::always_inline]] inline
#endif

#include "cpu/simd/twice.hpp"
#if defined(UNSWAG_ISA_PORTABLE)
#include "cpu/simd/portable.hpp"
#elif defined(__AVX512F__)
#include "cpu/simd/avx512.hpp"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.hpp"
#else
#include "cpu/simd/sse2.hpp"
#endif

namespace unswag::UNSWAG_ISA_NS {

// Whether kernels have loops of their own for streamed stores and for plain numbers; else there is one loop.
#ifdef UNSWAG_ISA_PORTABLE
constexpr bool has_fast_loops = false;
#else
constexpr bool has_fast_loops = true;
#endif

// Whether a long formula fits into the registers together with the next one, which the processor then begins meanwhile.
#ifdef __AVX512F__
constexpr bool has_many_registers = true;
#else
constexpr bool has_many_registers = false;
#endif

using mask16 = f32x16::mask;
static_assert(f32x16::size == 16);

// The lanes that compute for elements of type T.
template <class T>
struct lanes_of {
  using type = f32x16;
};
#ifdef UNSWAG_ISA_PORTABLE
template <>
struct lanes_of<double> {
  using type = f64x16;
};
#endif
template <class T>
using lanes_t = typename lanes_of<T>::type;

template <class T>
UNSWAG_INLINE lanes_t<T> load(const T* p) {
  return lanes_t<T>::load(p);
}
template <class V, class T>
UNSWAG_INLINE void store(T* p, V x) {
  x.store(p);
}

// The lanes of a step of an elementwise loop: two registers, or four of SSE2.
template <class T>
struct wide_of {
#ifdef __AVX512F__
  using type = twice<f32x16>;
#else
  using type = lanes_t<T>;
#endif
};
template <class T>
using wide_t = typename wide_of<T>::type;

// Loads and stores of a step, with the lanes in an order of the row's own, and for numbers whose NaN, if any, comes from
// elements of type T and from arithmetic, so that what T has no bits for is 0 in it: both are cheaper for bf16.
template <class T>
UNSWAG_INLINE wide_t<T> load_shuffled(const T* p) {
  return wide_t<T>::load(p);
}
template <class V, class T>
UNSWAG_INLINE void store_shuffled(T* p, V x) {
  x.store(p);
}
template <class V, class T>
UNSWAG_INLINE void stream_shuffled(T* p, V x) {
  x.stream(p);
}

// Whether a mask is true in every lane.
template <class M>
UNSWAG_INLINE bool all(M mask) {
  return mask.bits() == (1u << M::size) - 1;
}

template <class M>
UNSWAG_INLINE bool all(twice_mask<M> mask) {
  return all(mask.low & mask.high);
}

// visit(dtype, f) calls f(type<T>{}) for the types that this row serves: src/api sends f64 to the portable one.
template <class F>
UNSWAG_INLINE void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(math::type<float>{});
    case DType::f16: return f(math::type<f16>{});
    case DType::bf16: return f(math::type<bf16>{});
    case DType::f64:
#ifdef UNSWAG_ISA_PORTABLE
      return f(math::type<double>{});
#else
      return;
#endif
  }
}

using math::exp;

}  // namespace unswag::UNSWAG_ISA_NS
