// Trains a small network whose ReLU keeps one bit per unit for its backward pass.
//
//   z = x w1          [batch, hidden]
//   h = relu(z)       y and its mask in one pass; h itself is not kept
//   f = pool(h)       [batch, features], the mean of `pool` neighbouring units: its backward does not need h
//   p = f w2          [batch]
//   loss = mean((p - target)^2)
//
// Were h the input of a trainable layer, that layer would keep it anyway and the mask would save nothing; before pooling, a
// norm, a residual sum or a frozen layer, it is all that the backward pass needs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "unswag/unswag.hpp"

namespace {

constexpr std::int64_t batch = 512, inputs = 3, hidden = 512, pool = 8, features = hidden / pool;
constexpr int steps = 400;
constexpr float learning_rate = 0.05F, momentum = 0.9F;

// A matrix with rows of `cols` values.
struct Matrix {
  std::int64_t rows, cols;
  std::vector<float> values = std::vector<float>(static_cast<std::size_t>(rows * cols));

  float& operator()(std::int64_t i, std::int64_t j) { return values[static_cast<std::size_t>(i * cols + j)]; }
  unswag::Rows view() { return {values.data(), unswag::DType::f32, rows, cols, cols}; }
  unswag::ConstRows view() const { return {values.data(), unswag::DType::f32, rows, cols, cols}; }
};

void check(const unswag::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

// v = momentum v - learning_rate dw;  w = w + v
void update(Matrix& w, const Matrix& dw, Matrix& v) {
  for (std::size_t i = 0; i < w.values.size(); ++i) {
    v.values[i] = momentum * v.values[i] - learning_rate * dw.values[i];
    w.values[i] += v.values[i];
  }
}

}  // namespace

int main() {
  std::printf("CUDA:");
  for (std::string_view architecture : unswag::cuda_architectures())
    std::printf(" %.*s", int(architecture.size()), architecture.data());
  std::printf("%s\n", unswag::cuda_architectures().empty() ? " none linked" : "");
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1, 1);

  // The function to learn, at random points of a square; the third input is constant, so that w1 has a bias.
  Matrix x{batch, inputs}, target{batch, 1};
  for (std::int64_t b = 0; b < batch; ++b) {
    x(b, 0) = uniform(random), x(b, 1) = uniform(random), x(b, 2) = 1;
    target(b, 0) = std::sin(3 * x(b, 0)) * std::cos(2 * x(b, 1));
  }
  Matrix w1{inputs, hidden}, w2{features, 1};
  for (float& w : w1.values) w = normal(random);
  for (float& w : w2.values) w = normal(random) / 8;

  Matrix v1{inputs, hidden}, v2{features, 1};
  const std::int64_t mask_stride = unswag::packed_row_bytes(hidden, 1);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(batch * mask_stride));  // all that is saved of z and h

  for (int step = 0; step <= steps; ++step) {
    // Forward.
    Matrix f{batch, features}, p{batch, 1};
    {
      Matrix z{batch, hidden}, h{batch, hidden};
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < inputs; ++i) {
          for (std::int64_t j = 0; j < hidden; ++j) z(b, j) += x(b, i) * w1(i, j);
        }
      }
      check(unswag::mask_forward(
          {.act = unswag::Mask::relu, .x = std::as_const(z).view(), .y = h.view(), .packed = {mask.data(), mask_stride}}));
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t j = 0; j < hidden; ++j) f(b, j / pool) += h(b, j) / pool;
        for (std::int64_t k = 0; k < features; ++k) p(b, 0) += f(b, k) * w2(k, 0);
      }
    }  // z and h are gone.

    // Loss and backward.
    float loss = 0;
    Matrix dh{batch, hidden}, dz{batch, hidden}, dw1{inputs, hidden}, dw2{features, 1};
    for (std::int64_t b = 0; b < batch; ++b) {
      const float error = p(b, 0) - target(b, 0), dp = 2 * error / batch;
      loss += error * error / batch;
      for (std::int64_t k = 0; k < features; ++k) dw2(k, 0) += f(b, k) * dp;
      for (std::int64_t j = 0; j < hidden; ++j) dh(b, j) = w2(j / pool, 0) * dp / pool;
    }
    check(unswag::mask_backward(
        {.act = unswag::Mask::relu, .dy = std::as_const(dh).view(), .packed = {mask.data(), mask_stride}, .dx = dz.view()}));
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t i = 0; i < inputs; ++i) {
        for (std::int64_t j = 0; j < hidden; ++j) dw1(i, j) += x(b, i) * dz(b, j);
      }
    }
    update(w1, dw1, v1);
    update(w2, dw2, v2);
    if (step % 100 == 0) std::printf("step %d loss %.5f\n", step, static_cast<double>(loss));
  }
  std::printf("saved for the backward pass of relu: %zu bytes, as float32 it would be %zu\n", mask.size(),
              static_cast<std::size_t>(batch * hidden) * sizeof(float));
}
