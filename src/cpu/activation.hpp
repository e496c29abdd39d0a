// Activations of stretches of a row, for kernels that do more with x than this.
#pragma once

#include "unswag/unswag.hpp"

namespace unswag::UNSWAG_ISA_NS {

// y = act(x) of n adjacent elements; streaming: past the cache.
void activation_values(Activation act, DType dtype, const void* x, void* y, std::int64_t n, bool streaming);

// slope = act'(x), not rounded to x's dtype: floats, doubles of f64.
void activation_slopes(Activation act, DType dtype, const void* x, void* slope, std::int64_t n);

}  // namespace unswag::UNSWAG_ISA_NS
