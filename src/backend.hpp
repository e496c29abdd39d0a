// What the sources of one backend define in its namespace, and its row of the table.
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
void layer_norm_forward(const LayerNormForward& args, Stream stream);
void layer_norm_backward(const LayerNormBackward& args, Stream stream);
void cross_entropy(const CrossEntropy& args, Stream stream);
void block_encode(const BlockEncode& args, Stream stream);
void block_decode(const BlockDecode& args, Stream stream);
void philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream);
void dropout(const Dropout& args, Stream stream);
void code_forward(const CodeForward& args, Stream stream);
void code_backward(const CodeBackward& args, Stream stream);
void dither_forward(const DitherForward& args, Stream stream);
void dither_backward(const DitherBackward& args, Stream stream);
void nonzero_count(const NonzeroCount& args, Stream stream);
void nonzero_encode(const NonzeroEncode& args, Stream stream);
void nonzero_decode(const NonzeroDecode& args, Stream stream);

constexpr Kernels row(const char* name, bool (*runs_here)()) {
  Kernels k;
  k.name = name;
  k.runs_here = runs_here;
  k.mask_forward = mask_forward;
  k.mask_backward = mask_backward;
  k.activation_forward = activation_forward;
  k.activation_backward = activation_backward;
  k.gated_forward = gated_forward;
  k.gated_backward = gated_backward;
  k.rms_norm_forward = rms_norm_forward;
  k.rms_norm_backward = rms_norm_backward;
  k.layer_norm_forward = layer_norm_forward;
  k.layer_norm_backward = layer_norm_backward;
  k.cross_entropy = cross_entropy;
  k.block_encode = block_encode;
  k.block_decode = block_decode;
  k.philox_fill = philox_fill;
  k.dropout = dropout;
  k.code_forward = code_forward;
  k.code_backward = code_backward;
  k.dither_forward = dither_forward;
  k.dither_backward = dither_backward;
  k.nonzero_count = nonzero_count;
  k.nonzero_encode = nonzero_encode;
  k.nonzero_decode = nonzero_decode;
  return k;
}

}  // namespace unswag::UNSWAG_ISA_NS
