#!/usr/bin/env bash
# tools/sanitize.sh JOBS: the C++ tests under the address + undefined-behaviour and the thread sanitizers, and the Python tests
# that call native code with the address sanitizer preloaded.  With clang 14.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$1

runtime=$(clang++-14 -print-file-name=libclang_rt.asan-x86_64.so 2>/dev/null || true)
if ! [ -e "$runtime" ]; then
  tools/packages.sh clang-14 libclang-rt-14-dev
  runtime=$(clang++-14 -print-file-name=libclang_rt.asan-x86_64.so)
fi
configure=(cmake -G Ninja -DCMAKE_CXX_COMPILER=clang++-14 --log-level=WARNING)

# A package with the sanitized module, beside and not in place of the one in python/.
package=$PWD/build/asan/python
rm -rf "$package"
mkdir -p "$package"
cp -r python/unswag "$package"
rm -f "$package"/unswag/_core*.so

export UBSAN_OPTIONS=print_stacktrace=1
"${configure[@]}" --preset asan -DUNSWAG_PYTHON=ON -DUNSWAG_PYTHON_DIR="$package/unswag" -DPython_EXECUTABLE="$(command -v python)"
cmake --build --preset asan -j "$jobs"
ctest --preset asan -j "$jobs"

"${configure[@]}" --preset tsan
cmake --build --preset tsan -j "$jobs"
# threads_test forks while threads run, on purpose; libgomp is not instrumented.
TSAN_OPTIONS="die_after_fork=0 suppressions=$PWD/tools/tsan.supp" ctest --preset tsan -j "$jobs"

# CPython keeps memory until it exits, so leaks are not looked for.  The C++ library is preloaded because the sanitizer must
# find its exceptions before any module brings them.
preload="$runtime $(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$package OMP_NUM_THREADS=1 \
  python -m pytest -q -o pythonpath="$package . tests/python/jax" tests/python/test_reference.py tests/python/torch/test_ops.py \
    tests/python/torch/test_functional.py tests/python/jax/test_ffi.py
