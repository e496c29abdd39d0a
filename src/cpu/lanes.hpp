// Rows in steps of sixteen lanes: loads and stores of a step that may be short, sums in a fixed order, and scratch memory.
#pragma once

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

// The first n lanes of x; the others are 0.
template <class V>
UNSWAG_INLINE V first_lanes(V x, std::int64_t n) {
  return n == 16 ? x : select(V::mask::from_bits((1u << n) - 1), x, V(0));
}

// x rounded to T.
template <class T, class V>
UNSWAG_INLINE V rounded(V x) {
  if constexpr (std::is_same_v<T, typename V::scalar>) {
    return x;
  } else {
    T all[16];
    x.store(all);
    return V::load(all);
  }
}

// step(i, n) for every sixteen lanes of [0, count): n is 16, in the last step perhaps less.
template <class Step>
UNSWAG_INLINE void each_lanes(std::int64_t count, const Step& step) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) step(i, 16);
  if (i < count) step(i, count - i);
}

// A sum over [0, count): sum = add(sum, i, n) adds the terms of n lanes.  2048 elements at a time are added up in four chains
// of lanes, which then meet in a fixed order, and these parts in double: the order depends on count alone.
template <class V, class Add>
UNSWAG_INLINE double sum_lanes(std::int64_t count, const Add& add) {
  double total = 0;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t end = count - i < 2048 ? count : i + 2048;
    V a(0), b(0), c(0), d(0);
    for (; i + 64 <= end; i += 64) {
      a = add(a, i, 16);
      b = add(b, i + 16, 16);
      c = add(c, i + 32, 16);
      d = add(d, i + 48, 16);
    }
    for (; i + 16 <= end; i += 16) a = add(a, i, 16);
    if (i < end) {
      b = add(b, i, end - i);
      i = end;
    }
    total += double(reduce_add((a + b) + (c + d)));
  }
  return total;
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
