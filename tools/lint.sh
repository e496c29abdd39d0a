#!/usr/bin/env bash
# tools/lint.sh JOBS: formatting, lint and types; says everything that is wrong, not only the first thing.
set -uo pipefail
cd "$(dirname "$0")/.."
bad=0
step() { echo "== $1"; shift; "$@" || bad=1; }

mapfile -t cpp < <(git ls-files '*.cpp' '*.hpp')
step clang-format clang-format --dry-run --Werror "${cpp[@]}"
step ruff ruff check -q .
step "ruff format" ruff format -q --check .
step mypy mypy --no-error-summary
exit $bad
