#!/usr/bin/env bash
# refused_test.sh CXX SOURCE_DIR: what no formula is right for does not compile, and the error says why.
set -uo pipefail
compiler=$1 source=$2
failed=0

compiles() { # headers, then the body of a function
  printf '#include "%s"\n' $1 | cat - <(printf 'using namespace unswag;\nvoid f() { %s; }\n' "$2") |
    "$compiler" -x c++ -std=c++20 -fsyntax-only -I "$source/include" -I "$source/src" - 2>&1
}

accepts() {
  local said
  said=$(compiles "$@") || { echo "does not compile: $2"; echo "$said"; failed=1; }
}
refuses() { # what the error says, then as above
  local said
  if said=$(compiles "$2" "$3"); then
    echo "compiles: $3"
    failed=1
  elif [[ $said != *"$1"* ]]; then
    echo "does not say '$1': $3"
    echo "$said"
    failed=1
  fi
}

for function in exp_normal exp_short; do
  accepts math/exp.hpp "math::$function(1.f)"
  refuses 'for floats' math/exp.hpp "math::$function(1.)"
done
accepts math/exp.hpp 'math::exp(1.f), math::exp(1.)'
accepts math/fields.hpp 'std::uint8_t b[8]; math::pack_fields<7>(b, b + 1, 0)'
refuses '1 to 8 bits' math/fields.hpp 'std::uint8_t b[9]; math::pack_fields<9>(b, b + 1, 0)'
refuses '1 to 8 bits' math/fields.hpp 'std::uint8_t b[9]; math::unpack_fields<0>(b, b + 1, 0)'
accepts math/activations.hpp 'static_assert(math::AllActivations::are_those_of_the_list())'
refuses 'static assertion failed' math/activations.hpp \
  'static_assert(math::Activations<math::Gelu, math::Silu>::are_those_of_the_list())'
accepts math/blocks.hpp 'math::fp8_value<math::BlockOf<Block::e4m3>>(0)'
refuses 'Fp8' math/blocks.hpp 'math::fp8_value<math::BlockOf<Block::int8>>(0)'
exit $failed
