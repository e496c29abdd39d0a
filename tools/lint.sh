#!/usr/bin/env bash
# tools/lint.sh JOBS: formatting, lint and types; says everything that is wrong, not only the first thing.
set -uo pipefail
cd "$(dirname "$0")/.."
bad=0
step() {
  echo "== $1"
  shift
  "$@" || bad=1
}

# clang-tidy over what the build compiled; a kernel file, compiled once per instruction set, is read as AVX2 only.
tidy() {
  mkdir -p build/lint
  python - <<'PYTHON' | xargs -P "$1" -n 1 clang-tidy -p build/lint --quiet 2> >(grep -v -E 'warnings? (generated|treated)|^Suppressed|^Use -header-filter' >&2)
import json
import os
import re

with open("build/release/compile_commands.json") as file:
    commands = json.load(file)
# What nvcc compiles is read as the row cuda-emulated: clang-tidy does not know every CUDA.
kept = [c for c in commands if re.search(r"-DUNSWAG_ISA_NS=(?!avx2\b|cuda_emulated\b)", c["command"]) is None]
for c in kept:
    c["command"] = re.sub(r" -fsched\S+", "", c["command"])  # GCC's alone
with open("build/lint/compile_commands.json", "w") as file:
    json.dump(kept, file)
print(*sorted(os.path.relpath(c["file"]) for c in kept), sep="\n")
PYTHON
}

mapfile -t cpp < <(git ls-files '*.cpp' '*.hpp' '*.cu')
step clang-format clang-format --dry-run --Werror "${cpp[@]}"
step clang-tidy tidy "$1"
step ruff ruff check -q .
step "ruff format" ruff format -q --check .
step mypy mypy --no-error-summary
exit $bad
