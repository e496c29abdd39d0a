// The golden files of tests/vectors (written by python -m unswag.reference) against every row of kernels that runs here:
// packed bytes and draws must be equal, values as near to the float64 truth as their dtype allows.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unswag/unswag.hpp"

namespace {

using unswag::DType;

// The value that has this name in a list of unswag/lists.hpp.
template <class Enum>
Enum named(const std::string& name) {
  for (const auto& entry : unswag::list_of(Enum{}))
    if (entry.name == name) return entry.value;
  throw std::invalid_argument(name + " is in no list");
}

struct Tensor {
  std::string dtype;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<std::uint8_t> bytes;

  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
  DType type() const { return named<DType>(dtype); }
  std::int64_t size() const { return rows * cols; }
  unswag::ConstRows in() const { return {bytes.data(), type(), rows, cols, cols}; }
  unswag::Rows out() { return {bytes.data(), type(), rows, cols, cols}; }
  unswag::ConstVector vector_in() const { return {bytes.data(), type(), size()}; }
  unswag::Vector vector_out() { return {bytes.data(), type(), size()}; }

  double value(std::int64_t i) const {
    switch (type()) {
      case DType::f64: return as<double>()[i];
      case DType::f32: return as<float>()[i];
      case DType::bf16: return std::bit_cast<float>(std::uint32_t{as<std::uint16_t>()[i]} << 16);
      case DType::f16: break;
    }
    ADD_FAILURE() << "float16 has no value here; compare its bits";
    return 0;
  }
};

struct Case {
  std::string name;
  std::map<std::string, std::string> key;
  std::map<std::string, Tensor> tensor;

  double number(const std::string& k) const { return std::stod(key.at(k)); }
  std::uint64_t integer(const std::string& k) const { return std::stoull(key.at(k)); }
};

std::vector<Case> read(const std::string& file) {
  const std::string path = std::string(UNSWAG_VECTORS) + "/" + file;
  std::ifstream stream(path);
  EXPECT_TRUE(stream) << "cannot open " << path;
  std::vector<Case> cases;
  std::string line;
  std::getline(stream, line);
  EXPECT_EQ(line, "format 1.0") << path;
  while (std::getline(stream, line)) {
    std::istringstream words(line);
    std::string first;
    words >> first;
    if (first == "case") {
      Case& c = cases.emplace_back();
      words >> c.name;
      for (std::string pair; words >> pair;) c.key[pair.substr(0, pair.find('='))] = pair.substr(pair.find('=') + 1);
      continue;
    }
    Tensor& t = cases.back().tensor[first];
    words >> t.dtype >> t.rows >> t.cols;
    for (std::string word; words >> word;) {
      const std::uint64_t bits = std::stoull(word, nullptr, 16);
      const std::size_t width = word.size() / 2;
      t.bytes.resize(t.bytes.size() + width);
      std::memcpy(t.bytes.data() + t.bytes.size() - width, &bits, width);  // little-endian, as the format
    }
    EXPECT_EQ(t.bytes.size() % static_cast<std::size_t>(std::max<std::int64_t>(t.size(), 1)), 0U) << path << ": " << line;
  }
  EXPECT_FALSE(cases.empty()) << path;
  return cases;
}

Tensor like(const Tensor& t, const std::string& dtype, std::size_t width) {
  return {dtype, t.rows, t.cols, std::vector<std::uint8_t>(static_cast<std::size_t>(t.size()) * width, 0xAB)};
}
Tensor like(const Tensor& t) { return {t.dtype, t.rows, t.cols, std::vector<std::uint8_t>(t.bytes.size(), 0xAB)}; }

// |ours - truth| within some units of rounding of the value and of the tensor's root mean square: a wrong formula is far off.
void expect_near(const Tensor& ours, const Tensor& truth, const std::string& what, double units = 4) {
  const double unit = ours.type() == DType::bf16 ? 0x1p-9 : 0x1p-24;
  double squares = 0;
  for (std::int64_t i = 0; i < truth.size(); ++i) squares += truth.value(i) * truth.value(i);
  const double rms = std::sqrt(squares / static_cast<double>(truth.size()));
  for (std::int64_t i = 0; i < truth.size(); ++i)
    EXPECT_NEAR(ours.value(i), truth.value(i), units * unit * (std::abs(truth.value(i)) + rms)) << what << " element " << i;
}

class Golden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!unswag::backend_runs_here(GetParam())) GTEST_SKIP() << "this processor lacks " << GetParam();
    ASSERT_TRUE(unswag::use_backend(GetParam()).ok());
  }
  void TearDown() override { ASSERT_TRUE(unswag::use_backend("").ok()); }

  static void ok(const unswag::Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }
};

TEST_P(Golden, MaskBytesAreEqual) {
  for (const char* file : {"mask.txt", "jax_mask.txt"}) {
    for (const Case& c : read(file)) {
      const Tensor& x = c.tensor.at("x");
      const Tensor& expected = c.tensor.at("packed");
      Tensor y = like(x);
      Tensor packed = like(expected);
      const std::int64_t stride = expected.cols;
      ASSERT_EQ(stride, unswag::packed_row_bytes(x.cols, 1));
      ok(unswag::mask_forward({.act = named<unswag::Mask>(c.key.at("act")),
                               .slope = c.number("slope"),
                               .x = x.in(),
                               .y = y.out(),
                               .packed = {packed.bytes.data(), stride}}));
      EXPECT_EQ(packed.bytes, expected.bytes) << c.key.at("act") << " " << x.dtype << " " << x.rows << " x " << x.cols;
    }
  }
}

TEST_P(Golden, DrawsAreEqual) {
  for (const Case& c : read("philox.txt")) {
    const Tensor& expected = c.tensor.at("draws");
    std::vector<std::uint32_t> draws(static_cast<std::size_t>(expected.size()));
    ok(unswag::philox_fill(draws.data(), expected.size(), c.integer("seed"), c.integer("offset")));
    EXPECT_EQ(std::memcmp(draws.data(), expected.bytes.data(), expected.bytes.size()), 0) << "seed " << c.key.at("seed");
  }
}

TEST_P(Golden, DropoutIsEqual) {
  for (const Case& c : read("dropout.txt")) {
    const Tensor& x = c.tensor.at("x");
    Tensor y = like(x);
    ok(unswag::dropout(
        {.x = x.in(), .y = y.out(), .p = c.number("p"), .seed = c.integer("seed"), .offset = c.integer("offset")}));
    EXPECT_EQ(y.bytes, c.tensor.at("y").bytes) << "p " << c.key.at("p") << " " << x.dtype;
  }
}

TEST_P(Golden, BlocksAreEqual) {
  for (const Case& c : read("block.txt")) {
    const Tensor &x = c.tensor.at("x"), &expected = c.tensor.at("packed"), &truth = c.tensor.at("decoded");
    const unswag::Block codec = named<unswag::Block>(c.key.at("codec"));
    const std::string what = c.key.at("codec") + " " + x.dtype + " " + c.key.at("stochastic");
    ASSERT_EQ(expected.cols, unswag::block_row_bytes(codec, x.cols)) << what;
    Tensor packed = like(expected);
    ok(unswag::block_encode({.codec = codec,
                             .x = x.in(),
                             .packed = {packed.bytes.data(), expected.cols},
                             .stochastic = c.integer("stochastic") != 0,
                             .seed = c.integer("seed"),
                             .offset = c.integer("offset")}));
    EXPECT_EQ(packed.bytes, expected.bytes) << what;
    Tensor decoded = like(x, "float32", 4);
    ok(unswag::block_decode({.codec = codec, .packed = {expected.bytes.data(), expected.cols}, .x = decoded.out()}));
    for (std::int64_t i = 0; i < x.size(); ++i) {
      if (std::isnan(truth.value(i))) {
        EXPECT_TRUE(std::isnan(decoded.value(i))) << what << " element " << i;
      } else {
        EXPECT_EQ(decoded.value(i), static_cast<float>(truth.value(i))) << what << " element " << i;
      }
    }
  }
}

TEST_P(Golden, StepCodesAreEqual) {
  for (const Case& c : read("codes.txt")) {
    const Tensor& x = c.tensor.at("x");
    const Tensor& expected = c.tensor.at("rows");
    Tensor y = like(x), packed = like(expected);
    unswag::CodeForward args{
        .bits = static_cast<int>(c.integer("bits")), .x = x.in(), .y = y.out(), .packed = {packed.bytes.data(), expected.cols}};
    std::istringstream bounds(c.key.at("bounds"));
    for (std::string bound; std::getline(bounds, bound, ',');) args.bounds[args.count++] = std::stod(bound);
    ok(unswag::code_forward(args));
    EXPECT_EQ(packed.bytes, expected.bytes) << "bits " << args.bits << " " << x.dtype << " " << x.rows << " x " << x.cols;
  }
}

TEST_P(Golden, DitherIsEqual) {
  for (const Case& c : read("dither.txt")) {
    const Tensor& x = c.tensor.at("x");
    const Tensor& expected = c.tensor.at("packed");
    Tensor dx = like(x), packed = like(expected);
    const unswag::Activation act = named<unswag::Activation>(c.key.at("act"));
    const int bits = static_cast<int>(c.integer("bits"));
    const std::uint64_t seed = c.integer("seed"), offset = c.integer("offset");
    ok(unswag::dither_forward({.act = act,
                               .bits = bits,
                               .seed = seed,
                               .offset = offset,
                               .x = x.in(),
                               .y = {},
                               .packed = {packed.bytes.data(), expected.cols}}));
    const std::string what = c.key.at("act") + " bits " + c.key.at("bits") + " " + x.dtype;
    EXPECT_EQ(packed.bytes, expected.bytes) << what;
    ok(unswag::dither_backward({.act = act,
                                .bits = bits,
                                .seed = seed,
                                .offset = offset,
                                .dy = c.tensor.at("dy").in(),
                                .packed = {expected.bytes.data(), expected.cols},
                                .dx = dx.out()}));
    expect_near(dx, c.tensor.at("dx"), what + " dx");
  }
}

TEST_P(Golden, NonzerosAreEqual) {
  for (const Case& c : read("nonzero.txt")) {
    const Tensor& x = c.tensor.at("x");
    const Tensor &offsets = c.tensor.at("offsets"), &expected = c.tensor.at("bitmap");
    Tensor bitmap = like(expected), values = like(c.tensor.at("values")), back = like(x);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(x.rows));
    ok(unswag::nonzero_count({.x = x.in(), .counts = counts.data()}));
    for (std::int64_t r = 0; r < x.rows; ++r)
      EXPECT_EQ(counts[static_cast<std::size_t>(r)], offsets.as<std::int64_t>()[r + 1] - offsets.as<std::int64_t>()[r]);
    ok(unswag::nonzero_encode({.x = x.in(),
                               .offsets = offsets.as<std::int64_t>(),
                               .bitmap = {bitmap.bytes.data(), expected.cols},
                               .values = values.vector_out()}));
    EXPECT_EQ(bitmap.bytes, expected.bytes) << x.dtype;
    EXPECT_EQ(values.bytes, c.tensor.at("values").bytes) << x.dtype;
    ok(unswag::nonzero_decode({.bitmap = {expected.bytes.data(), expected.cols},
                               .offsets = offsets.as<std::int64_t>(),
                               .values = c.tensor.at("values").vector_in(),
                               .x = back.out()}));
    EXPECT_EQ(back.bytes, x.bytes) << x.dtype;
  }
}

TEST_P(Golden, GatedUnits) {
  for (const Case& c : read("gated.txt")) {
    const Tensor& gate = c.tensor.at("gate");
    const unswag::ConstRows g = gate.in(), up = c.tensor.at("up").in(), dh = c.tensor.at("dh").in();
    const unswag::Activation act = named<unswag::Activation>(c.key.at("act"));
    Tensor h = like(gate), dgate = like(gate), dup = like(gate), again = like(gate);
    ok(unswag::gated_forward({.act = act, .gate = g, .up = up, .h = h.out()}));
    ok(unswag::gated_backward(
        {.act = act, .gate = g, .up = up, .dh = dh, .dgate = dgate.out(), .dup = dup.out(), .h = again.out()}));
    const std::string what = c.key.at("act") + " " + gate.dtype;
    expect_near(h, c.tensor.at("h"), what + " h");
    expect_near(dgate, c.tensor.at("dgate"), what + " dgate");
    expect_near(dup, c.tensor.at("dup"), what + " dup");
    EXPECT_EQ(h.bytes, again.bytes) << what << ": the product made again";
  }
}

TEST_P(Golden, RmsNorm) {
  for (const Case& c : read("rms_norm.txt")) {
    const Tensor& x = c.tensor.at("x");
    const unswag::ConstVector w = c.tensor.at("weight").vector_in();
    const double offset = c.number("weight_offset");
    Tensor y = like(x), dx = like(x);
    Tensor rstd = like(c.tensor.at("rstd"), "float32", 4), dw = like(c.tensor.at("dw"), "float32", 4);
    ok(unswag::rms_norm_forward(
        {.x = x.in(), .weight = w, .eps = c.number("eps"), .weight_offset = offset, .y = y.out(), .rstd = rstd.vector_out()}));
    ok(unswag::rms_norm_backward({.x = x.in(),
                                  .weight = w,
                                  .rstd = rstd.vector_in(),
                                  .dy = c.tensor.at("dy").in(),
                                  .weight_offset = offset,
                                  .dx = dx.out(),
                                  .dw = dw.vector_out()}));
    for (const auto& [name, ours] : {std::pair<std::string, Tensor*>{"y", &y}, {"rstd", &rstd}, {"dx", &dx}, {"dw", &dw}})
      expect_near(*ours, c.tensor.at(name), name);
  }
}

TEST_P(Golden, LayerNorm) {
  for (const Case& c : read("layer_norm.txt")) {
    const Tensor& x = c.tensor.at("x");
    const unswag::ConstVector w = c.tensor.at("weight").vector_in();
    Tensor y = like(x), dx = like(x);
    Tensor mean = like(c.tensor.at("mean"), "float32", 4), rstd = like(c.tensor.at("rstd"), "float32", 4);
    Tensor dw = like(c.tensor.at("dw"), "float32", 4), db = like(c.tensor.at("db"), "float32", 4);
    ok(unswag::layer_norm_forward({.x = x.in(),
                                   .weight = w,
                                   .bias = c.tensor.at("bias").vector_in(),
                                   .eps = c.number("eps"),
                                   .y = y.out(),
                                   .mean = mean.vector_out(),
                                   .rstd = rstd.vector_out()}));
    ok(unswag::layer_norm_backward({.x = x.in(),
                                    .weight = w,
                                    .mean = mean.vector_in(),
                                    .rstd = rstd.vector_in(),
                                    .dy = c.tensor.at("dy").in(),
                                    .dx = dx.out(),
                                    .dw = dw.vector_out(),
                                    .db = db.vector_out()}));
    // A mean of 30 is rounded to 2^-20, which shows in y and its gradients.
    for (const auto& [name, ours] : {std::pair<std::string, Tensor*>{"y", &y}, {"dx", &dx}, {"dw", &dw}, {"db", &db}})
      expect_near(*ours, c.tensor.at(name), name, 16);
    expect_near(mean, c.tensor.at("mean"), "mean");
    expect_near(rstd, c.tensor.at("rstd"), "rstd");
  }
}

TEST_P(Golden, CrossEntropy) {
  for (const Case& c : read("cross_entropy.txt")) {
    Tensor logits = c.tensor.at("logits");
    Tensor loss = like(c.tensor.at("loss"), "float32", 4), lse = loss;
    ok(unswag::cross_entropy({.logits = logits.out(),
                              .labels = c.tensor.at("labels").as<std::int64_t>(),
                              .class_weight = {},
                              .row_scale = {},
                              .ignore_index = -100,
                              .label_smoothing = c.number("label_smoothing"),
                              .softcap = c.number("softcap"),
                              .logit_scale = c.number("logit_scale"),
                              .loss = loss.vector_out(),
                              .lse = lse.vector_out()}));
    // e^z takes over the absolute error of a soft-capped z, which is a few units of |z|.
    const double units = c.number("softcap") > 0 ? 16 : 4;
    expect_near(loss, c.tensor.at("loss"), "loss");
    expect_near(lse, c.tensor.at("lse"), "lse");
    expect_near(logits, c.tensor.at("gradient"), "gradient", units);
  }
}

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (std::string_view name : unswag::backend_names()) names.emplace_back(name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(Every, Golden, testing::ValuesIn(backends()), [](const auto& row) {
  std::string name = row.param;
  for (char& c : name)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  return name;
});

}  // namespace
