#include "api/check.hpp"

namespace unswag {

Status philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream) {
  Check check("philox_fill", stream);
  check.words("out", out, n);
  return check.run(&Kernels::philox_fill, out, n, seed, offset);
}

Status dropout(const Dropout& args, Stream stream) {
  Check check("dropout", stream);
  check.fraction("p", args.p, true).input("x", args.x).output("y", args.y).same("y", args.y, "x", args.x);
  return check.run(&Kernels::dropout, args);
}

}  // namespace unswag
