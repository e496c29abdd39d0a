#!/usr/bin/env bash
# consumer_test.sh CMAKE BUILD SOURCE: installs the library, builds examples/cpp against it as an outside project, and runs it.
set -euo pipefail
cmake=$1 build=$2 source=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$cmake" --install "$build" --component cpp --prefix "$work/installed" >/dev/null
cuda=OFF
if [ -e "$build/libunswag_cuda.a" ]; then
  cuda=ON
  "$cmake" --install "$build" --component cuda --prefix "$work/installed" >/dev/null
fi
"$cmake" -S "$source/examples/cpp" -B "$work/build" -DCMAKE_PREFIX_PATH="$work/installed" -DWITH_CUDA=$cuda -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" >/dev/null
"$cmake" --build "$work/build" >/dev/null
"$work/build/store" "$work" | grep -q "24 layers read and verified"
"$work/build/relu_network" | tee "$work/output"
awk '$3 == "loss" { losses[++n] = $4 }
     /^saved/ { saved = $8; plain = $NF }
     END { if (!(n == 5 && losses[n] < 0.1 * losses[1] && saved * 32 == plain)) { print "the loss did not fall tenfold, or the mask is not one bit per unit"; exit 1 } }' "$work/output"
# Linked means there: the row of CUDA names its architectures, and without a driver the program ran all the same.
grep -q "^CUDA: $([ $cuda = ON ] && echo sm_ || echo none)" "$work/output"
