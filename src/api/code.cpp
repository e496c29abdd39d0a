#include "api/check.hpp"

namespace unswag {

Status code_forward(const CodeForward& args, Stream stream) {
  Check check("code_forward", stream);
  check.known("act", args.act).between("bits", args.bits, 1, most_code_bits);
  if (check.ok()) check.between("count", args.count, 1, (1 << args.bits) - 1).ascending("bounds", args.bounds, args.count);
  check.input("x", args.x).output("packed", args.packed, args.x, args.bits);
  if (args.y.data) check.output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::code_forward, args);
}

Status code_backward(const CodeBackward& args, Stream stream) {
  Check check("code_backward", stream);
  check.between("bits", args.bits, 1, most_code_bits);
  if (check.ok()) check.between("count", args.count, 2, 1 << args.bits);
  for (int i = 0; check.ok() && i < args.count; ++i) check.finite("levels", args.levels[i]);
  check.input("dy", args.dy)
      .input("packed", args.packed, args.dy, args.bits)
      .output("dx", args.dx)
      .same("dx", args.dx, "dy", args.dy);
  return check.run(&Kernels::code_backward, args);
}

}  // namespace unswag
