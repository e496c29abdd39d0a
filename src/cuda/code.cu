// Step codes: a worker makes the codes of eight elements, which are whole bytes.
#include "backend.hpp"
#include "cuda/fields.hpp"
#include "math/activations.hpp"
#include "math/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

template <class T, class Act>
struct StepCodes {
  static constexpr int resident = sizeof(T) == 8 ? 1 : 0;
  using V = compute_t<T>;

  math::Bounds<V> bounds;
  bool of_derivative;

  UNSWAG_HD std::uint32_t fields(Eight<T>& x, int n, std::int64_t, bool value, int bits) const {
    std::uint32_t fields = 0;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) {
      const V element_x = UNSWAG_ISA_NS::value<V>(x.e[k]);
      V of_x = element_x, slope = element_x;
      if (value || of_derivative) math::forward_backward<T>(Act{}, element_x, V(1), of_x, slope);
      if (k < n) fields |= math::code_of(of_derivative ? slope : element_x, bounds, bits) << (k * bits);
      x.e[k] = element<T>(of_x);
    }
    return fields;
  }
};

template <class T>
struct StepFactors {
  using V = compute_t<T>;
  struct Shared {
    math::Levels<V> levels;  // sixteen words in sixteen banks
  };

  math::Levels<V> levels;

  template <class Group>
  UNSWAG_HD void begin(const Group& g, Shared& shared) const {
    share(g, 1 << most_code_bits, [&](std::int64_t i) { shared.levels.at[i] = levels.at[i]; });
    g.sync();
  }
  UNSWAG_HD Eight<V> factor(const Shared& shared, std::uint32_t fields, std::int64_t, int bits) const {
    Eight<V> factor;
    UNSWAG_UNROLL
    for (int k = 0; k < 8; ++k) factor.e[k] = shared.levels.at[math::field(fields, k, bits)];
    return factor;
  }
};

}  // namespace

void code_forward(const CodeForward& args, Stream stream) {
  math::visit(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    const auto bounds = math::bounds_of<compute_t<T>>(args.bounds, args.count);
    math::AllActivations::visit(
        args.act, [&](auto act) { encode_fields<T>(args, StepCodes<T, decltype(act)>{bounds, args.of_derivative}, stream); });
  });
}

void code_backward(const CodeBackward& args, Stream stream) {
  math::visit(args.dy.dtype, [&](auto tag) {
    using T = typename decltype(tag)::of;
    decode_fields<T>(args, StepFactors<T>{math::levels_of<compute_t<T>>(args.levels, args.count)}, stream);
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
