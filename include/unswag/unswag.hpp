// The public C++ interface: what the backward pass needs, kept in the smallest exact form.
//
// Every entry point checks its arguments, picks the kernels and returns a Status.  Inputs are never written to; an output
// may not overlap an input unless its comment says so.  Computation is in float (double for f64); the result is rounded
// once to the output's dtype.  Results have the same bits for any number of threads.
//
// Work goes to the CPU, or to the CUDA device that the Stream names when the library was linked with unswag::cuda.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "unswag/lists.hpp"
#include "unswag/status.hpp"
#include "unswag/tensor.hpp"

namespace unswag {

// ---- one-bit masks: y = act(x) fused with the mask that its backward needs (1 bit per element); Mask says which bit -------
struct MaskForward {
  Mask act = Mask::relu;
  double slope = 0;    // leaky_relu, jax_leaky_relu only
  bool flush = false;  // jax_... only: subnormals of float, bfloat16 and double count as 0, as in XLA on the CPU
  ConstRows x{};
  Rows y{};         // same shape and dtype; data == nullptr: only the mask
  Packed packed{};  // packed_row_bytes(cols, 1) bytes per row; bits past cols are zero
};
Status mask_forward(const MaskForward& args, Stream stream = {});

//   dx = bit ? dy : 0 (leaky_relu, jax_leaky_relu: bit ? dy : slope dy); selected, never multiplied: 0-bits give +0 for any dy
struct MaskBackward {
  Mask act = Mask::relu;
  double slope = 0;
  ConstRows dy{};
  ConstPacked packed{};
  Rows dx{};
};
Status mask_backward(const MaskBackward& args, Stream stream = {});

// ---- activations, exact: saved is x -------------------------------------------------------------------------------------
struct ActivationForward {  // y = act(x)
  Activation act = Activation::silu;
  ConstRows x{};
  Rows y{};
};
Status activation_forward(const ActivationForward& args, Stream stream = {});

struct ActivationBackward {  // dx = dy act'(x)
  Activation act = Activation::silu;
  ConstRows x{};
  ConstRows dy{};
  Rows dx{};
};
Status activation_backward(const ActivationBackward& args, Stream stream = {});

// ---- gated units: h = act(gate) * up, rounded once; saved are gate and up ------------------------------------------------
// swiglu: silu; geglu: gelu; geglu_tanh: gelu_tanh; reglu: relu (all from Activation)
struct GatedForward {
  Activation act = Activation::silu;
  ConstRows gate{};
  ConstRows up{};
  Rows h{};
};
Status gated_forward(const GatedForward& args, Stream stream = {});

//   dgate = dh * up * act'(gate),  dup = dh * act(gate),  h = act(gate) * up when h.data is given
struct GatedBackward {
  Activation act = Activation::silu;
  ConstRows gate{};
  ConstRows up{};
  ConstRows dh{};
  Rows dgate{};
  Rows dup{};
  Rows h{};  // optional
};
Status gated_backward(const GatedBackward& args, Stream stream = {});

// ---- RMSNorm ----------------------------------------------------------------------------------------------------------
//   y = x rstd w',   rstd = 1 / sqrt(mean(x^2) + eps),   w' = weight_offset + weight  (no weight: w' = 1)
// cast_before_weight: x rstd is first rounded to x's dtype (Llama); otherwise everything is float until y (Gemma).
struct RmsNormForward {
  ConstRows x{};
  ConstVector weight{};  // optional; any dtype
  double eps = 1e-6;
  double weight_offset = 0;
  bool cast_before_weight = true;
  bool rstd_given = false;  // true: rstd is read, not written, to recompute y
  Rows y{};                 // any floating dtype
  Vector rstd{};            // rows values, f32 (f64 when x is f64)
};
Status rms_norm_forward(const RmsNormForward& args, Stream stream = {});

//   dx = rstd (w' dy - xhat mean(w' dy xhat)),  dw = sum over rows of dy xhat,  xhat = x rstd
// The sum over rows is one fixed tree: its bits depend on rows and cols only.
struct RmsNormBackward {
  ConstRows x{};
  ConstVector weight{};
  ConstVector rstd{};
  ConstRows dy{};
  double weight_offset = 0;
  bool cast_before_weight = true;
  Rows dx{};                // optional
  Vector dw{};              // optional; cols values, f32 (f64 when x is f64)
  void* scratch = nullptr;  // on a device, with dw: rms_norm_backward_scratch(rows, cols) bytes, overwritten
};
Status rms_norm_backward(const RmsNormBackward& args, Stream stream = {});
std::int64_t rms_norm_backward_scratch(std::int64_t rows, std::int64_t cols);

// ---- LayerNorm ---------------------------------------------------------------------------------------------------------
//   y = (x - mean) rstd w + b,   mean = mean(x),   rstd = 1 / sqrt(mean((x - mean)^2) + eps),   rounded once
struct LayerNormForward {
  ConstRows x{};
  ConstVector weight{};  // optional; any dtype
  ConstVector bias{};    // optional; any dtype
  double eps = 1e-5;
  bool statistics_given = false;  // true: mean and rstd are read, not written, to recompute y
  Rows y{};                       // any floating dtype
  Vector mean{};                  // rows values, f32 (f64 when x is f64)
  Vector rstd{};                  // likewise
};
Status layer_norm_forward(const LayerNormForward& args, Stream stream = {});

//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  g = w dy,  xhat = (x - mean) rstd
//   dw = sum over rows of dy xhat,  db = sum over rows of dy,  in the tree of rms_norm_backward
struct LayerNormBackward {
  ConstRows x{};
  ConstVector weight{};
  ConstVector mean{};
  ConstVector rstd{};
  ConstRows dy{};
  Rows dx{};                // optional
  Vector dw{};              // optional; cols values, f32 (f64 when x is f64)
  Vector db{};              // likewise
  void* scratch = nullptr;  // on a device, with dw or db: layer_norm_backward_scratch(rows, cols) bytes, overwritten
};
Status layer_norm_backward(const LayerNormBackward& args, Stream stream = {});
std::int64_t layer_norm_backward_scratch(std::int64_t rows, std::int64_t cols);

// ---- softmax cross-entropy over a chunk of logits, in one pass -----------------------------------------------------------
//   z = softcap tanh(logit_scale logits / softcap)  (softcap 0: z = logit_scale logits),  lse = log sum exp z
//   loss = (1 - label_smoothing) w[label] (lse - z[label]) + label_smoothing / classes * sum over c of w[c] (lse - z[c])
// which is torch.nn.functional.cross_entropy(z, labels, weight=w, label_smoothing=…, reduction="none").
// With write_gradient, logits is overwritten with row_scale[row] * gradient_scale * d loss / d logits.
// Ignored rows are not read (they may hold NaN): loss, lse and gradient are 0.
// A label outside [0, classes) that is not ignore_index is an error and nothing is written; on a device, where labels cannot be
// checked without waiting for it, loss, lse and gradient of such a row are NaN.
struct CrossEntropy {
  Rows logits{};
  const std::int64_t* labels = nullptr;  // rows values
  ConstVector class_weight{};            // optional; classes values, f32 (f64 when logits is f64)
  ConstVector row_scale{};               // optional; rows values, f32 (f64 when logits is f64)
  double gradient_scale = 1;
  std::int64_t ignore_index = -100;
  double label_smoothing = 0;
  double softcap = 0;
  double logit_scale = 1;
  bool write_gradient = true;
  Vector loss{};  // rows values, f32 (f64 when logits is f64)
  Vector lse{};   // likewise; optional
};
Status cross_entropy(const CrossEntropy& args, Stream stream = {});

// ---- block codecs: blocks of 16 to 64 numbers as codes of 2 to 8 bits and one scale (docs/format.md section 9) ------------
// The bytes are the same in every backend.  A block that contains a NaN or an infinity is decoded as all NaN.

// Bytes of one packed row of `cols` numbers: 8.5, 5, 2.25, 8.5 and 8.5 bits for each where cols is a multiple of the block.
constexpr std::int64_t block_row_bytes(Block codec, std::int64_t cols) {
  const BlockForm& form = listed(codec);
  return ((cols / form.n + (cols % form.n != 0)) * form.bytes() + 3) / 4 * 4;
}

struct BlockEncode {
  Block codec = Block::int8;
  ConstRows x{};
  Packed packed{};          // block_row_bytes(codec, cols) bytes per row
  bool stochastic = false;  // round up or down at random, unbiased; int8, int4 and int2 only
  std::uint64_t seed = 0;   // of its draws
  std::uint64_t offset = 0;
};
Status block_encode(const BlockEncode& args, Stream stream = {});

struct BlockDecode {
  Block codec = Block::int8;
  ConstPacked packed{};
  Rows x{};  // any floating dtype
};
Status block_decode(const BlockDecode& args, Stream stream = {});

// ---- random draws: Philox4x32-10 (Salmon et al., SC 2011) ---------------------------------------------------------------
// Draw i of a stream is word i % 4 of philox(counter = offset + i / 4, key = seed).
Status philox_fill(std::uint32_t* out, std::int64_t n, std::uint64_t seed, std::uint64_t offset, Stream stream = {});

//   y = keep ? x / (1 - p) : 0,  keep = draw(row * cols + col) >= p 2^32; the same call on dy is the backward: no mask is kept
struct Dropout {
  ConstRows x{};
  Rows y{};
  double p = 0;
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
};
Status dropout(const Dropout& args, Stream stream = {});

inline constexpr int most_code_bits = 4;  // of the step codes and the dither below

// ---- step codes: the derivative of an activation as one of at most 16 levels (docs/format.md sections 1 and 5) ------------
//   y = act(x),  code = the number of bounds strictly below x, or below act'(x) (of_derivative); NaN has the code 0
// Bounds are compared as float (double for f64).  The bytes are the same in every backend; of_derivative they depend on how a
// backend rounds act'(x).
struct CodeForward {
  Activation act = Activation::silu;
  bool of_derivative = false;
  int bits = 2;                                   // 1 to most_code_bits
  int count = 0;                                  // of bounds: 1 to 2^bits - 1
  double bounds[(1 << most_code_bits) - 1] = {};  // ascending
  ConstRows x{};
  Rows y{};         // same shape and dtype; data == nullptr: only the codes
  Packed packed{};  // packed_row_bytes(cols, bits) bytes per row; bits past the last code are zero
};
Status code_forward(const CodeForward& args, Stream stream = {});

//   dx = dy levels[code], rounded once; levels are float (double for f64), a code without a level gives NaN
struct CodeBackward {
  int bits = 2;
  int count = 0;  // of levels: 2 to 2^bits
  double levels[1 << most_code_bits] = {};
  ConstRows dy{};
  ConstPacked packed{};
  Rows dx{};
};
Status code_backward(const CodeBackward& args, Stream stream = {});

// ---- subtractive dither: the derivative as 1 to 4 bits whose mean over draws is exact (docs/format.md section 7) ----------
//   y = act(x),  code = floor((act'(x) - lowest) / step + v),  dx = dy (lowest + step (code + 1/2 - v)),  0 < v < 1
// act' has values in [lowest, 1 - lowest], step = (1 - 2 lowest) / (2^bits - 1), and v is drawn from (seed, offset) for element
// row cols + col, and again in the backward.  The mean of dx is dy act'(x), the variance of its factor step^2 / 12, for any x.
// Only for an activation that has_dither: silu, gelu and gelu_tanh.  The bytes depend on how a backend rounds act'(x).
bool has_dither(Activation act);
struct DitherForward {
  Activation act = Activation::silu;
  int bits = 2;
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
  ConstRows x{};
  Rows y{};         // same shape and dtype; data == nullptr: only the codes
  Packed packed{};  // packed_row_bytes(cols, bits) bytes per row
};
Status dither_forward(const DitherForward& args, Stream stream = {});

struct DitherBackward {
  Activation act = Activation::silu;
  int bits = 2;
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
  ConstRows dy{};
  ConstPacked packed{};
  Rows dx{};
};
Status dither_backward(const DitherBackward& args, Stream stream = {});

// ---- non-zeros, lossless: 1 bit per element, and those that are not +0 (docs/format.md section 8) ---------------------------
// An element is kept when any of its bits is set: -0, NaN and subnormals come back bit for bit.
struct NonzeroCount {
  ConstRows x{};
  std::int64_t* counts = nullptr;  // rows values: how many of each row are kept
};
Status nonzero_count(const NonzeroCount& args, Stream stream = {});

// Row r has its values, in order, at values[offsets[r]] to values[offsets[r + 1] - 1].  offsets are the running sums of the
// counts: ascending from 0, at most values.size.  On a device they are not checked.
struct NonzeroEncode {
  ConstRows x{};
  const std::int64_t* offsets = nullptr;  // rows + 1 values
  Packed bitmap{};                        // packed_row_bytes(cols, 1) bytes per row
  Vector values{};                        // dtype of x
};
Status nonzero_encode(const NonzeroEncode& args, Stream stream = {});

struct NonzeroDecode {
  ConstPacked bitmap{};
  const std::int64_t* offsets = nullptr;  // rows + 1 values
  ConstVector values{};                   // dtype of x
  Rows x{};
};
Status nonzero_decode(const NonzeroDecode& args, Stream stream = {});

// ---- backends -----------------------------------------------------------------------------------------------------------
// Names of the kernel rows built in, slowest first ("portable", "x86-64", "avx2", "avx512", "avx512-bf16"), whether or not they
// run here.
std::vector<std::string_view> backend_names();
bool backend_runs_here(std::string_view name);
std::string_view current_backend();
Status use_backend(std::string_view name);  // "" = what UNSWAG_BACKEND names, else the fastest that runs here

// "": CUDA kernels are linked in and run on this device (Stream::current, 0, 1, ...); else why not, and what to do.
std::string cuda_problem(int device);
// The architectures that CUDA kernels were compiled for, such as "sm_80"; the last, if it is "compute_90", runs on newer ones.
std::vector<std::string_view> cuda_architectures();

int default_threads();  // UNSWAG_NUM_THREADS, else the number of processors
std::string_view version();

}  // namespace unswag
