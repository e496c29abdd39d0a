// The checks of the entry points, their error texts, and the choice of the kernels.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "api/check.hpp"

namespace unswag {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

#define EXPECT_ERROR(call, expected_code, text)                        \
  do {                                                                 \
    const Status got = call;                                           \
    EXPECT_EQ(got.code(), StatusCode::expected_code) << got.message(); \
    EXPECT_EQ(got.message(), text);                                    \
  } while (false)

// 4 KiB for whatever a test needs; all bytes are 0xab, so that a write shows.
struct Memory {
  alignas(64) std::array<std::uint8_t, 4096> bytes;
  Memory() { bytes.fill(0xab); }
  void* at(std::size_t offset) { return bytes.data() + offset; }
  Rows rows(std::size_t offset, std::int64_t rows, std::int64_t cols, DType dtype = DType::f32) {
    return {at(offset), dtype, rows, cols, cols};
  }
  Vector vector(std::size_t offset, std::int64_t size, DType dtype = DType::f32) { return {at(offset), dtype, size}; }
  bool untouched() const {
    return std::ranges::all_of(bytes, [](std::uint8_t byte) { return byte == 0xab; });
  }
};

ConstRows in(const Rows& x) { return {x.data, x.dtype, x.rows, x.cols, x.stride}; }
ConstVector in(const Vector& x) { return {x.data, x.dtype, x.size}; }

// ---- what is refused, op by op -----------------------------------------------------------------------------------------

struct MaskArgs : MaskForward {
  Memory memory;
  MaskArgs() {
    x = in(memory.rows(0, 3, 5));
    y = memory.rows(64, 3, 5);
    packed = {&memory.bytes[128], 4};
  }
};

TEST(MaskForward, RefusesWhatDoesNotFit) {
  const auto with = [](auto change) {
    MaskArgs args;
    change(args);
    Status status = mask_forward(args);
    EXPECT_TRUE(args.memory.untouched());
    return status;
  };
  EXPECT_ERROR(with([](auto& a) { a.y.cols = 4; }), invalid_argument,
               "mask_forward: y has the shape [3, 4] but x has [3, 5]; pass a y of the shape of x");
  EXPECT_ERROR(with([](auto& a) { a.y.dtype = DType::f16; }), invalid_type,
               "mask_forward: y is float16 but x is float32; convert y to float32");
  EXPECT_ERROR(with([](auto& a) { a.act = Mask{6}; }), invalid_argument,
               "mask_forward: act is 6, which is not one of its 6 values");
  EXPECT_ERROR(with([](auto& a) { a.x.dtype = DType{4}; }), invalid_type,
               "mask_forward: x has the unknown dtype code 4; use float32, float16, bfloat16 or float64");
  EXPECT_ERROR(with([](auto& a) { a.slope = kNan; }), invalid_argument, "mask_forward: slope is nan; pass a finite number");
  EXPECT_ERROR(with([](auto& a) { a.x.data = nullptr; }), invalid_argument,
               "mask_forward: x is null but has 3 x 5 elements; pass its memory");
  EXPECT_ERROR(with([](auto& a) { a.packed.data = nullptr; }), invalid_argument,
               "mask_forward: packed is null but has 3 x 4 elements; pass its memory");
  EXPECT_ERROR(with([](auto& a) { a.x.rows = -3; }), invalid_argument,
               "mask_forward: x has the shape [-3, 5]; sizes cannot be negative");
  EXPECT_ERROR(with([](auto& a) { a.x.data = &a.memory.bytes[2]; }), invalid_type,
               "mask_forward: x begins at an address that is no multiple of its 4-byte elements; pass an aligned copy");
  EXPECT_ERROR(with([](auto& a) { a.y.stride = 4; }), invalid_argument,
               "mask_forward: rows of y are 4 apart but 5 long, so that writing one would overwrite the next; pass a tensor "
               "whose rows do not overlap");
  EXPECT_ERROR(with([](auto& a) { a.packed.stride = 0; }), invalid_argument,
               "mask_forward: rows of packed are 0 apart but 4 long, so that writing one would overwrite the next; pass a "
               "tensor whose rows do not overlap");
  EXPECT_ERROR(with([](auto& a) { a.y.data = &a.memory.bytes[56]; }), invalid_argument,
               "mask_forward: y is written but shares memory with x; pass separate memory");
  EXPECT_ERROR(with([](auto& a) { a.packed.data = &a.memory.bytes[59]; }), invalid_argument,
               "mask_forward: packed is written but shares memory with x; pass separate memory");
  EXPECT_ERROR(
      with([](auto& a) { a.x.stride = std::int64_t{1} << 61; }), invalid_argument,
      "mask_forward: x with 3 rows of 5 elements, 2305843009213693952 apart, does not fit into 64-bit addresses; check "
      "its sizes and stride");
}

TEST(MaskBackward, RefusesWhatDoesNotFit) {
  Memory memory;
  const MaskBackward good{.dy = in(memory.rows(0, 3, 33)), .packed = {&memory.bytes[512], 8}, .dx = memory.rows(1024, 3, 33)};
  MaskBackward args = good;
  args.dx.dtype = DType::bf16;
  EXPECT_ERROR(mask_backward(args), invalid_type, "mask_backward: dx is bfloat16 but dy is float32; convert dx to float32");
  args = good;
  args.dx.data = memory.at(512 + 2 * 8 + 4);
  EXPECT_ERROR(mask_backward(args), invalid_argument,
               "mask_backward: dx is written but shares memory with packed; pass separate memory");
  args.dx.data = memory.at(0);
  EXPECT_ERROR(mask_backward(args), invalid_argument,
               "mask_backward: dx is written but shares memory with dy; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Activation, RefusesWhatDoesNotFit) {
  Memory memory;
  const ConstRows x = in(memory.rows(0, 2, 8)), dy = in(memory.rows(64, 2, 8));
  const Rows out = memory.rows(128, 2, 8);
  EXPECT_ERROR(activation_forward({.act = Activation{6}, .x = x, .y = out}), invalid_argument,
               "activation_forward: act is 6, which is not one of its 6 values");
  EXPECT_ERROR(activation_forward({.x = x, .y = memory.rows(128, 4, 4)}), invalid_argument,
               "activation_forward: y has the shape [4, 4] but x has [2, 8]; pass a y of the shape of x");
  EXPECT_ERROR(activation_backward({.x = x, .dy = in(memory.rows(64, 2, 8, DType::f16)), .dx = out}), invalid_type,
               "activation_backward: dy is float16 but x is float32; convert dy to float32");
  EXPECT_ERROR(activation_backward({.x = x, .dy = dy, .dx = memory.rows(64, 2, 8)}), invalid_argument,
               "activation_backward: dx is written but shares memory with dy; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Gated, RefusesWhatDoesNotFit) {
  Memory memory;
  const ConstRows gate = in(memory.rows(0, 2, 8)), up = in(memory.rows(64, 2, 8)), dh = in(memory.rows(128, 2, 8));
  const Rows dgate = memory.rows(192, 2, 8), dup = memory.rows(256, 2, 8);
  EXPECT_ERROR(gated_forward({.gate = gate, .up = in(memory.rows(64, 2, 7)), .h = dgate}), invalid_argument,
               "gated_forward: up has the shape [2, 7] but gate has [2, 8]; pass a up of the shape of gate");
  EXPECT_ERROR(gated_backward({.gate = gate, .up = up, .dh = dh, .dgate = dgate, .dup = dgate}), invalid_argument,
               "gated_backward: dup is written but shares memory with dgate; pass separate memory");
  EXPECT_ERROR(gated_backward({.gate = gate, .up = up, .dh = dh, .dgate = dgate, .dup = dup, .h = memory.rows(64, 2, 8)}),
               invalid_argument, "gated_backward: h is written but shares memory with up; pass separate memory");
  EXPECT_ERROR(gated_backward({.gate = gate, .up = up, .dh = dh, .dgate = {}, .dup = dup}), invalid_argument,
               "gated_backward: dgate has the shape [0, 0] but gate has [2, 8]; pass a dgate of the shape of gate");
  EXPECT_TRUE(memory.untouched());
}

TEST(RmsNorm, RefusesWhatDoesNotFit) {
  Memory memory;
  const RmsNormForward forward{.x = in(memory.rows(0, 2, 8, DType::bf16)),
                               .weight = in(memory.vector(64, 8)),
                               .y = memory.rows(128, 2, 8),
                               .rstd = memory.vector(256, 2)};
  RmsNormForward args = forward;
  args.weight.size = 7;
  EXPECT_ERROR(rms_norm_forward(args), invalid_argument,
               "rms_norm_forward: weight has 7 elements but x has 8 columns; pass a weight of shape [8]");
  args = forward;
  args.rstd.dtype = DType::bf16;
  EXPECT_ERROR(rms_norm_forward(args), invalid_type,
               "rms_norm_forward: rstd is bfloat16 but must be float32 where x is bfloat16; convert rstd to float32");
  args = forward;
  args.rstd.size = 3;
  EXPECT_ERROR(rms_norm_forward(args), invalid_argument,
               "rms_norm_forward: rstd has 3 elements but x has 2 rows; pass a rstd of shape [2]");
  args = forward;
  args.rstd.data = nullptr;
  EXPECT_ERROR(rms_norm_forward(args), invalid_argument,
               "rms_norm_forward: rstd is null but has 1 x 2 elements; pass its memory");
  args = forward;
  args.eps = -1e-6;
  EXPECT_ERROR(rms_norm_forward(args), invalid_argument,
               "rms_norm_forward: eps is -1e-06; pass a finite number that is not negative");
  args = forward;
  args.weight_offset = kInf;
  EXPECT_ERROR(rms_norm_forward(args), invalid_argument, "rms_norm_forward: weight_offset is inf; pass a finite number");

  const RmsNormBackward backward{.x = forward.x,
                                 .weight = forward.weight,
                                 .rstd = in(forward.rstd),
                                 .dy = in(forward.y),
                                 .dx = memory.rows(512, 2, 8, DType::bf16),
                                 .dw = memory.vector(768, 8)};
  RmsNormBackward grad = backward;
  grad.dw.dtype = DType::f64;
  EXPECT_ERROR(rms_norm_backward(grad), invalid_type,
               "rms_norm_backward: dw is float64 but must be float32 where x is bfloat16; convert dw to float32");
  grad = backward;
  grad.dx.dtype = DType::f32;
  EXPECT_ERROR(rms_norm_backward(grad), invalid_type,
               "rms_norm_backward: dx is float32 but x is bfloat16; convert dx to bfloat16");
  grad = backward;
  grad.dw.data = memory.at(256);
  EXPECT_ERROR(rms_norm_backward(grad), invalid_argument,
               "rms_norm_backward: dw is written but shares memory with rstd; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(LayerNorm, RefusesWhatDoesNotFit) {
  Memory memory;
  const LayerNormForward forward{.x = in(memory.rows(0, 2, 8, DType::bf16)),
                                 .weight = in(memory.vector(64, 8)),
                                 .bias = in(memory.vector(96, 8)),
                                 .y = memory.rows(128, 2, 8),
                                 .mean = memory.vector(256, 2),
                                 .rstd = memory.vector(264, 2)};
  const auto with = [&](auto change) {
    LayerNormForward args = forward;
    change(args);
    return layer_norm_forward(args);
  };
  EXPECT_ERROR(with([](auto& a) { a.weight.size = 7; }), invalid_argument,
               "layer_norm_forward: weight has 7 elements but x has 8 columns; pass a weight of shape [8]");
  EXPECT_ERROR(with([](auto& a) { a.bias.size = 7; }), invalid_argument,
               "layer_norm_forward: bias has 7 elements but x has 8 columns; pass a bias of shape [8]");
  EXPECT_ERROR(with([](auto& a) { a.mean.dtype = DType::bf16; }), invalid_type,
               "layer_norm_forward: mean is bfloat16 but must be float32 where x is bfloat16; convert mean to float32");
  EXPECT_ERROR(with([](auto& a) { a.rstd.size = 3; }), invalid_argument,
               "layer_norm_forward: rstd has 3 elements but x has 2 rows; pass a rstd of shape [2]");
  EXPECT_ERROR(with([](auto& a) { a.mean.data = nullptr; }), invalid_argument,
               "layer_norm_forward: mean is null but has 1 x 2 elements; pass its memory");
  EXPECT_ERROR(with([](auto& a) { a.rstd.data = a.mean.data; }), invalid_argument,
               "layer_norm_forward: rstd is written but shares memory with mean; pass separate memory");
  EXPECT_ERROR(with([](auto& a) { a.eps = kNan; }), invalid_argument,
               "layer_norm_forward: eps is nan; pass a finite number that is not negative");
  EXPECT_ERROR(with([](auto& a) { a.y.cols = 7; }), invalid_argument,
               "layer_norm_forward: y has the shape [2, 7] but x has [2, 8]; pass a y of the shape of x");

  const LayerNormBackward backward{.x = forward.x,
                                   .weight = forward.weight,
                                   .mean = in(forward.mean),
                                   .rstd = in(forward.rstd),
                                   .dy = in(forward.y),
                                   .dx = memory.rows(512, 2, 8, DType::bf16),
                                   .dw = memory.vector(768, 8),
                                   .db = memory.vector(800, 8)};
  const auto gradient_with = [&](auto change) {
    LayerNormBackward args = backward;
    change(args);
    return layer_norm_backward(args);
  };
  EXPECT_ERROR(gradient_with([](auto& a) { a.db.dtype = DType::f64; }), invalid_type,
               "layer_norm_backward: db is float64 but must be float32 where x is bfloat16; convert db to float32");
  EXPECT_ERROR(gradient_with([](auto& a) { a.db.data = a.dw.data; }), invalid_argument,
               "layer_norm_backward: db is written but shares memory with dw; pass separate memory");
  EXPECT_ERROR(gradient_with([](auto& a) { a.dx.dtype = DType::f32; }), invalid_type,
               "layer_norm_backward: dx is float32 but x is bfloat16; convert dx to bfloat16");
  EXPECT_ERROR(gradient_with([](auto& a) { a.mean.size = 1; }), invalid_argument,
               "layer_norm_backward: mean has 1 elements but x has 2 rows; pass a mean of shape [2]");
  EXPECT_TRUE(memory.untouched());
}

TEST(CrossEntropy, RefusesWhatDoesNotFit) {
  Memory memory;
  std::array<std::int64_t, 3> labels{0, 6, -100};
  const CrossEntropy good{.logits = memory.rows(0, 3, 7), .labels = labels.data(), .loss = memory.vector(128, 3)};
  const auto with = [&](auto change) {
    CrossEntropy args = good;
    change(args);
    return cross_entropy(args);
  };
  for (std::int64_t wrong : {std::int64_t{7}, std::int64_t{-1}, std::int64_t{1} << 40}) {
    labels[1] = wrong;
    EXPECT_ERROR(cross_entropy(good), invalid_argument,
                 "cross_entropy: label " + std::to_string(wrong) +
                     " of row 1 is outside [0, 7); correct the label, or mark rows without one with ignore_index (-100)");
  }
  labels[1] = 6;
  EXPECT_ERROR(with([](auto& a) { a.label_smoothing = 1.5; }), invalid_argument,
               "cross_entropy: label_smoothing is 1.5; pass a number in [0, 1]");
  EXPECT_ERROR(with([](auto& a) { a.label_smoothing = kNan; }), invalid_argument,
               "cross_entropy: label_smoothing is nan; pass a number in [0, 1]");
  EXPECT_ERROR(with([](auto& a) { a.softcap = -30; }), invalid_argument,
               "cross_entropy: softcap is -30; pass a finite number that is not negative");
  EXPECT_ERROR(with([](auto& a) { a.logit_scale = kNan; }), invalid_argument,
               "cross_entropy: logit_scale is nan; pass a finite number");
  EXPECT_ERROR(with([](auto& a) { a.labels = nullptr; }), invalid_argument,
               "cross_entropy: labels is null but has 1 x 3 elements; pass its memory");
  EXPECT_ERROR(with([](auto& a) { a.loss = {}; }), invalid_argument,
               "cross_entropy: loss has 0 elements but logits has 3 rows; pass a loss of shape [3]");
  EXPECT_ERROR(with([&](auto& a) { a.lse = memory.vector(256, 3, DType::f64); }), invalid_type,
               "cross_entropy: lse is float64 but must be float32 where logits is float32; convert lse to float32");
  EXPECT_ERROR(with([&](auto& a) { a.class_weight = in(memory.vector(256, 3)); }), invalid_argument,
               "cross_entropy: class_weight has 3 elements but logits has 7 classes; pass a class_weight of shape [7]");
  EXPECT_ERROR(with([&](auto& a) { a.row_scale = in(memory.vector(256, 7)); }), invalid_argument,
               "cross_entropy: row_scale has 7 elements but logits has 3 rows; pass a row_scale of shape [3]");
  EXPECT_ERROR(with([&](auto& a) { a.row_scale = in(memory.vector(0, 3)); }), invalid_argument,
               "cross_entropy: logits is written but shares memory with row_scale; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Dropout, RefusesWhatDoesNotFit) {
  Memory memory;
  const ConstRows x = in(memory.rows(0, 2, 8));
  for (double p : {-0.1, 1.0, kNan}) {
    EXPECT_EQ(dropout({.x = x, .y = memory.rows(64, 2, 8), .p = p}).code(), StatusCode::invalid_argument) << p;
  }
  EXPECT_ERROR(dropout({.x = x, .y = memory.rows(64, 2, 8), .p = 1.0}), invalid_argument,
               "dropout: p is 1; pass a number in [0, 1)");
  EXPECT_ERROR(dropout({.x = x, .y = memory.rows(0, 2, 8)}), invalid_argument,
               "dropout: y is written but shares memory with x; pass separate memory");
  EXPECT_ERROR(philox_fill(nullptr, 5, 0, 0), invalid_argument,
               "philox_fill: out is null but has 1 x 5 elements; pass its memory");
  EXPECT_ERROR(philox_fill(nullptr, -5, 0, 0), invalid_argument,
               "philox_fill: out has the shape [1, -5]; sizes cannot be negative");
  EXPECT_TRUE(memory.untouched());
}

TEST(Code, RefusesWhatDoesNotFit) {
  Memory memory;
  const auto with = [&](auto change) {
    CodeForward args{.count = 3,
                     .bounds = {-1, 0, 1},
                     .x = in(memory.rows(0, 3, 5)),
                     .y = memory.rows(64, 3, 5),
                     .packed = {&memory.bytes[128], 4}};
    change(args);
    return code_forward(args);
  };
  EXPECT_ERROR(with([](auto& a) { a.bits = 5; }), invalid_argument, "code_forward: bits is 5; pass a number from 1 to 4");
  EXPECT_ERROR(with([](auto& a) { a.bits = 0; }), invalid_argument, "code_forward: bits is 0; pass a number from 1 to 4");
  EXPECT_ERROR(with([](auto& a) { a.bits = 1; }), invalid_argument, "code_forward: count is 3; pass a number from 1 to 1");
  EXPECT_ERROR(with([](auto& a) { a.count = 0; }), invalid_argument, "code_forward: count is 0; pass a number from 1 to 3");
  EXPECT_ERROR(with([](auto& a) { a.bounds[1] = kNan; }), invalid_argument,
               "code_forward: bounds is nan; pass a finite number");
  EXPECT_ERROR(with([](auto& a) { a.bounds[2] = 0; }), invalid_argument,
               "code_forward: bounds[2] is 0, not above 0 before it; pass them in ascending order");
  EXPECT_ERROR(with([](auto& a) { a.y.dtype = DType::f16; }), invalid_type,
               "code_forward: y is float16 but x is float32; convert y to float32");
  EXPECT_ERROR(with([](auto& a) { a.packed.data = &a.packed.data[-8]; }), invalid_argument,
               "code_forward: y is written but shares memory with packed; pass separate memory");
  CodeBackward back{
      .count = 4, .dy = in(memory.rows(0, 3, 17)), .packed = {&memory.bytes[512], 8}, .dx = memory.rows(1024, 3, 17)};
  EXPECT_ERROR((back.count = 1, code_backward(back)), invalid_argument, "code_backward: count is 1; pass a number from 2 to 4");
  EXPECT_ERROR((back.count = 4, back.levels[3] = kInf, code_backward(back)), invalid_argument,
               "code_backward: levels is inf; pass a finite number");
  EXPECT_ERROR((back.levels[3] = 0, back.dx.data = memory.at(512 + 2 * 8 + 4), code_backward(back)), invalid_argument,
               "code_backward: dx is written but shares memory with packed; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Dither, RefusesWhatDoesNotFit) {
  Memory memory;
  DitherForward args{.x = in(memory.rows(0, 3, 5)), .y = {}, .packed = {&memory.bytes[128], 4}};
  EXPECT_ERROR((args.act = Activation::relu, dither_forward(args)), invalid_argument,
               "dither_forward: act is relu, which this op does not have; use silu, gelu or gelu_tanh");
  EXPECT_ERROR((args.act = Activation::silu, args.bits = 8, dither_forward(args)), invalid_argument,
               "dither_forward: bits is 8; pass a number from 1 to 4");
  EXPECT_ERROR(dither_backward({.dy = args.x, .packed = {&memory.bytes[128], 4}, .dx = memory.rows(0, 3, 5)}), invalid_argument,
               "dither_backward: dx is written but shares memory with dy; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Nonzero, RefusesWhatDoesNotFit) {
  Memory memory;
  const ConstRows x = in(memory.rows(0, 2, 8));
  EXPECT_ERROR(nonzero_count({.x = x}), invalid_argument,
               "nonzero_count: counts is null but has 1 x 2 elements; pass its memory");
  std::array<std::int64_t, 3> offsets{0, 5, 9};
  const NonzeroEncode good{
      .x = x, .offsets = offsets.data(), .bitmap = {&memory.bytes[128], 4}, .values = memory.vector(256, 9)};
  NonzeroEncode args = good;
  args.values.size = 8;
  EXPECT_ERROR(nonzero_encode(args), invalid_argument,
               "nonzero_encode: offsets[2] is 9, outside [5, 8], from the one before it to the number of values; pass the sums "
               "of what nonzero_count gave");
  offsets[1] = 10;
  EXPECT_ERROR(
      nonzero_encode(good), invalid_argument,
      "nonzero_encode: offsets[1] is 10, outside [0, 9], from the one before it to the number of values; pass the sums "
      "of what nonzero_count gave");
  offsets[1] = 5;
  args = good;
  args.values.dtype = DType::bf16;
  EXPECT_ERROR(nonzero_encode(args), invalid_type,
               "nonzero_encode: values is bfloat16 but x is float32; convert values to float32");
  args = good;
  args.values.data = memory.at(32);
  EXPECT_ERROR(nonzero_encode(args), invalid_argument,
               "nonzero_encode: values is written but shares memory with x; pass separate memory");
  EXPECT_ERROR(nonzero_decode({.bitmap = {&memory.bytes[128], 4},
                               .offsets = offsets.data(),
                               .values = in(memory.vector(256, 9)),
                               .x = memory.rows(260, 2, 8)}),
               invalid_argument, "nonzero_decode: x is written but shares memory with values; pass separate memory");
  EXPECT_TRUE(memory.untouched());
}

TEST(Stream, RefusesWhatCannotRun) {
  int device = 0;
  EXPECT_ERROR(mask_forward({}, {.handle = &device}), invalid_argument,
               "mask_forward: a device's stream is given, but no device; pass its number");
  EXPECT_ERROR(mask_forward({}, {.device = -3}), invalid_argument,
               "mask_forward: device is -3; pass the number of a CUDA device, or Stream::current");
  EXPECT_EQ(cuda_problem(Stream::cpu), "device is -1; pass the number of a CUDA device, or Stream::current");
  // The tests do not link unswag::cuda.
  EXPECT_ERROR(mask_forward({}, {.device = 0}), not_supported,
               "mask_forward: the memory is on a CUDA device, but this build of UnSwag has CPU kernels only; build it with "
               "UNSWAG_CUDA=ON (needs nvcc), or move the tensors to the CPU");
  EXPECT_ERROR(mask_forward({}, {.threads = -1}), invalid_argument,
               "mask_forward: threads is -1; pass a positive number, or 0 for the default");
}

// ---- nothing to do -----------------------------------------------------------------------------------------------------

TEST(Empty, SucceedsWithoutMemory) {
  for (const auto& [rows, cols] : {std::pair{0, 0}, {0, 5}, {5, 0}}) {
    const Rows y{.rows = rows, .cols = cols};
    const ConstRows x{.rows = rows, .cols = cols};
    EXPECT_TRUE(mask_forward({.x = x, .y = y}).ok());
    EXPECT_TRUE(mask_backward({.dy = x, .dx = y}).ok());
    EXPECT_TRUE(activation_forward({.x = x, .y = y}).ok());
    EXPECT_TRUE(activation_backward({.x = x, .dy = x, .dx = y}).ok());
    EXPECT_TRUE(gated_forward({.gate = x, .up = x, .h = y}).ok());
    EXPECT_TRUE(gated_backward({.gate = x, .up = x, .dh = x, .dgate = y, .dup = y}).ok());
    EXPECT_TRUE(dropout({.x = x, .y = y, .p = 0.5}).ok());
    EXPECT_TRUE(code_forward({.count = 1, .x = x, .y = y}).ok());
    EXPECT_TRUE(code_backward({.count = 2, .dy = x, .dx = y}).ok());
    EXPECT_TRUE(dither_forward({.x = x, .y = y}).ok());
    EXPECT_TRUE(dither_backward({.dy = x, .dx = y}).ok());
    std::array<std::int64_t, 6> zeros{};
    EXPECT_TRUE(nonzero_encode({.x = x, .offsets = zeros.data()}).ok());
    EXPECT_TRUE(nonzero_decode({.offsets = zeros.data(), .x = y}).ok());
  }
  std::array<std::int64_t, 5> counts{1, 2, 3, 4, 5};
  EXPECT_TRUE(nonzero_count({.x = {.rows = 5}, .counts = counts.data()}).ok());
  EXPECT_EQ(counts, (std::array<std::int64_t, 5>{}));
  EXPECT_TRUE(philox_fill(nullptr, 0, 0, 0).ok());
  EXPECT_TRUE(rms_norm_forward({.x = {.cols = 5}, .y = {.cols = 5}}).ok());
  EXPECT_TRUE(layer_norm_forward({.x = {.cols = 5}, .y = {.cols = 5}}).ok());
  EXPECT_TRUE(cross_entropy({.logits = {.cols = 7}}).ok());
  EXPECT_ERROR(activation_forward({.x = {.cols = 5}, .y = {.cols = 4}}), invalid_argument,
               "activation_forward: y has the shape [0, 4] but x has [0, 5]; pass a y of the shape of x");
}

TEST(Empty, SumsOverNothingAreWritten) {
  std::array<float, 3> v{1, 1, 1};
  EXPECT_TRUE(rms_norm_backward({.x = {.cols = 3}, .dy = {.cols = 3}, .dw = {v.data(), DType::f32, 3}}).ok());
  EXPECT_EQ(v, (std::array<float, 3>{0, 0, 0}));
  EXPECT_TRUE(rms_norm_forward({.x = {.rows = 3}, .y = {.rows = 3}, .rstd = {v.data(), DType::f32, 3}}).ok());
  EXPECT_TRUE(std::ranges::all_of(v, [](float rstd) { return std::isnan(rstd); }));
  v = {1, 1, 1};
  std::array<float, 3> w{1, 1, 1};
  EXPECT_TRUE(layer_norm_backward(
                  {.x = {.cols = 3}, .dy = {.cols = 3}, .dw = {v.data(), DType::f32, 3}, .db = {w.data(), DType::f32, 3}})
                  .ok());
  EXPECT_EQ(v, (std::array<float, 3>{0, 0, 0}));
  EXPECT_EQ(w, (std::array<float, 3>{0, 0, 0}));
  EXPECT_TRUE(layer_norm_forward(
                  {.x = {.rows = 3}, .y = {.rows = 3}, .mean = {v.data(), DType::f32, 3}, .rstd = {w.data(), DType::f32, 3}})
                  .ok());
  EXPECT_TRUE(std::isnan(v[2]) && std::isnan(w[2]));
  std::array<double, 2> loss{1, 1}, lse{1, 1};
  const std::array<std::int64_t, 2> labels{-100, -100};
  EXPECT_TRUE(cross_entropy({.logits = {.dtype = DType::f64, .rows = 2},
                             .labels = labels.data(),
                             .loss = {loss.data(), DType::f64, 2},
                             .lse = {lse.data(), DType::f64, 2}})
                  .ok());
  EXPECT_EQ(loss, (std::array<double, 2>{0, 0}));
  EXPECT_EQ(lse, (std::array<double, 2>{-kInf, -kInf}));
}

// ---- memory that is shared -----------------------------------------------------------------------------------------------

TEST(Overlap, InterleavedHalvesOfOneMatrixAreSeparate) {
  Memory memory;
  const Rows left{memory.at(0), DType::f32, 4, 5, 10}, right{memory.at(20), DType::f32, 4, 5, 10};
  Check check("op", {});
  check.output("left", left).output("right", right);
  EXPECT_TRUE(check.ok());
}

TEST(Overlap, InputsMayShareAndRepeat) {
  Memory memory;
  const ConstRows repeated{memory.at(0), DType::f32, 100, 5, 0};
  Check check("op", {});
  check.input("a", repeated).input("b", repeated).output("y", memory.rows(20, 100, 5));
  EXPECT_TRUE(check.ok());
}

TEST(Overlap, TheStrideOfASingleRowDoesNotMatter) {
  Memory memory;
  for (std::int64_t stride : {std::int64_t{0}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
    Check check("op", {});
    check.input("x", ConstRows{memory.at(0), DType::f32, 1, 5, stride}).output("y", {memory.at(20), DType::f32, 1, 5, stride});
    EXPECT_TRUE(check.ok()) << stride;
  }
}

// Against the definition: the sets of bytes meet.
TEST(Overlap, AgreesWithTheSetsOfBytes) {
  Memory memory;
  std::mt19937 random(1);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution(low, high)(random); };
  const auto bytes = [](const ConstRows& x) {
    std::set<const std::uint8_t*> set;
    for (std::int64_t row = 0; row < x.rows; ++row) {
      for (std::int64_t i = 0; i < 2 * x.cols; ++i) {
        set.insert(static_cast<const std::uint8_t*>(x.data) + 2 * row * x.stride + i);
      }
    }
    return set;
  };
  std::array<int, 2> seen{0, 0};
  for (int round = 0; round < 20000; ++round) {
    const int cols = draw(1, 6), stride = draw(0, 1) ? draw(-12, 12) : 9, other_stride = draw(0, 1) ? 9 : draw(7, 15);
    const Rows y{memory.at(2000 + 2 * draw(-20, 20)), DType::f16, draw(1, 5), draw(1, 6),
                 draw(0, 1) ? other_stride : -other_stride};
    const ConstRows x{memory.at(2000 + 2 * draw(-20, 20)), DType::f16, draw(1, 5), cols, stride};
    const auto a = bytes(x), b = bytes(in(y));
    const bool meet = std::ranges::any_of(a, [&](const std::uint8_t* byte) { return b.contains(byte); });
    Check forth("op", {}), back("op", {});
    forth.input("x", x).output("y", y);
    back.output("y", y).input("x", x);
    ASSERT_EQ(forth.ok(), !meet) << "round " << round;
    ASSERT_EQ(back.ok(), !meet) << "round " << round;
    ++seen[meet];
  }
  EXPECT_GT(seen[0], 1000);
  EXPECT_GT(seen[1], 1000);
}

// ---- the choice of the kernels -------------------------------------------------------------------------------------------

struct Backend : testing::Test {
  void TearDown() override { EXPECT_TRUE(use_backend("").ok()); }

  template <class F>
  static void for_each_entry(const F& f) {
    f(&Kernels::mask_forward), f(&Kernels::mask_backward), f(&Kernels::activation_forward), f(&Kernels::activation_backward);
    f(&Kernels::gated_forward), f(&Kernels::gated_backward), f(&Kernels::rms_norm_forward), f(&Kernels::rms_norm_backward);
    f(&Kernels::layer_norm_forward), f(&Kernels::layer_norm_backward);
    f(&Kernels::cross_entropy), f(&Kernels::philox_fill), f(&Kernels::dropout);
    f(&Kernels::code_forward), f(&Kernels::code_backward), f(&Kernels::dither_forward), f(&Kernels::dither_backward);
    f(&Kernels::nonzero_count), f(&Kernels::nonzero_encode), f(&Kernels::nonzero_decode);
  }
};

TEST_F(Backend, RowsStandFromSlowestToFastest) {
  const std::vector<std::string_view> known{"portable", "cuda-emulated", "avx512-emulated", "x86-64",
                                            "avx2",     "avx512",        "avx512-bf16"};
  const auto names = backend_names();
  EXPECT_EQ(names.front(), "portable");
  EXPECT_TRUE(std::ranges::includes(
      known, names, {}, [&](auto name) { return std::ranges::find(known, name) - known.begin(); },
      [&](auto name) { return std::ranges::find(known, name) - known.begin(); }));
  EXPECT_TRUE(backend_runs_here("portable"));
  EXPECT_FALSE(backend_runs_here("abacus"));
}

TEST_F(Backend, TheFastestThatRunsHereServes) {
  std::string_view fastest;
  for (const Kernels* row : all_kernels()) {
    if (row->runs_here()) fastest = row->name;
  }
  EXPECT_EQ(current_backend(), fastest);
}

TEST_F(Backend, NamingOneUsesItOrFails) {
  for (std::string_view name : backend_names()) {
    const std::string_view before = current_backend();
    EXPECT_EQ(use_backend(name).ok(), backend_runs_here(name));
    EXPECT_EQ(current_backend(), backend_runs_here(name) ? name : before);
  }
  const Status status = use_backend("abacus");
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_TRUE(status.message().starts_with(
      "use_backend: the name is 'abacus', which is not a backend that runs here; use one of: portable"))
      << status.message();
}

TEST_F(Backend, ThePortableRowHasEveryEntry) {
  const Kernels& row = *all_kernels().front();
  for_each_entry([&](auto entry) { EXPECT_NE(row.*entry, nullptr); });
}

TEST_F(Backend, WhatARowLacksTheNextSlowerOneThatRunsHereServes) {
  const auto here = [] { return true; };
  const auto elsewhere = [] { return false; };
  Kernels slowest = *all_kernels().front(), middle, foreign, fastest;
  slowest.name = "slowest", middle.name = "middle", foreign.name = "foreign", fastest.name = "fastest";
  slowest.runs_here = middle.runs_here = fastest.runs_here = here;
  foreign.runs_here = elsewhere;
  middle.dropout = [](const Dropout&, Stream) {};
  foreign.mask_forward = [](const MaskForward&, Stream) {};
  foreign.gated_forward = [](const GatedForward&, Stream) {};
  fastest.gated_forward = [](const GatedForward&, Stream) {};
  const Kernels* const rows[] = {&slowest, &middle, &foreign, &fastest};

  const std::vector<Kernels> usable = usable_rows(rows);
  ASSERT_EQ(usable.size(), 3u);
  EXPECT_STREQ(usable[0].name, "slowest");
  EXPECT_STREQ(usable[1].name, "middle");
  EXPECT_STREQ(usable[2].name, "fastest");
  // Each entry comes from the fastest row below that has it.
  for_each_entry([&]<class Entry>(Entry entry) {
    EXPECT_EQ(usable[0].*entry, slowest.*entry);
    EXPECT_EQ(usable[1].*entry, middle.*entry ? middle.*entry : slowest.*entry);
    EXPECT_EQ(usable[2].*entry, fastest.*entry ? fastest.*entry : usable[1].*entry);
  });
  EXPECT_EQ(usable[2].dropout, middle.dropout);
  EXPECT_EQ(usable[2].gated_forward, fastest.gated_forward);
  EXPECT_EQ(usable[2].mask_forward, slowest.mask_forward);
}

TEST_F(Backend, DoublesAreServedByThePortableRow) {
  EXPECT_STREQ(kernels_for(true).name, "portable");
  EXPECT_EQ(kernels_for(false).name, current_backend());
}

// A fresh process with one variable set, in which main below prints what a call returns.
std::string with_environment(const std::string& setting) {
  const std::string command = setting + " UNSWAG_PRINT_STATUS=1 /proc/" + std::to_string(getpid()) + "/exe";
  std::string text;
  if (FILE* output = popen(command.c_str(), "r")) {
    for (int c; (c = fgetc(output)) != EOF;) text.push_back(static_cast<char>(c));
    pclose(output);
  }
  return text;
}

TEST_F(Backend, TheEnvironmentChoosesOrEveryCallFails) {
  EXPECT_EQ(with_environment("UNSWAG_BACKEND="), "ok " + std::string(current_backend()));
  EXPECT_EQ(with_environment("UNSWAG_BACKEND=portable"), "ok portable");
  EXPECT_TRUE(with_environment("UNSWAG_BACKEND=abacus")
                  .starts_with("UNSWAG_BACKEND is 'abacus', which is not a backend that runs here; use one of: portable"));
  EXPECT_EQ(with_environment("UNSWAG_NUM_THREADS=many"),
            "UNSWAG_NUM_THREADS is 'many', which is not a positive number; correct it or unset it");
}

TEST(Version, HasThreeNumbers) { EXPECT_EQ(std::ranges::count(version(), '.'), 2); }

}  // namespace
}  // namespace unswag

int main(int argc, char** argv) {
  if (std::getenv("UNSWAG_PRINT_STATUS")) {
    const unswag::Status status = unswag::mask_forward({});
    std::printf("%s", status.ok() ? ("ok " + std::string(unswag::current_backend())).c_str() : status.message().c_str());
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
