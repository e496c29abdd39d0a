// Two registers side by side, as one of twice the size.
#pragma once

namespace unswag::UNSWAG_ISA_NS {

template <class M>
struct twice_mask {
  static constexpr int size = 2 * M::size;
  M low, high;
  UNSWAG_INLINE static twice_mask from_bits(unsigned bits) {
    return {M::from_bits(bits & ((1u << M::size) - 1)), M::from_bits(bits >> M::size)};
  }
  UNSWAG_INLINE unsigned bits() const { return low.bits() | high.bits() << M::size; }
  UNSWAG_INLINE friend twice_mask operator&(twice_mask a, twice_mask b) { return {a.low & b.low, a.high & b.high}; }
  UNSWAG_INLINE friend twice_mask operator|(twice_mask a, twice_mask b) { return {a.low | b.low, a.high | b.high}; }
  UNSWAG_INLINE friend twice_mask operator~(twice_mask a) { return {~a.low, ~a.high}; }
};

template <class H>
struct twice {
  using scalar = typename H::scalar;
  using mask = twice_mask<typename H::mask>;
  static constexpr int size = 2 * H::size;
  H low, high;

  twice() = default;
  UNSWAG_INLINE twice(H l, H h) : low(l), high(h) {}
  UNSWAG_INLINE twice(scalar x) : low(x), high(x) {}

  template <class T>
  UNSWAG_INLINE static twice load(const T* p) {
    return {H::load(p), H::load(p + H::size)};
  }
  template <class T>
  UNSWAG_INLINE void store(T* p) const {
    low.store(p);
    high.store(p + H::size);
  }
  template <class T>
  UNSWAG_INLINE void stream(T* p) const {
    low.stream(p);
    high.stream(p + H::size);
  }

  UNSWAG_INLINE friend twice operator-(twice a) { return {-a.low, -a.high}; }
  UNSWAG_INLINE friend twice operator+(twice a, twice b) { return {a.low + b.low, a.high + b.high}; }
  UNSWAG_INLINE friend twice operator-(twice a, twice b) { return {a.low - b.low, a.high - b.high}; }
  UNSWAG_INLINE friend twice operator*(twice a, twice b) { return {a.low * b.low, a.high * b.high}; }
  UNSWAG_INLINE friend twice operator/(twice a, twice b) { return {a.low / b.low, a.high / b.high}; }
  UNSWAG_INLINE friend twice fma(twice a, twice b, twice c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
  UNSWAG_INLINE friend twice min(twice a, twice b) { return {min(a.low, b.low), min(a.high, b.high)}; }
  UNSWAG_INLINE friend twice max(twice a, twice b) { return {max(a.low, b.low), max(a.high, b.high)}; }
  UNSWAG_INLINE friend twice abs(twice a) { return {abs(a.low), abs(a.high)}; }
  UNSWAG_INLINE friend twice sqrt(twice a) { return {sqrt(a.low), sqrt(a.high)}; }
  UNSWAG_INLINE friend mask operator<(twice a, twice b) { return {a.low < b.low, a.high < b.high}; }
  UNSWAG_INLINE friend mask operator<=(twice a, twice b) { return {a.low <= b.low, a.high <= b.high}; }
  UNSWAG_INLINE friend mask operator>(twice a, twice b) { return {a.low > b.low, a.high > b.high}; }
  UNSWAG_INLINE friend mask operator>=(twice a, twice b) { return {a.low >= b.low, a.high >= b.high}; }
  UNSWAG_INLINE friend mask operator==(twice a, twice b) { return {a.low == b.low, a.high == b.high}; }
  UNSWAG_INLINE friend mask operator!=(twice a, twice b) { return {a.low != b.low, a.high != b.high}; }
  UNSWAG_INLINE friend mask negative(twice a) { return {negative(a.low), negative(a.high)}; }
  UNSWAG_INLINE friend twice select(mask m, twice a, twice b) {
    return {select(m.low, a.low, b.low), select(m.high, a.high, b.high)};
  }
  UNSWAG_INLINE friend scalar reduce_add(twice a) { return reduce_add(a.low + a.high); }
  UNSWAG_INLINE friend scalar reduce_max(twice a) { return reduce_max(max(a.low, a.high)); }
  UNSWAG_INLINE friend twice product_error(twice a, twice b, twice p) {
    return {product_error(a.low, b.low, p.low), product_error(a.high, b.high, p.high)};
  }
  UNSWAG_INLINE friend twice times_pow2(twice m, twice z) { return {times_pow2(m.low, z.low), times_pow2(m.high, z.high)}; }
};

}  // namespace unswag::UNSWAG_ISA_NS
