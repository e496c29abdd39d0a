#include "math/layer_norm.hpp"

#include "api/check.hpp"

namespace unswag {

Status layer_norm_forward(const LayerNormForward& args, Stream stream) {
  Check check("layer_norm_forward", stream);
  check.not_negative("eps", args.eps)
      .input("x", args.x)
      .output("y", args.y)
      .same_shape("y", args.y, "x", args.x)
      .vector_of("mean", args.mean, "rows", args.x.rows, "x", args.x.dtype)
      .vector_of("rstd", args.rstd, "rows", args.x.rows, "x", args.x.dtype);
  if (args.statistics_given) {
    check.input("mean", ConstVector{args.mean.data, args.mean.dtype, args.mean.size})
        .input("rstd", ConstVector{args.rstd.data, args.rstd.dtype, args.rstd.size});
  } else {
    check.output("mean", args.mean).output("rstd", args.rstd);
  }
  if (args.weight.data) check.input("weight", args.weight).vector_size("weight", args.weight.size, "columns", args.x.cols, "x");
  if (args.bias.data) check.input("bias", args.bias).vector_size("bias", args.bias.size, "columns", args.x.cols, "x");
  // Rows without columns: the mean of nothing is NaN, as in torch.
  if (!args.statistics_given) check.fill_if_empty(args.mean, std::nan("")).fill_if_empty(args.rstd, std::nan(""));
  return check.run(&Kernels::layer_norm_forward, args);
}

Status layer_norm_backward(const LayerNormBackward& args, Stream stream) {
  Check check("layer_norm_backward", stream);
  check.input("x", args.x)
      .input("dy", args.dy)
      .input("mean", args.mean)
      .input("rstd", args.rstd)
      .same_shape("dy", args.dy, "x", args.x)
      .vector_of("mean", args.mean, "rows", args.x.rows, "x", args.x.dtype)
      .vector_of("rstd", args.rstd, "rows", args.x.rows, "x", args.x.dtype);
  if (args.weight.data) check.input("weight", args.weight).vector_size("weight", args.weight.size, "columns", args.x.cols, "x");
  if (args.dx.data) check.output("dx", args.dx).same("dx", args.dx, "x", args.x);
  if (args.dw.data) check.output("dw", args.dw).vector_of("dw", args.dw, "columns", args.x.cols, "x", args.x.dtype);
  if (args.db.data) check.output("db", args.db).vector_of("db", args.db, "columns", args.x.cols, "x", args.x.dtype);
  if (args.dw.data || args.db.data) {
    check.scratch("scratch", args.scratch, layer_norm_backward_scratch(args.x.rows, args.x.cols));
  }
  // Columns without rows: the sum of nothing is 0.
  if (args.dw.data) check.fill_if_empty(args.dw, 0);
  if (args.db.data) check.fill_if_empty(args.db, 0);
  return check.run(&Kernels::layer_norm_backward, args);
}

std::int64_t layer_norm_backward_scratch(std::int64_t rows, std::int64_t cols) {
  return 2 * rms_norm_backward_scratch(rows, cols);
}

}  // namespace unswag
