#include "api/check.hpp"

namespace unswag {
namespace {

void derivative_has_a_range(Check& check, Activation act) {
  check.known("act", act, Activation::gelu_tanh);  // silu, gelu, gelu_tanh: math::lowest_slope
}

}  // namespace

Status dither_forward(const DitherForward& args, Stream stream) {
  Check check("dither_forward", stream);
  derivative_has_a_range(check, args.act);
  check.between("bits", args.bits, 1, 4).input("x", args.x).output("packed", args.packed, args.x, args.bits);
  if (args.y.data) check.output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::dither_forward, args);
}

Status dither_backward(const DitherBackward& args, Stream stream) {
  Check check("dither_backward", stream);
  derivative_has_a_range(check, args.act);
  check.between("bits", args.bits, 1, 4)
      .input("dy", args.dy)
      .input("packed", args.packed, args.dy, args.bits)
      .output("dx", args.dx)
      .same("dx", args.dx, "dy", args.dy);
  return check.run(&Kernels::dither_backward, args);
}

}  // namespace unswag
