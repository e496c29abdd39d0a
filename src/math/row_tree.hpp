// The order in which the gradients of weights are summed over rows.
#pragma once

#include <cstdint>

#include "math/hd.hpp"

namespace unswag::math {

// The one tree: four rows are added up in float, four of these in double (a block), then the blocks of a group, then the
// groups, of which there are at most 64.  Its shape depends on `rows` alone.
struct RowTree {
  static constexpr std::int64_t together = 4, block = 16;
  std::int64_t rows;
  UNSWAG_HD constexpr std::int64_t blocks() const { return (rows + block - 1) / block; }
  UNSWAG_HD constexpr std::int64_t group() const { return blocks() <= 256 ? 4 : (blocks() + 63) / 64; }  // blocks
  UNSWAG_HD constexpr std::int64_t groups() const { return (blocks() + group() - 1) / group(); }
};

}  // namespace unswag::math
