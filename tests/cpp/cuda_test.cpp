// src/cuda, run by a team of host threads, against the CPU's fastest row with FMA: the same bits, where both compute in float.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "matrix.hpp"
#include "packed.hpp"

namespace unswag::test {
namespace {

const Kernels* row_named(std::string_view name) {
  for (const Kernels* k : backends())
    if (name == k->name) return k;
  return nullptr;
}

// The rows with FMA, of which one runs wherever the emulated row does.
class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    cuda = row_named("cuda-emulated");
    cpu = row_named("avx2");
    if (!cuda || !cpu) GTEST_SKIP() << "this processor has no AVX2 and FMA, which round as a GPU does";
  }
  const Kernels *cuda = nullptr, *cpu = nullptr;
};

// The element as an integer; all NaN alike: their bits are a processor's own.
std::uint64_t bits(const Matrix& m, std::int64_t r, std::int64_t c) {
  if (std::isnan(m.get(r, c))) return ~std::uint64_t{0};
  std::uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(m.row(r)) + c * size_of(m.dtype()), std::size_t(size_of(m.dtype())));
  return bits;
}
void expect_same(const Matrix& got, const Matrix& wanted, const std::string& what) {
  std::int64_t wrong = 0;
  for (std::int64_t r = 0; r < got.rows(); ++r)
    for (std::int64_t c = 0; c < got.cols(); ++c)
      if (bits(got, r, c) != bits(wanted, r, c) && ++wrong == 1) {
        ADD_FAILURE() << what << " [" << r << ", " << c << "] is " << got.get(r, c) << " and not " << wanted.get(r, c);
      }
  EXPECT_EQ(wrong, 0) << what;
  EXPECT_TRUE(got.gaps_untouched()) << what;
}

// Row 0 becomes all numbers of a 16-bit format, or floats of every exponent.
constexpr std::int64_t all_numbers = 1 << 16;
void fill_with_every_number(Matrix& x) {
  for (std::int64_t i = 0; i < all_numbers; ++i) {
    if (x.dtype() == DType::f32) {
      const auto pattern = std::uint32_t(i << 16 | (i * 40503 & 0xffff));
      std::memcpy(static_cast<char*>(x.row(0)) + 4 * i, &pattern, 4);
    } else {
      std::memcpy(static_cast<char*>(x.row(0)) + 2 * i, &i, 2);
    }
  }
}

TEST_F(Cuda, ActivationsOfEveryNumberHaveTheBitsOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 1, all_numbers), dy(dtype, 1, all_numbers);
    fill_with_every_number(x);
    dy.fill_normal(3, 2);
    for (const Activation act : every<Activation>()) {
      Matrix y(dtype, 1, x.cols()), dx(dtype, 1, x.cols()), y_cpu(dtype, 1, x.cols()), dx_cpu(dtype, 1, x.cols());
      cuda->activation_forward({act, x, y}, {});
      cpu->activation_forward({act, x, y_cpu}, {});
      cuda->activation_backward({act, x, dy, dx}, {});
      cpu->activation_backward({act, x, dy, dx_cpu}, {});
      expect_same(y, y_cpu, std::string("y ") + name_of(dtype) + " " + name_of(act));
      expect_same(dx, dx_cpu, std::string("dx ") + name_of(dtype) + " " + name_of(act));
    }
  }
}

TEST_F(Cuda, GatedUnitsHaveTheBitsOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    for (const auto& [rows, cols, gap] :
         {std::tuple{1, int(all_numbers), 0}, {3, 1000, 24}, {5, 77, 3}, {4, 9, -40}, {300, 1, 2}}) {
      const std::int64_t stride = gap < 0 ? gap : cols + gap;
      Matrix gate(dtype, rows, cols, stride), up(dtype, rows, cols), dh(dtype, rows, cols, stride);
      gate.fill_normal(1, 4);
      up.fill_normal(2);
      dh.fill_normal(3);
      if (cols == all_numbers) fill_with_every_number(gate);
      for (const Activation act : every<Activation>()) {
        Matrix h(dtype, rows, cols), dgate(dtype, rows, cols, stride), dup(dtype, rows, cols), again(dtype, rows, cols);
        Matrix h_cpu(dtype, rows, cols), dgate_cpu(dtype, rows, cols, stride), dup_cpu(dtype, rows, cols);
        cuda->gated_forward({act, gate, up, h}, {});
        cpu->gated_forward({act, gate, up, h_cpu}, {});
        cuda->gated_backward({act, gate, up, dh, dgate, dup, again}, {});
        cpu->gated_backward({act, gate, up, dh, dgate_cpu, dup_cpu, {}}, {});
        const std::string what = name_of(dtype) + " " + name_of(act) + " " + std::to_string(cols);
        expect_same(h, h_cpu, "h " + what);
        expect_same(again, h_cpu, "h again " + what);
        expect_same(dgate, dgate_cpu, "dgate " + what);
        expect_same(dup, dup_cpu, "dup " + what);
      }
    }
  }
}

// Types of x and dx, of weight and bias, of y and dy.
struct NormTypes {
  DType x, weight, y;
};
std::vector<NormTypes> norm_types() {
  std::vector<NormTypes> types;
  for (const DType x : float_dtypes) {
    types.push_back({x, x, x});
    if (x == DType::f32) continue;
    types.push_back({x, DType::f32, DType::f32});
    types.push_back({x, DType::f32, x});
    types.push_back({x, x, DType::f32});
  }
  return types;
}
std::string text(const NormTypes& t, std::int64_t rows, std::int64_t cols) {
  return name_of(t.x) + " " + name_of(t.weight) + " " + name_of(t.y) + " " + std::to_string(rows) + " x " +
         std::to_string(cols);
}

void compare_rms_norms(const Kernels* cuda, const Kernels* cpu, const NormTypes& t, int rows, int cols, bool cast,
                       Stream stream) {
  const std::string what = text(t, rows, cols) + (cast ? " cast" : "");
  Matrix x(t.x, rows, cols, cols + 5), weight(t.weight, 1, cols), dy(t.y, rows, cols);
  x.fill_normal(1), weight.fill_normal(2), dy.fill_normal(3);
  Matrix y(t.y, rows, cols), rstd(DType::f32, 1, rows), dx(t.x, rows, cols), dw(DType::f32, 1, cols);
  Matrix y_cpu(t.y, rows, cols), rstd_cpu(DType::f32, 1, rows), dx_cpu(t.x, rows, cols), dw_cpu(DType::f32, 1, cols);
  RmsNormForward f{.x = x, .weight = std::as_const(weight).vector(), .cast_before_weight = cast};
  f.weight_offset = cols % 2;
  f.y = y, f.rstd = rstd.vector();
  cuda->rms_norm_forward(f, stream);
  f.y = y_cpu, f.rstd = rstd_cpu.vector();
  cpu->rms_norm_forward(f, {});
  expect_same(rstd, rstd_cpu, "rstd " + what);
  expect_same(y, y_cpu, "y " + what);
  RmsNormBackward b{.x = x, .weight = f.weight, .rstd = std::as_const(rstd_cpu).vector(), .dy = dy};
  b.weight_offset = f.weight_offset, b.cast_before_weight = cast;
  b.dx = dx, b.dw = dw.vector();
  cuda->rms_norm_backward(b, stream);
  b.dx = dx_cpu, b.dw = dw_cpu.vector();
  cpu->rms_norm_backward(b, {});
  expect_same(dx, dx_cpu, "dx " + what);
  expect_same(dw, dw_cpu, "dw " + what);
}

void compare_layer_norms(const Kernels* cuda, const Kernels* cpu, const NormTypes& t, int rows, int cols, int vectors,
                         Stream stream) {
  const std::string what = text(t, rows, cols) + " " + std::to_string(vectors);
  Matrix x(t.x, rows, cols, cols + 5), weight(t.weight, 1, cols), bias(t.weight, 1, cols), dy(t.y, rows, cols);
  x.fill_normal(1), weight.fill_normal(2), dy.fill_normal(3), bias.fill_normal(4);
  for (std::int64_t i = 0; i < cols; ++i) x.set(0, i, x.get(0, i) + 50);
  Matrix y(t.y, rows, cols), mean(DType::f32, 1, rows), rstd(DType::f32, 1, rows), dx(t.x, rows, cols), dw(DType::f32, 1, cols),
      db(DType::f32, 1, cols);
  Matrix y_cpu(t.y, rows, cols), mean_cpu(DType::f32, 1, rows), rstd_cpu(DType::f32, 1, rows), dx_cpu(t.x, rows, cols),
      dw_cpu(DType::f32, 1, cols), db_cpu(DType::f32, 1, cols);
  LayerNormForward f{.x = x};
  if (vectors & 1) f.weight = std::as_const(weight).vector();
  if (vectors & 2) f.bias = std::as_const(bias).vector();
  f.y = y, f.mean = mean.vector(), f.rstd = rstd.vector();
  cuda->layer_norm_forward(f, stream);
  f.y = y_cpu, f.mean = mean_cpu.vector(), f.rstd = rstd_cpu.vector();
  cpu->layer_norm_forward(f, {});
  expect_same(mean, mean_cpu, "mean " + what);
  expect_same(rstd, rstd_cpu, "rstd " + what);
  expect_same(y, y_cpu, "y " + what);
  LayerNormBackward b{.x = x, .weight = f.weight};
  b.mean = std::as_const(mean_cpu).vector(), b.rstd = std::as_const(rstd_cpu).vector(), b.dy = dy;
  b.dx = dx, b.dw = dw.vector(), b.db = db.vector();
  cuda->layer_norm_backward(b, stream);
  b.dx = dx_cpu, b.dw = dw_cpu.vector(), b.db = db_cpu.vector();
  cpu->layer_norm_backward(b, {});
  expect_same(dx, dx_cpu, "dx " + what);
  expect_same(dw, dw_cpu, "dw " + what);
  expect_same(db, db_cpu, "db " + what);
}

TEST_F(Cuda, NormsHaveTheBitsOfTheCpu) {
  // Columns around the tree's sixteens, sixty-fours and tiles; rows around its fours, sixteens and groups.
  const std::pair<int, int> shapes[] = {{1, 1},   {3, 15},    {4, 16},    {5, 17},   {16, 63},   {17, 64},
                                        {18, 65}, {33, 2047}, {21, 2048}, {2, 2049}, {1, 20000}, {5000, 24}};
  for (const NormTypes& t : norm_types()) {
    for (const auto& [rows, cols] : shapes) {
      if (t.weight != t.y && rows * cols > 2000) continue;  // the types of y change nothing about rows
      for (const bool cast : {true, false}) compare_rms_norms(cuda, cpu, t, rows, cols, cast, {});
      for (const int vectors : {0, 1, 2, 3}) compare_layer_norms(cuda, cpu, t, rows, cols, vectors, {});
    }
  }
}

// With a worker for every eight columns: four, two or one row at a time in shared memory, and rows that are too long for it.
TEST_F(Cuda, RowsInSharedMemoryHaveTheBitsOfTheCpu) {
  for (const NormTypes& t : norm_types()) {
    for (const int cols : {900, 1800, 2100, 12000}) {
      compare_rms_norms(cuda, cpu, t, 5, cols, true, {.threads = 270});
      compare_layer_norms(cuda, cpu, t, 5, cols, 3, {.threads = 270});
    }
  }
}

TEST_F(Cuda, CrossEntropyHasTheBitsOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    for (const std::int64_t classes : {1, 2, 16, 65, 2047, 2048, 2049, 17000}) {
      for (const double smoothing : {0.0, 0.1}) {
        for (const double softcap : {0.0, 30.0}) {
          for (const bool weighted : {false, true}) {
            const std::int64_t rows = 4;
            Matrix logits(dtype, rows, classes, classes + 3), weight(DType::f32, 1, classes), scale(DType::f32, 1, rows);
            logits.fill_normal(std::uint64_t(classes), 5);
            weight.fill([](auto, std::int64_t c) { return 0.5L + c % 7; });
            scale.fill([](auto, std::int64_t r) { return 1 + r / 4.0L; });
            if (classes > 100) logits.set(1, 70, -std::numeric_limits<long double>::infinity());
            const std::int64_t labels[] = {0, classes - 1, -100, classes / 2};
            const auto run = [&](const Kernels* k, Matrix& gradient, Matrix& loss, Matrix& lse) {
              for (std::int64_t r = 0; r < rows; ++r)
                std::memcpy(gradient.row(r), logits.row(r), std::size_t(classes * size_of(dtype)));
              CrossEntropy a{.logits = gradient, .labels = labels, .gradient_scale = 0.25};
              a.label_smoothing = smoothing, a.softcap = softcap, a.logit_scale = 0.75;
              if (weighted) a.class_weight = std::as_const(weight).vector();
              a.row_scale = std::as_const(scale).vector();
              a.loss = loss.vector(), a.lse = lse.vector();
              k->cross_entropy(a, {});
            };
            Matrix g(dtype, rows, classes, classes + 3), g_cpu(dtype, rows, classes, classes + 3);
            Matrix loss(DType::f32, 1, rows), loss_cpu(DType::f32, 1, rows), lse(DType::f32, 1, rows),
                lse_cpu(DType::f32, 1, rows);
            run(cuda, g, loss, lse);
            run(cpu, g_cpu, loss_cpu, lse_cpu);
            const std::string what = name_of(dtype) + " " + std::to_string(classes) + " " + std::to_string(smoothing) + " " +
                                     std::to_string(softcap) + (weighted ? " weighted" : "");
            expect_same(loss, loss_cpu, "loss " + what);
            expect_same(lse, lse_cpu, "lse " + what);
            expect_same(g, g_cpu, "gradient " + what);
          }
        }
      }
    }
  }
}

// A device cannot be asked before its work is done, so the core lets such a label pass there.
TEST_F(Cuda, ALabelOutsideItsRangeMakesItsRowNan) {
  Matrix logits(DType::bf16, 3, 40), loss(DType::f32, 1, 3), lse(DType::f32, 1, 3);
  logits.fill_normal(1);
  const std::int64_t labels[] = {5, 40, -1};
  CrossEntropy a{.logits = logits, .labels = labels};
  a.loss = loss.vector(), a.lse = lse.vector();
  cuda->cross_entropy(a, {});
  for (std::int64_t r = 0; r < 3; ++r) {
    EXPECT_EQ(std::isnan(loss.get(0, r)), r > 0);
    EXPECT_EQ(std::isnan(lse.get(0, r)), r > 0);
    for (std::int64_t c = 0; c < 40; ++c) EXPECT_EQ(std::isnan(logits.get(r, c)), r > 0);
  }
}

TEST_F(Cuda, DropoutAndDrawsHaveTheBitsOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    for (const auto& [rows, cols] : {std::pair{1, 70000}, {7, 13}, {9, 64}, {3, 1026}}) {
      Matrix x(dtype, rows, cols, cols + 4), y(dtype, rows, cols), y_cpu(dtype, rows, cols);
      x.fill_normal(7);
      for (const double p : {0.0, 0.1, 0.5}) {
        cuda->dropout({x, y, p, 0x123456789abcdef0, ~std::uint64_t{0} - 3}, {});
        cpu->dropout({x, y_cpu, p, 0x123456789abcdef0, ~std::uint64_t{0} - 3}, {});
        expect_same(y, y_cpu, name_of(dtype) + " p " + std::to_string(p));
      }
    }
  }
}

// Bytes and values of step codes and non-zeros are held to those of every row in code_test, dither_test and nonzero_test.
TEST_F(Cuda, DitherOfEveryNumberHasTheBytesOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 1, all_numbers);
    fill_with_every_number(x);
    for (const Activation act : every<Activation>(has_dither)) {
      PackedRows packed(1, packed_row_bytes(all_numbers, 3)), packed_cpu(1, packed_row_bytes(all_numbers, 3));
      Matrix y(dtype, 1, x.cols()), y_cpu(dtype, 1, x.cols());
      cuda->dither_forward({act, 3, 5, 6, x, y, packed}, {});
      cpu->dither_forward({act, 3, 5, 6, x, y_cpu, packed_cpu}, {});
      EXPECT_EQ(packed.bytes(), packed_cpu.bytes()) << name_of(dtype) << " " << name_of(act);
      expect_same(y, y_cpu, std::string("y ") + name_of(dtype) + " " + name_of(act));
    }
  }
}

TEST_F(Cuda, CodesOfTheDerivativeOfEveryNumberHaveTheBytesOfTheCpu) {
  for (const DType dtype : float_dtypes) {
    Matrix x(dtype, 1, all_numbers);
    fill_with_every_number(x);
    for (const Activation act : every<Activation>()) {
      PackedRows packed(1, packed_row_bytes(all_numbers, 2)), packed_cpu(1, packed_row_bytes(all_numbers, 2));
      CodeForward a{
          .act = act, .of_derivative = true, .count = 3, .bounds = {0.1, 0.5, 0.9}, .x = x, .y = {}, .packed = packed};
      cuda->code_forward(a, {});
      a.packed = packed_cpu;
      cpu->code_forward(a, {});
      EXPECT_EQ(packed.bytes(), packed_cpu.bytes()) << name_of(dtype) << " " << name_of(act);
    }
  }
}

// Twice with teams of other sizes: what a row's sums are made of does not depend on how many make them.
TEST_F(Cuda, TheSizeOfTheTeamDoesNotShow) {
  Matrix x(DType::f32, 37, 3001), rstd(DType::f32, 1, 37), dy(DType::f32, 37, 3001), dw(DType::f32, 1, 3001);
  Matrix y(DType::f32, 37, 3001), again(DType::f32, 37, 3001), dw_again(DType::f32, 1, 3001);
  x.fill_normal(1), dy.fill_normal(2);
  RmsNormForward f{.x = x};
  f.rstd = rstd.vector(), f.y = y;
  cuda->rms_norm_forward(f, {.threads = 1});
  f.y = again;
  cuda->rms_norm_forward(f, {.threads = 6});
  expect_same(again, y, "y");
  RmsNormBackward b{.x = x, .rstd = std::as_const(rstd).vector(), .dy = dy};
  b.dw = dw.vector();
  cuda->rms_norm_backward(b, {.threads = 1});
  b.dw = dw_again.vector();
  cuda->rms_norm_backward(b, {.threads = 6});
  expect_same(dw_again, dw, "dw");
}

}  // namespace
}  // namespace unswag::test
