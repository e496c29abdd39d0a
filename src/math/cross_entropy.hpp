// Softmax cross-entropy of one row of logits.  With z_c = softcap tanh(logit_scale logit_c / softcap), or logit_scale logit_c,
//   lse  = log sum exp z,  p_c = exp(z_c - lse)
//   loss = confidence (lse - z_y) + smoothing sum over c of w_c (lse - z_c)
//   d loss / d z_c = (confidence + smoothing W) p_c - smoothing w_c - [c = y] confidence,   W = sum over c of w_c
// where y is the label, confidence = (1 - label_smoothing) w_y and smoothing = label_smoothing / classes.
//
// The label's own term is kept apart from the others' in the sum of exponentials, because
//   lse - z_y = log1p(others / own)  and  p_y - 1 = -others / (others + own)
// keep their digits when the label is almost certain, and (lse) - z_y and p_y - 1 as they stand have none left then.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/tanh.hpp"

namespace unswag::math {

// z of a logit: two kinds, over float, double or lanes.  z rises with the logit, or falls where logit_scale is negative, also
// as it is rounded: tanh does for every float.
template <class V>
struct LinearLogit {
  V scale;
  LinearLogit(double logit_scale, double) : scale(scalar_t<V>(logit_scale)) {}

  UNSWAG_HD V z(V logit) const { return scale * logit; }
  UNSWAG_HD V z_minus(V logit, V max) const { return fma(scale, logit, -max); }  // rounded once
  UNSWAG_HD V times_slope(V gradient, V) const { return gradient; }              // dz / dlogit, without logit_scale
};
template <class V>
struct SoftcapLogit {
  V inner, cap;
  SoftcapLogit(double logit_scale, double softcap) : inner(scalar_t<V>(logit_scale / softcap)), cap(scalar_t<V>(softcap)) {}

  UNSWAG_HD V z(V logit) const { return cap * tanh(inner * logit); }
  UNSWAG_HD V z_minus(V logit, V max) const { return fma(cap, tanh(inner * logit), -max); }
  UNSWAG_HD V times_slope(V gradient, V logit) const {
    const V t = tanh(inner * logit);
    return gradient * fma(-t, t, V(1));
  }
};

// Whether e^x is a normal number, which exp_normal computes as exp does, for x and all above it that are not above 0.
UNSWAG_HD inline bool exp_is_normal(float x) { return x > -87.f; }
UNSWAG_HD inline bool exp_is_normal(double) { return false; }  // exp_normal is for floats

// sum of exp(z - max) over some classes.  No class, or only classes with z = -inf: max = -inf and sum = 0.
struct ExpSum {
  double max = -HUGE_VAL;
  double sum = 0;
};

// Of two parts, as in online softmax (Milakov & Gimelshein 2018).  A NaN in a sum stays there.
UNSWAG_HD inline ExpSum merge(ExpSum a, ExpSum b) {
  if (a.max == -HUGE_VAL && a.sum == 0) return b;
  if (b.max == -HUGE_VAL && b.sum == 0) return a;
  if (a.max >= b.max) return {a.max, a.sum + b.sum * ::exp(b.max - a.max)};
  return {b.max, b.sum + a.sum * ::exp(a.max - b.max)};
}

// A row's softmax, seen from its label.  others.max is the maximum over all classes, the label too; others.sum leaves it out.
struct LabelSplit {
  double own, total, lse;
  double nll;  // lse - z_label

  UNSWAG_HD LabelSplit(ExpSum others, double z_label)
      : own(::exp(z_label - others.max)), total(others.sum + own), lse(others.max + ::log(total)), nll(lse - z_label) {
    if (own > 1e-300) nll = ::log1p(others.sum / own);
  }
};

// What is done with a row, from its sums.  The gradient, times `factor`, is  of_p exp(z_c - others.max) + of_w w_c  for all
// classes but the label, and of_label for that.
struct RowLoss {
  double loss, lse, of_p, of_w, of_label;

  // total_weight: W;  weighted_z: sum over c of w_c z_c, which only smoothing needs
  UNSWAG_HD RowLoss(ExpSum others, double z_label, double w_label, double label_smoothing, double classes, double total_weight,
                    double weighted_z, double factor) {
    const LabelSplit split(others, z_label);
    const double confidence = (1 - label_smoothing) * w_label, smoothing = label_smoothing / classes;
    loss = confidence * split.nll;
    if (label_smoothing > 0) loss += smoothing * (total_weight * split.lse - weighted_z);
    lse = split.lse;
    of_p = factor * (confidence + smoothing * total_weight) / split.total;
    of_w = -factor * smoothing;
    const double gradient =
        -confidence * others.sum / split.total + smoothing * (total_weight * split.own / split.total - w_label);
    of_label = factor * gradient;
  }
};

}  // namespace unswag::math
