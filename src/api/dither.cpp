#include "math/dither.hpp"

#include "api/check.hpp"

namespace unswag {
namespace {

Check& derivative_has_a_range(Check& check, Activation act) { return check.known("act", act).one_of("act", act, has_dither); }

}  // namespace

bool has_dither(Activation act) { return math::lowest_slope(act) < 0; }

Status dither_forward(const DitherForward& args, Stream stream) {
  Check check("dither_forward", stream);
  derivative_has_a_range(check, args.act)
      .between("bits", args.bits, 1, most_code_bits)
      .input("x", args.x)
      .output("packed", args.packed, args.x, args.bits);
  if (args.y.data) check.output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::dither_forward, args);
}

Status dither_backward(const DitherBackward& args, Stream stream) {
  Check check("dither_backward", stream);
  derivative_has_a_range(check, args.act)
      .between("bits", args.bits, 1, most_code_bits)
      .input("dy", args.dy)
      .input("packed", args.packed, args.dy, args.bits)
      .output("dx", args.dx)
      .same("dx", args.dx, "dy", args.dy);
  return check.run(&Kernels::dither_backward, args);
}

}  // namespace unswag
