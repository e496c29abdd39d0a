#include <limits>

#include "api/check.hpp"

namespace unswag {

Status cross_entropy(const CrossEntropy& args, Stream stream) {
  const Rows& logits = args.logits;
  Check check("cross_entropy", stream);
  check.fraction("label_smoothing", args.label_smoothing, false)
      .not_negative("softcap", args.softcap)
      .finite("logit_scale", args.logit_scale);
  if (args.write_gradient) {
    check.output("logits", logits);
  } else {
    check.input("logits", ConstRows{logits.data, logits.dtype, logits.rows, logits.cols, logits.stride});
  }
  check.output("loss", args.loss).vector_of("loss", args.loss, "rows", logits.rows, "logits", logits.dtype);
  if (args.lse.data) check.output("lse", args.lse).vector_of("lse", args.lse, "rows", logits.rows, "logits", logits.dtype);
  if (args.class_weight.data) {
    check.input("class_weight", args.class_weight)
        .vector_of("class_weight", args.class_weight, "classes", logits.cols, "logits", logits.dtype);
  }
  if (args.row_scale.data) {
    check.input("row_scale", args.row_scale)
        .vector_of("row_scale", args.row_scale, "rows", logits.rows, "logits", logits.dtype);
  }
  check.labels(args.labels, logits.rows, logits.cols, args.ignore_index);
  // Without classes every row is an ignored one, and lse is the logarithm of nothing.
  check.fill_if_empty(args.loss, 0);
  if (args.lse.data) check.fill_if_empty(args.lse, -std::numeric_limits<double>::infinity());
  return check.run(&Kernels::cross_entropy, args);
}

}  // namespace unswag
