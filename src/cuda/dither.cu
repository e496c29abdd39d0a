// Subtractive dither of a derivative: the forward and the backward draw the same numbers.
#include "backend.hpp"
#include "cuda/draws.hpp"
#include "cuda/fields.hpp"
#include "math/dither.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct DitherCodes {
  static constexpr int resident = sizeof(T) == 8 ? 2 : 0;  // in doubles it would spill a register
  using V = compute_t<T>;

  math::Dither<V> dither;
  math::Bounds<V> whole;
  std::uint64_t seed, offset;

  UNSWAG_HD std::uint32_t fields(Eight<T>& x, int n, std::int64_t first, bool value, int bits) const {
    const Eight<V> v = units<V>(seed, offset, first);
    std::uint32_t fields = 0;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) {
      const V element_x = UNSWAG_ISA_NS::value<V>(x.e[k]);
      const V dithered = dither.dithered(math::backward<T>(Act{}, element_x, V(1)), v.e[k]);
      if (k < n) fields |= math::code_of(dithered, whole, bits) << (k * bits);
      if (value) x.e[k] = element<T>(math::forward<T>(Act{}, element_x));
    }
    return fields;
  }
};

template <class T>
struct DitherFactors {
  using Shared = Nothing;
  using V = compute_t<T>;

  math::Dither<V> dither;
  std::uint64_t seed, offset;

  template <class Group>
  UNSWAG_HD void begin(const Group&, Nothing&) const {}
  UNSWAG_HD Eight<V> factor(const Nothing&, std::uint32_t fields, std::int64_t first, int bits) const {
    const Eight<V> v = units<V>(seed, offset, first);
    Eight<V> factor;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) factor.e[k] = dither.factor(V(math::field(fields, k, bits)), v.e[k]);
    return factor;
  }
};

}  // namespace

void dither_forward(const DitherForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    using V = compute_t<T>;
    math::AllActivations::visit(args.act, [&](auto act) {
      using Act = decltype(act);
      if constexpr (Act::lowest_slope < 0) {
        const DitherCodes<T, Act> codes{math::dither_of<V>(args.act, args.bits), math::whole_bounds<V>(), args.seed,
                                        args.offset};
        encode_fields<T>(args, codes, stream);
      }
    });
  });
}

void dither_backward(const DitherBackward& args, Stream stream) {
  math::visit(args.dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    using V = compute_t<T>;
    const DitherFactors<T> factors{math::dither_of<V>(args.act, args.bits), args.seed, args.offset};
    decode_fields<T>(args, factors, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
