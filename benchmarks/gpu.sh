#!/usr/bin/env bash
# All that a GPU can prove and show, unattended, in under ten minutes: builds the extensions in place, compares bytes,
# looks for bad accesses, then measures. Needs nvcc, torch and triton, and no network:
#
#     benchmarks/gpu.sh [FOLDER FOR RESULTS]
#
# PYTHON names the interpreter that has torch. WHEELS may name a folder with wheels of packages that it lacks.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$results"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/wheels "$WHEELS"/*.whl || exit
  PYTHONPATH="$PWD:$PWD/build/wheels"
fi
"$python" - <<'PY' || exit
import importlib.util, sys
needed = "click msgspec numpy yaml rich safetensors torch triton pybind11 cmake ninja pytest hypothesis ml_dtypes".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}. Install them, or put their wheels into a folder and name it in WHEELS")
PY

step() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }
failed=()

step "build"
FASTINTERP_CUDA=1 "$python" setup.py -q build_ext --inplace || exit

step "the same bytes everywhere"
FASTINTERP_REQUIRE=gpu "$python" -m pytest -q -x tests/test_gpu.py || failed+=("bytes")

step "no bad access, no race"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    FASTINTERP_REQUIRE=gpu timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x tests/test_gpu.py -k "sanitized" | tail -5 || failed+=("$tool")
  done
else
  failed+=("compute-sanitizer is not there")
fi

step "speed"
"$python" -m benchmarks.gpu --out "$results/gpu.json" || failed+=("bounds")

step "end"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
