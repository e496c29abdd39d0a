#include "api/check.hpp"

namespace unswag {

Status gated_forward(const GatedForward& args, Stream stream) {
  Check check("gated_forward", stream);
  check.known("act", args.act)
      .input("gate", args.gate)
      .input("up", args.up)
      .output("h", args.h)
      .same("up", args.up, "gate", args.gate)
      .same("h", args.h, "gate", args.gate);
  return check.run(&Kernels::gated_forward, args);
}

Status gated_backward(const GatedBackward& args, Stream stream) {
  Check check("gated_backward", stream);
  check.known("act", args.act)
      .input("gate", args.gate)
      .input("up", args.up)
      .input("dh", args.dh)
      .output("dgate", args.dgate)
      .output("dup", args.dup)
      .same("up", args.up, "gate", args.gate)
      .same("dh", args.dh, "gate", args.gate)
      .same("dgate", args.dgate, "gate", args.gate)
      .same("dup", args.dup, "gate", args.gate);
  if (args.h.data) check.output("h", args.h).same("h", args.h, "gate", args.gate);
  return check.run(&Kernels::gated_backward, args);
}

}  // namespace unswag
