#include "api/check.hpp"

namespace unswag {

Status mask_forward(const MaskForward& args, Stream stream) {
  Check check("mask_forward", stream);
  check.known("act", args.act).finite("slope", args.slope).input("x", args.x).output("packed", args.packed, args.x);
  if (args.y.data) check.output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::mask_forward, args);
}

Status mask_backward(const MaskBackward& args, Stream stream) {
  Check check("mask_backward", stream);
  check.known("act", args.act)
      .finite("slope", args.slope)
      .input("dy", args.dy)
      .input("packed", args.packed, args.dy)
      .output("dx", args.dx)
      .same("dx", args.dx, "dy", args.dy);
  return check.run(&Kernels::mask_backward, args);
}

}  // namespace unswag
