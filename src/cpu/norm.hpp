// What the norms share: vectors beside the rows, and sums over rows.
#pragma once

#include "cpu/lanes.hpp"
#include "cpu/threads.hpp"
#include "math/row_tree.hpp"
#include "unswag/tensor.hpp"

namespace unswag::UNSWAG_ISA_NS {
namespace {

// offset + vector as a row of S: the caller's own memory when that is what it holds, a converted copy, or nullptr for no
// vector.
template <class V>
class VectorAsRow {
  using S = typename V::scalar;

 public:
  VectorAsRow(const ConstVector& vector, double offset) : copy_(needs_copy(vector, offset) ? vector.size : 0) {
    if (!needs_copy(vector, offset)) {
      row_ = static_cast<const S*>(vector.data);
      return;
    }
    visit(vector.dtype, [&](auto tag) {
      using W = typename decltype(tag)::of;
      const W* w = static_cast<const W*>(vector.data);
      each_lanes(vector.size, [&](std::int64_t i, std::int64_t n) {
        store_lanes(copy_.data() + i, V(S(offset)) + load_lanes<V>(w + i, n), n);
      });
    });
    row_ = copy_.data();
  }
  const S* data() const { return row_; }

 private:
  static bool needs_copy(const ConstVector& vector, double offset) {
    return vector.data && (offset != 0 || vector.dtype != (sizeof(S) == 8 ? DType::f64 : DType::f32));
  }
  Scratch<S> copy_;
  const S* row_;
};

// Per-row values are f32, or f64 when x is.
template <class X>
using row_scalar = typename lanes_t<X>::scalar;

// kernel.together<R>(first, block) for rows [begin, end), R rows at a time; what it adds to block[width] comes together in
// sums[width].  Without sums it is given nullptr.
template <class Kernel>
UNSWAG_INLINE void rows_of_tree(const Kernel& kernel, std::int64_t begin, std::int64_t end, std::int64_t width, double* sums,
                                double* block) {
  using math::RowTree;
  if (sums) memset(sums, 0, std::size_t(width) * sizeof(double));
  for (std::int64_t r = begin; r < end;) {
    const std::int64_t last = end - r < RowTree::block ? end : r + RowTree::block;
    if (sums) memset(block, 0, std::size_t(width) * sizeof(double));
    for (; r + RowTree::together <= last; r += RowTree::together) kernel.template together<RowTree::together>(r, block);
    for (; r < last; ++r) kernel.template together<1>(r, block);
    if (!sums) continue;
    for (std::int64_t i = 0; i < width; ++i) sums[i] += block[i];
  }
}

// The same for all rows, which adds up `vectors` vectors of `cols` sums in math::RowTree; put(i, sum) takes each.
template <class Kernel, class Put>
void over_rows(const Kernel& kernel, std::int64_t rows, std::int64_t cols, std::int64_t vectors, int threads, const Put& put) {
  const std::int64_t width = vectors * cols;
  if (vectors == 0) {
    parallel_for(rows, 4 * (1 + 4096 / (cols + 1)), threads,
                 [&](std::int64_t begin, std::int64_t end) { rows_of_tree(kernel, begin, end, 0, nullptr, nullptr); });
    return;
  }
  const math::RowTree tree{rows};
  const std::int64_t group = tree.group() * math::RowTree::block;  // rows
  const Scratch<double> sums(tree.groups() * width);
  parallel_for(rows, group, threads, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<double> block(width);
    rows_of_tree(kernel, begin, end, width, sums.data() + begin / group * width, block.data());
  });
  for (std::int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (std::int64_t g = 0; g < tree.groups(); ++g) sum += sums.data()[g * width + i];
    put(i, sum);
  }
}

}  // namespace
}  // namespace unswag::UNSWAG_ISA_NS
