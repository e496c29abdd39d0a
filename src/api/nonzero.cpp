#include "api/check.hpp"

namespace unswag {

Status nonzero_count(const NonzeroCount& args, Stream stream) {
  Check check("nonzero_count", stream);
  check.input("x", args.x).counts("counts", args.counts, args.x.rows);
  // Rows without columns: eight bytes of 0 are the integer 0 too.
  check.fill_if_empty({args.counts, DType::f64, args.x.rows}, 0);
  return check.run(&Kernels::nonzero_count, args);
}

Status nonzero_encode(const NonzeroEncode& args, Stream stream) {
  Check check("nonzero_encode", stream);
  check.input("x", args.x)
      .output("bitmap", args.bitmap, args.x)
      .offsets("offsets", args.offsets, args.x.rows, args.values.size)
      .same_dtype("values", args.values.dtype, "x", args.x.dtype);
  if (args.values.size != 0) check.output("values", args.values);  // without any there is a bitmap to write still
  return check.run(&Kernels::nonzero_encode, args);
}

Status nonzero_decode(const NonzeroDecode& args, Stream stream) {
  Check check("nonzero_decode", stream);
  const ConstRows shape{args.x.data, args.x.dtype, args.x.rows, args.x.cols, args.x.stride};
  check.output("x", args.x)
      .input("bitmap", args.bitmap, shape)
      .offsets("offsets", args.offsets, args.x.rows, args.values.size)
      .same_dtype("values", args.values.dtype, "x", args.x.dtype);
  if (args.values.size != 0) check.input("values", args.values);
  return check.run(&Kernels::nonzero_decode, args);
}

}  // namespace unswag
