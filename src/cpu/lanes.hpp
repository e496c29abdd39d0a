// Rows in steps of sixteen lanes: loads and stores of a step that may be short, sums in a fixed order, and scratch memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/simd.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {

// Lanes that compute for elements of X and of Y: double as soon as one of them is.
template <class X, class Y>
using compute_t = std::conditional_t<std::is_same_v<X, double>, lanes_t<X>, lanes_t<Y>>;

template <class T, class Void>
UNSWAG_INLINE auto row(const RowsOf<Void>& a, std::int64_t r) {
  using Pointer = std::conditional_t<std::is_const_v<Void>, const T*, T*>;
  return static_cast<Pointer>(a.data) + r * a.stride;
}

// The first n lanes, 0 < n <= 16; the others are loaded as 0 and not stored.
template <class V, class T>
UNSWAG_INLINE V load_lanes(const T* p, std::int64_t n) {
  if (n == 16) return V::load(p);
  T all[16] = {};
  memcpy(all, p, std::size_t(n) * sizeof(T));
  return V::load(all);
}
template <class V, class T>
UNSWAG_INLINE void store_lanes(T* p, V x, std::int64_t n) {
  if (n == 16) return x.store(p);
  T all[16];
  x.store(all);
  memcpy(p, all, std::size_t(n) * sizeof(T));
}

// The first n elements of a step; the others are 0.
template <class V>
UNSWAG_INLINE V first_elements(V x, std::int64_t n) {
  return n >= 16 ? x : select(V::mask::from_bits((1u << n) - 1), x, V(0));
}

// step(i, n) for every sixteen lanes of [0, count): n is 16, in the last step perhaps less.
template <class Step>
UNSWAG_INLINE void each_lanes(std::int64_t count, const Step& step) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) step(i, 16);
  if (i < count) step(i, count - i);
}

// How steps of a loop over rows find their elements.  Sixteen at most, one after the other:
template <class V>
struct InOrder {
  using Lanes = V;
  static constexpr int step = 16;
  template <class T>
  UNSWAG_INLINE static V load(const T* p, std::int64_t n) {
    return load_lanes<V>(p, n);
  }
  template <class T>
  UNSWAG_INLINE static void store(T* p, V x, std::int64_t n) {
    store_lanes(p, x, n);
  }
  template <class T>
  UNSWAG_INLINE static void stream(T* p, V x) {
    x.stream(p);
  }
  static constexpr int lane(int element) { return element; }
  UNSWAG_INLINE static void in_order(V x, V* to) { *to = x; }
};

// As load_shuffled puts them, always a whole step:
struct Shuffled {
  using Lanes = decltype(load_shuffled(static_cast<const bf16*>(nullptr)));
  static constexpr int step = Lanes::size;
  UNSWAG_INLINE static Lanes load(const bf16* p, std::int64_t) { return load_shuffled(p); }
  UNSWAG_INLINE static void store(bf16* p, Lanes x, std::int64_t) { store_shuffled(p, x); }
  UNSWAG_INLINE static void stream(bf16* p, Lanes x) { stream_shuffled(p, x); }

#if defined(__AVX512F__)
  static constexpr bool even_and_odd = step == 32;
  UNSWAG_INLINE static void in_order(twice<f32x16> x, f32x16* to) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    to[0] = _mm512_permutex2var_ps(x.low.v, first, x.high.v);
    to[1] = _mm512_permutex2var_ps(x.low.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), x.high.v);
  }
#elif defined(__AVX2__)
  static constexpr bool even_and_odd = true;
  UNSWAG_INLINE static void in_order(f32x16 x, f32x16* to) {
    const __m256 a = _mm256_unpacklo_ps(x.low.v, x.high.v), b = _mm256_unpackhi_ps(x.low.v, x.high.v);
    *to = {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
  }
#else
  static constexpr bool even_and_odd = false;
#endif
  template <class V>
  UNSWAG_INLINE static void in_order(V x, V* to) {
    *to = x;
  }
  // The lane of an element of the step.
  static constexpr int lane(int element) { return even_and_odd ? element % 2 * (step / 2) + element / 2 : element; }
};

// The steps of rows of these types.
template <class V, class... T>
using steps_t = std::conditional_t<(std::is_same_v<T, bf16> && ...), Shuffled, InOrder<V>>;

// Steps of Shuffled and of InOrder meet where whole 64 elements end: beyond them everything is in order.
constexpr std::int64_t whole(std::int64_t count) { return count - count % 64; }

// step(How{}, i, n) for all of [0, count), How being O or InOrder<V>.
template <class O, class V, class Step>
UNSWAG_INLINE void each_step(std::int64_t count, const Step& step) {
  const std::int64_t end = whole(count);
  for (std::int64_t i = 0; i < end; i += O::step) step(O{}, i, O::step);
  each_lanes(count - end,
             [&](std::int64_t i, std::int64_t n) __attribute__((always_inline)) { step(InOrder<V>{}, end + i, n); });
}

// x, with a NaN that has nothing in its lower half: what Shuffled::store asks of a NaN.
template <class S>
UNSWAG_INLINE S plain_nan(S x) {
  return x == x ? x : S(NAN);
}

// Sums over [0, count): add(How{}, sums, i, n) adds the terms of n elements to each of N sums, as in each_step.  2048 elements
// at a time are added up in four chains of lanes, which then meet in a fixed order, and these parts in double: the order
// depends on count alone.
template <class O, class V, int N, class Add>
UNSWAG_INLINE void sum_steps(double (&total)[N], std::int64_t count, const Add& add) {
  using Lanes = typename O::Lanes;
  constexpr int steps = 64 / O::step;
  for (double& t : total) t = 0;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t end = count - i < 2048 ? count : i + 2048;
    Lanes sums[steps][N];
    for (auto& s : sums)
      for (Lanes& l : s) l = Lanes(0);
    for (; i + 64 <= end; i += 64)
      for (int k = 0; k < steps; ++k) add(O{}, sums[k], i + k * O::step, O::step);
    V chains[4][N];
    for (int n = 0; n < N; ++n) {
      V in_order[4];
      for (int k = 0; k < steps; ++k) O::in_order(sums[k][n], in_order + k * 4 / steps);
      for (int c = 0; c < 4; ++c) chains[c][n] = in_order[c];
    }
    for (; i + 16 <= end; i += 16) add(InOrder<V>{}, chains[0], i, 16);
    if (i < end) {
      add(InOrder<V>{}, chains[1], i, end - i);
      i = end;
    }
    for (int n = 0; n < N; ++n) total[n] += double(reduce_add((chains[0][n] + chains[1][n]) + (chains[2][n] + chains[3][n])));
  }
}
// One sum: sum = add(How{}, sum, i, n).
template <class O, class V, class Add>
UNSWAG_INLINE double sum_steps(std::int64_t count, const Add& add) {
  double total[1];
  sum_steps<O, V>(total, count, [&](auto how, auto& sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
    sum[0] = add(how, sum[0], i, n);
  });
  return total[0];
}
// In order: sum = add(sum, i, n).
template <class V, class Add>
UNSWAG_INLINE double sum_lanes(std::int64_t count, const Add& add) {
  return sum_steps<InOrder<V>, V>(
      count, [&](auto, V sum, std::int64_t i, std::int64_t n) __attribute__((always_inline)) { return add(sum, i, n); });
}

// Memory for the length of a call.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t size)
      : data_(size ? static_cast<T*>(::operator new(std::size_t(size) * sizeof(T), std::align_val_t{64})) : nullptr) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace unswag::UNSWAG_ISA_NS
