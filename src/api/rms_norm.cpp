#include "math/rms_norm.hpp"

#include "api/check.hpp"

namespace unswag {

Status rms_norm_forward(const RmsNormForward& args, Stream stream) {
  Check check("rms_norm_forward", stream);
  check.not_negative("eps", args.eps)
      .finite("weight_offset", args.weight_offset)
      .input("x", args.x)
      .output("y", args.y)
      .same_shape("y", args.y, "x", args.x)
      .vector_of("rstd", args.rstd, "rows", args.x.rows, "x", args.x.dtype);
  if (args.rstd_given) {
    check.input("rstd", ConstVector{args.rstd.data, args.rstd.dtype, args.rstd.size});
  } else {
    check.output("rstd", args.rstd);
  }
  if (args.weight.data) check.input("weight", args.weight).vector_size("weight", args.weight.size, "columns", args.x.cols, "x");
  // Rows without columns: the mean of nothing is NaN, as in torch.
  if (!args.rstd_given) check.fill_if_empty(args.rstd, std::nan(""));
  return check.run(&Kernels::rms_norm_forward, args);
}

Status rms_norm_backward(const RmsNormBackward& args, Stream stream) {
  Check check("rms_norm_backward", stream);
  check.finite("weight_offset", args.weight_offset)
      .input("x", args.x)
      .input("dy", args.dy)
      .input("rstd", args.rstd)
      .same_shape("dy", args.dy, "x", args.x)
      .vector_of("rstd", args.rstd, "rows", args.x.rows, "x", args.x.dtype);
  if (args.weight.data) check.input("weight", args.weight).vector_size("weight", args.weight.size, "columns", args.x.cols, "x");
  if (args.dx.data) check.output("dx", args.dx).same("dx", args.dx, "x", args.x);
  if (args.dw.data) check.output("dw", args.dw).vector_of("dw", args.dw, "columns", args.x.cols, "x", args.x.dtype);
  if (args.dw.data) check.scratch("scratch", args.scratch, rms_norm_backward_scratch(args.x.rows, args.x.cols));
  // Columns without rows: the sum of nothing is 0.
  if (args.dw.data) check.fill_if_empty(args.dw, 0);
  return check.run(&Kernels::rms_norm_backward, args);
}

std::int64_t rms_norm_backward_scratch(std::int64_t rows, std::int64_t cols) {
  const math::RowTree tree{rows};
  return (tree.blocks() + tree.groups()) * cols * std::int64_t{sizeof(double)};
}

}  // namespace unswag
