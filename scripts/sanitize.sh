#!/bin/sh
# `make sanitize [ARGS=...]`: the compiled CPU code with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests.
#
# Works on a copy of the tree, in build/sanitize, so that the ordinary modules stay as they are. Python itself is not
# instrumented, so the runtimes are preloaded; leaks are not looked for (Python keeps memory until it ends), and
# Triton's tests and what starts compilers are left out. A report ends the run with an error.
set -eu
cd "$(dirname "$0")/.."
copy=build/sanitize/tree
rm -rf "$copy"
mkdir -p "$copy"
tar cf - --exclude='./.git' --exclude='./.venv' --exclude='./build' --exclude='*.so' --exclude='__pycache__' . | tar xf - -C "$copy"
cd "$copy"
export PYTHONPATH="$PWD" LLMKERNELS_BUILD=cpu LLMKERNELS_BUILD_TESTS=1 LLMKERNELS_BUILD_DIR="$PWD/../objects"
export LLMKERNELS_CMAKE_ARGS="-DLLMKERNELS_SANITIZE=ON"
"${PY:-python3}" setup.py -q build_ext --inplace
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
export ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=99"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1"
exec "${PY:-python3}" -m pytest -q -p no:cacheprovider tests/ops tests/test_reliability.py -k "not triton and not leak" ${ARGS:-}
