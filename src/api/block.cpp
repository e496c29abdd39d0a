#include "api/check.hpp"

namespace unswag {
namespace {

std::int64_t row_bytes(const Check& check, Block codec, std::int64_t cols) {
  return check.ok() ? block_row_bytes(codec, cols) : 0;
}

}  // namespace

Status block_encode(const BlockEncode& args, Stream stream) {
  Check check("block_encode", stream);
  check.known("codec", args.codec);
  check.input("x", args.x).output("packed", args.packed, args.x.rows, row_bytes(check, args.codec, args.x.cols));
  if (check.ok() && args.stochastic && !listed(args.codec).rotated) {
    return not_supported("block_encode: 8-bit floats have no stochastic rounding; round to nearest, or use int8");
  }
  return check.run(&Kernels::block_encode, args);
}

Status block_decode(const BlockDecode& args, Stream stream) {
  Check check("block_decode", stream);
  check.known("codec", args.codec);
  check.output("x", args.x).input("packed", args.packed, args.x.rows, row_bytes(check, args.codec, args.x.cols));
  return check.run(&Kernels::block_decode, args);
}

}  // namespace unswag
