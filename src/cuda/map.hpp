// Elementwise kernels: out = F::apply(in...) over whole tensors of one shape and type.
#pragma once

#include "cuda/eight.hpp"

namespace unswag::UNSWAG_ISA_NS {

template <class V, int n>
struct Values {
  V v[n];
};

// F::apply<V>(const Values<V, In>&) -> Values<V, Out>, in compute_t<T>.
template <class F, class T, int In, int Out>
struct Map {
  static constexpr int threads = 256, resident = 0;
  using Shared = Nothing;

  ConstRows in[In];
  Rows out[Out];
  bool wide;

  template <class Group>
  UNSWAG_HD void operator()(const Group& g, Nothing&) const {
    using V = compute_t<T>;
    const std::int64_t cols = out[0].cols;
    share_eights(g, out[0].rows, divided_up(cols, 8), cols, [&](std::int64_t row, std::int64_t col, int n) {
      Eight<T> x[In], y[Out];
      UNSWAG_UNROLL
      for (int i = 0; i < In; ++i) x[i] = load_eight(row_of<T>(in[i], row) + col, n, wide);
      UNSWAG_UNROLL
      for (int k = 0; k < 8; ++k) {
        Values<V, In> one;
        UNSWAG_UNROLL
        for (int i = 0; i < In; ++i) one.v[i] = value<V>(x[i].e[k]);
        const Values<V, Out> result = F::apply(one);
        UNSWAG_UNROLL
        for (int o = 0; o < Out; ++o) y[o].e[k] = element<T>(result.v[o]);
      }
      UNSWAG_UNROLL
      for (int o = 0; o < Out; ++o) store_eight(row_of<T>(out[o], row) + col, y[o], n, wide);
    });
  }
};

// Rows that follow each other without a gap in all of the tensors are one long row.
template <int In, int Out>
void join_rows(ConstRows (&in)[In], Rows (&out)[Out]) {
  const std::int64_t rows = out[0].rows, cols = out[0].cols;
  bool dense = true;
  for (const ConstRows& x : in) dense = dense && x.stride == cols;
  for (const Rows& y : out) dense = dense && y.stride == cols;
  if (!dense) return;
  for (ConstRows& x : in) x.rows = rows > 0, x.cols = x.stride = rows * cols;
  for (Rows& y : out) y.rows = rows > 0, y.cols = y.stride = rows * cols;
}

template <class F, class T, int In, int Out>
void map(const ConstRows (&in)[In], const Rows (&out)[Out], Stream stream) {
  Map<F, T, In, Out> kernel;
  for (int i = 0; i < In; ++i) kernel.in[i] = in[i];
  for (int o = 0; o < Out; ++o) kernel.out[o] = out[o];
  join_rows(kernel.in, kernel.out);
  kernel.wide = true;
  for (const ConstRows& x : kernel.in) kernel.wide = kernel.wide && aligned<T>(x);
  for (const Rows& y : kernel.out) kernel.wide = kernel.wide && aligned<T>(y);
  launch_for(kernel, kernel.out[0].rows * divided_up(kernel.out[0].cols, 8), stream);
}

}  // namespace unswag::UNSWAG_ISA_NS
