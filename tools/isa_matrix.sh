#!/usr/bin/env bash
# The numeric Python tests with XLA, oneDNN and PyTorch held to older instruction sets, with several threads and other seeds.
# Usage: tools/isa_matrix.sh [SEEDS]   seeds beside the usual one, 2 unless said; pytest -n from JOBS.
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=${1:-2}
failed=()

run() { # settings, in words, then what pytest is to run
  local settings=$1
  shift
  echo "== $settings"
  env $settings python -m pytest -q -n "${JOBS:-2}" --disable-warnings "$@" || failed+=("$settings")
}

jax=(tests/python/jax/test_{activations,blocks,gated,norms,ffi,masks}.py)
# Inductor takes the processor's instructions even where PyTorch is held to others, and then does not compile.
torch=(tests/python/torch/test_{ops,functional,loss,nn}.py --deselect tests/python/torch/test_functional.py::test_inductor)
exact=(-k "exact or measure or 16_bit or fp64 or gate_value or formula or plain_spelling or differ or far_from_zero or no_further")

for isa in SSE4_2 AVX2 AVX512; do
  run "OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_max_isa=$isa" "${jax[@]}"
done
for isa in "SSE41 default 1" "AVX2 avx2 2" "AVX512_CORE avx512 3"; do
  read -r onednn aten threads <<<"$isa"
  run "ONEDNN_MAX_CPU_ISA=$onednn ATEN_CPU_CAPABILITY=$aten OMP_NUM_THREADS=$threads UNSWAG_TEST_THREADS=$threads" "${torch[@]}"
done
for ((seed = 1; seed <= seeds; seed++)); do
  run "OMP_NUM_THREADS=1 UNSWAG_TEST_SEED=$seed" "${jax[@]}" "${torch[@]}" "${exact[@]}"
done

if ((${#failed[@]})); then
  printf 'failed with %s\n' "${failed[@]}"
  exit 1
fi
