#include "api/check.hpp"

namespace unswag {

Status activation_forward(const ActivationForward& args, Stream stream) {
  Check check("activation_forward", stream);
  check.known("act", args.act).input("x", args.x).output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::activation_forward, args);
}

Status activation_backward(const ActivationBackward& args, Stream stream) {
  Check check("activation_backward", stream);
  check.known("act", args.act)
      .input("x", args.x)
      .input("dy", args.dy)
      .output("dx", args.dx)
      .same("dy", args.dy, "x", args.x)
      .same("dx", args.dx, "x", args.x);
  return check.run(&Kernels::activation_backward, args);
}

}  // namespace unswag
