#!/usr/bin/env bash
# Tests of the extension under sanitizers: `sanitize.sh address|thread [TESTS OR OPTIONS OF PYTEST]`.
#
#   address   AddressSanitizer and UndefinedBehaviorSanitizer: accesses outside of memory, use after free, undefined shifts,
#             conversions and alignments. Memory that is not freed at the end is Python's own, and not reported
#   thread    ThreadSanitizer: accesses of two threads without an order
#
# The extension is built in build/sanitize/, beside a copy of the sources, so that processes that tests start use it too.
# BASELINE=1 builds no instruction set but the one that every processor has: in half the time.
# PYTHON names the interpreter of an environment that runs the tests (.venv/bin/python). The first report ends the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=$1 && shift
python=$(readlink -e "$(dirname "${PYTHON:-.venv/bin/python}")")/python
case $kind in
  address) flags=address,undefined libraries="libubsan.so libasan.so" symbol=__asan_init ;;
  thread) flags=thread libraries=libtsan.so symbol=__tsan_init ;;
  *) echo "sanitize.sh: address or thread, not $kind" >&2 && exit 2 ;;
esac
compiler=${CXX:-g++}
folder=$PWD/build/sanitize/$kind${BASELINE:+-baseline}
rm -rf "$folder/tree" && mkdir -p "$folder/tree"
tar cf - --exclude='./.*' --exclude=./build --exclude=./dist --exclude=./benchmarks/results --exclude='*.so' --exclude=__pycache__ . \
  | tar xf - -C "$folder/tree"

export PATH=$(dirname "$python"):$PATH
cmake -S . -B "$folder/cmake" -G Ninja -DFASTINTERP_SANITIZE="$flags" -DFASTINTERP_BASELINE="${BASELINE:-0}" -DFASTINTERP_CUDA=0 \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" --log-level=WARNING \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$folder/built"
cmake --build "$folder/cmake" | tail -n 1
cp "$folder"/built/_C.* "$folder/tree/fastinterp/"
nm -D "$folder"/built/_C.* | grep "$symbol" >/dev/null || { echo "sanitize.sh: the extension has no $symbol" >&2 && exit 1; }

# Python is not built with sanitizers, so their libraries are loaded first; libstdc++ too, for exceptions that they watch.
preload=$("$compiler" -print-file-name=libstdc++.so.6)
for library in $libraries; do preload="$("$compiler" -print-file-name="$library") $preload"; done
cd "$folder/tree"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:abort_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:abort_on_error=1:second_deadlock_stack=1:suppressions=$folder/tree/tests/attacks/tsan.txt
# Threads of torch wait for each other in ways that ThreadSanitizer does not see.
export OMP_NUM_THREADS=1
export PYTHONPATH=$folder/tree LD_PRELOAD=$preload

# A mistake of each kind must be noticed, or nothing below says anything.
if "$python" tests/attacks/mistakes.py "$kind" >"$folder/mistake.log" 2>&1 || ! grep -q "Sanitizer: " "$folder/mistake.log"; then
  cat "$folder/mistake.log" >&2 && echo "sanitize.sh: a deliberate mistake was not noticed" >&2 && exit 1
fi
# Tests that measure memory would measure that of the sanitizers.
exec "$python" -m pytest -k "not memory_does_not_grow and not memory_of_matrices" "$@"
