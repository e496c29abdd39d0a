// What src/cpu/<op>.cpp of one instruction set define, for the row of that set in backend.cpp.
#pragma once

#include "kernels.hpp"

namespace unswag::UNSWAG_ISA_NS {

void mask_forward(const MaskForward& args, Stream stream);
void mask_backward(const MaskBackward& args, Stream stream);
void activation_forward(const ActivationForward& args, Stream stream);
void activation_backward(const ActivationBackward& args, Stream stream);
void gated_forward(const GatedForward& args, Stream stream);
void gated_backward(const GatedBackward& args, Stream stream);
void rms_norm_forward(const RmsNormForward& args, Stream stream);
void rms_norm_backward(const RmsNormBackward& args, Stream stream);
void cross_entropy(const CrossEntropy& args, Stream stream);
void philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream);
void dropout(const Dropout& args, Stream stream);

extern const Kernels backend;

}  // namespace unswag::UNSWAG_ISA_NS
