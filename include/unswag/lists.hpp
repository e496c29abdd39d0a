// The dtypes, masks, activations and block codecs, each listed once.  The position of an entry is the
// value of its enum, and its code in the Python module.  Checks, kernels, bindings and tests loop over these lists; an entry
// whose formula is missing does not compile.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace unswag {

template <class Enum>
struct Named {
  Enum value;
  std::string_view name;
};

enum class DType : std::uint8_t { f32, f16, bf16, f64 };
struct DTypeForm {
  DType value;
  std::string_view name;
  int bytes;
};
inline constexpr std::array dtypes{
    DTypeForm{DType::f32, "float32", 4},
    DTypeForm{DType::f16, "float16", 2},
    DTypeForm{DType::bf16, "bfloat16", 2},
    DTypeForm{DType::f64, "float64", 8},
};

// One-bit masks: y = act(x), and one bit per element that the backward needs.
//   relu        y = x > 0 ? x : 0 (NaN stays NaN, relu(-0) = -0 as torch)       bit = not (x <= 0)      NaN: gradient passes
//   leaky_relu  y = x > 0 ? x : slope x                                         bit = x > 0             NaN: slope dy
//   relu6       y = min(max(x, 0), 6)                                           bit = not (x <= 0 or x >= 6)
// and as JAX defines them:
//   jax_relu        y = max(x, 0) (NaN stays NaN, relu(-0) = +0)                bit = x > 0             NaN: no gradient
//   jax_leaky_relu  y = x >= 0 ? x : slope x                                    bit = x >= 0            NaN: slope dy
//   jax_relu6       y = min(max(x, 0), 6)                                       bit = x > 0 and x < 6   NaN: no gradient
enum class Mask : std::uint8_t { relu, leaky_relu, relu6, jax_relu, jax_leaky_relu, jax_relu6 };
// clang-format off
inline constexpr std::array masks{
    Named<Mask>{Mask::relu, "relu"},
    Named<Mask>{Mask::leaky_relu, "leaky_relu"},
    Named<Mask>{Mask::relu6, "relu6"},
    Named<Mask>{Mask::jax_relu, "jax_relu"},
    Named<Mask>{Mask::jax_leaky_relu, "jax_leaky_relu"},
    Named<Mask>{Mask::jax_relu6, "jax_relu6"},
};
// clang-format on

// Activations with their exact derivative; src/math/activations.hpp has a struct for each, in this order.
//   relu2       y = max(x, 0)^2,  dx = 2 max(x, 0) dy;  relu2 of relu(x) is relu2 of x, so relu(x) may be kept instead
//   quick_gelu  y = x / (1 + e^(-1.702 x))
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu, relu2, quick_gelu };
// clang-format off
inline constexpr std::array activations{
    Named<Activation>{Activation::silu, "silu"},
    Named<Activation>{Activation::gelu, "gelu"},
    Named<Activation>{Activation::gelu_tanh, "gelu_tanh"},
    Named<Activation>{Activation::relu, "relu"},
    Named<Activation>{Activation::relu2, "relu2"},
    Named<Activation>{Activation::quick_gelu, "quick_gelu"},
};
// clang-format on

// Block codecs: n numbers as n codes of `bits` bits and one scale of 16 bits (docs/format.md section 9).  Rotated: integers,
// coded after a Walsh-Hadamard rotation, which spreads outliers over the block.  e4m3 and e5m2 are 8-bit floats, for
// comparison.
enum class Block : std::uint8_t { int8, int4, int2, e4m3, e5m2 };
struct BlockForm {
  Block value;
  std::string_view name;
  int n, bits;
  bool rotated;
  // Of a packed block, the scale included.
  constexpr int bytes() const { return n * bits / 8 + 2; }
};
// clang-format off
inline constexpr std::array blocks{
    BlockForm{Block::int8, "int8", 32, 8, true},
    BlockForm{Block::int4, "int4", 16, 4, true},
    BlockForm{Block::int2, "int2", 64, 2, true},
    BlockForm{Block::e4m3, "e4m3", 32, 8, false},
    BlockForm{Block::e5m2, "e5m2", 32, 8, false},
};
// clang-format on

// The list of an enum, whether a value is in it, and its entry.
constexpr const auto& list_of(DType) { return dtypes; }
constexpr const auto& list_of(Mask) { return masks; }
constexpr const auto& list_of(Activation) { return activations; }
constexpr const auto& list_of(Block) { return blocks; }
template <class Enum>
constexpr bool is_listed(Enum value) {
  return std::size_t(value) < list_of(value).size();
}
template <class Enum>
constexpr const auto& listed(Enum value) {
  return list_of(value)[std::size_t(value)];
}

template <class Enum>
constexpr bool is_in_order() {
  for (std::size_t i = 0; i < list_of(Enum{}).size(); ++i)
    if (list_of(Enum{})[i].value != Enum(i)) return false;
  return true;
}
static_assert(is_in_order<DType>() && is_in_order<Mask>() && is_in_order<Activation>() && is_in_order<Block>(),
              "the position of an entry is not the value of its enum");

}  // namespace unswag
