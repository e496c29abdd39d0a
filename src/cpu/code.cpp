// Step codes: encode beside the forward, factors by table in the backward.
#include "backend.hpp"
#include "cpu/codes.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

constexpr std::int64_t stretch = 512;

template <class T, int bits>
void forward(const CodeForward& args, Stream stream) {
  using S = typename lanes_t<T>::scalar;
  const Search<bits, S> search(math::bounds_of<S>(args.bounds, args.count));
  encode_codes<T, bits, stretch>(args, stream,
                                 [&](std::int64_t, std::int64_t, const T* x, std::int64_t n, std::uint8_t* packed) {
                                   if (args.of_derivative) {
                                     S slope[stretch];
                                     activation_slopes(args.act, args.x.dtype, x, slope, n);
                                     write_codes<bits>(slope, n, search, packed);
                                   } else {
                                     write_codes<bits>(x, n, search, packed);
                                   }
                                 });
}

template <class T, int bits>
void backward(const CodeBackward& args, Stream stream) {
  using S = typename lanes_t<T>::scalar;
  const table<bits, S> levels(math::levels_of<S>(args.levels, args.count).at);
  decode_codes<T, bits, stretch>(args, stream,
                                 [&](std::int64_t, std::int64_t, std::int64_t n, const std::uint8_t* packed, S* factor) {
                                   read_factors(levels, packed, n, factor);
                                 });
}

}  // namespace

void code_forward(const CodeForward& args, Stream stream) {
  visit(args.x.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { forward<T, decltype(bits)::value>(args, stream); });
  });
}

void code_backward(const CodeBackward& args, Stream stream) {
  visit(args.dy.dtype, [&]<class T>(math::type<T>) {
    visit_bits(args.bits, [&](auto bits) { backward<T, decltype(bits)::value>(args, stream); });
  });
}

}  // namespace unswag::UNSWAG_ISA_NS
