#include "api/check.hpp"

namespace unswag {

Status block_encode(const BlockEncode& args, Stream stream) {
  Check check("block_encode", stream);
  check.known("codec", args.codec, Block::e5m2)
      .input("x", args.x)
      .output("packed", args.packed, args.x.rows, block_row_bytes(args.codec, args.x.cols));
  if (check.ok() && args.stochastic && args.codec >= Block::e4m3) {
    return not_supported("block_encode: 8-bit floats have no stochastic rounding; round to nearest, or use int8");
  }
  return check.run(&Kernels::block_encode, args);
}

Status block_decode(const BlockDecode& args, Stream stream) {
  Check check("block_decode", stream);
  check.known("codec", args.codec, Block::e5m2)
      .output("x", args.x)
      .input("packed", args.packed, args.x.rows, block_row_bytes(args.codec, args.x.cols));
  return check.run(&Kernels::block_decode, args);
}

}  // namespace unswag
