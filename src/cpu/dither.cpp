// Subtractive dither of a derivative: the forward and the backward draw the same numbers.
#include "math/dither.hpp"

#include "backend.hpp"
#include "cpu/codes.hpp"
#include "cpu/draws.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr std::int64_t stretch = Window::kSize;

template <class T, int bits>
void forward(const DitherForward& args, Stream stream) {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  const auto dither = math::dither_of<S>(args.act, bits);
  const Search<bits, S> whole(math::whole_bounds<S>());
  const Draws draws{args.seed, args.offset};
  encode_codes<T, bits, stretch>(
      args, stream, [&](std::int64_t r, std::int64_t i, const T* x, std::int64_t n, std::uint8_t* packed) {
        Window window;
        S slope[stretch], v[stretch];
        activation_slopes(args.act, args.x.dtype, x, slope, n);
        window.units(draws, r * args.x.cols + i, n, v);
        each_lanes(n, [&](std::int64_t k, std::int64_t count) {
          store_lanes(slope + k, dither.dithered(load_lanes<V>(slope + k, count), load_lanes<V>(v + k, count)), count);
        });
        write_codes<bits>(slope, n, whole, packed);
      });
}

template <class T, int bits>
void backward(const DitherBackward& args, Stream stream) {
  using V = lanes_t<T>;
  using S = typename V::scalar;
  const auto dither = math::dither_of<S>(args.act, bits);
  S whole[1 << bits];
  for (int code = 0; code < 1 << bits; ++code) whole[code] = S(code);
  const table<bits, S> codes(whole);
  const Draws draws{args.seed, args.offset};
  decode_codes<T, bits, stretch>(
      args, stream, [&](std::int64_t r, std::int64_t i, std::int64_t n, const std::uint8_t* packed, S* factor) {
        Window window;
        S v[stretch];
        read_factors(codes, packed, n, factor);
        window.units(draws, r * args.dy.cols + i, n, v);
        each_lanes(n, [&](std::int64_t k, std::int64_t count) {
          store_lanes(factor + k, dither.factor(load_lanes<V>(factor + k, count), load_lanes<V>(v + k, count)), count);
        });
      });
}

}  // namespace

void dither_forward(const DitherForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { forward<T, decltype(bits)::value>(args, stream); });
  });
}

void dither_backward(const DitherBackward& args, Stream stream) {
  visit(args.dy.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { backward<T, decltype(bits)::value>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
