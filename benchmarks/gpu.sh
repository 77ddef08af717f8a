#!/usr/bin/env bash
# All that a GPU can prove and show, unattended, in under ten minutes: builds the extensions in place, compares bytes,
# looks for bad accesses and races, then measures. Needs nvcc, torch and triton, and no network:
#
#     benchmarks/gpu.sh [FOLDER FOR RESULTS]
#
# PYTHON     the interpreter that has torch; python3
# WHEELS     a folder with wheels of packages that it lacks; build/wheelhouse, which `make wheelhouse` fills on a machine
#            that has a network, for the Python that WHEELS_PYTHON names there
# COMMIT     what is measured, where this is no checkout
# ONLY       "tests" or "speed": leave the other out
# REHEARSE   1: go through all of it without a GPU, on emulations, with small arrays
#
# A step that fails does not keep those after it from running; what failed is listed at the end, and is the exit status.
# Each part leaves a file: gpu-tests.txt what the tests said, gpu.json what was measured. Where a command may take ten
# minutes, ONLY=tests and ONLY=speed are two; what the first has built is there for the second.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rehearse=${REHEARSE:-}
only=${ONLY:-tests speed}
results=$(realpath -m "${1:-benchmarks/results}")
made=$PWD/build/gpu # what is needed on the way
wheels=${WHEELS:-$PWD/build/wheelhouse}
rm -rf "$made" && mkdir -p "$results" "$made"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR="$made/triton" TORCHINDUCTOR_CACHE_DIR="$made/inductor"
command -v nvcc >/dev/null || PATH+=:/usr/local/cuda/bin

# `tests` and `benchmarks` are plain folders, which another package of such a name would hide.
for name in tests benchmarks; do
  mkdir -p "$made/first/$name"
  printf '__path__ = [%s]\n' "'$PWD/$name'" >"$made/first/$name/__init__.py"
done
export PYTHONPATH="$made/first:$PWD"
# The packages that are missing, or a message and their absence as exit status.
missing() {
  "$python" - "$@" <<'PY'
import importlib.util, shutil, sys
needed = "click msgspec numpy yaml rich safetensors torch triton pybind11 cmake ninja pytest hypothesis ml_dtypes setuptools"
programs = ("cmake", "ninja")
missing = [n for n in needed.split() if not (shutil.which(n) if n in programs else importlib.util.find_spec(n))]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}. On a machine with a network, `make wheelhouse` gets their wheels into "
             "build/wheelhouse; or put them into a folder, and name it in WHEELS")
PY
}
if ! missing 2>/dev/null && compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$made/wheels" "$wheels"/*.whl || exit
  PYTHONPATH+=":$made/wheels"
  PATH+=":$made/wheels/bin"
fi
missing || exit

failed=()
step() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }
# Other versions of packages warn of other things, which is no failure here: so none of this project's settings.
pytest=("$python" -m pytest -q -c /dev/null --rootdir=. -p no:cacheprovider)

step "build"
command -v nvidia-smi >/dev/null && nvidia-smi
# For this GPU alone: each architecture takes minutes.
if [ -z "${FASTINTERP_CUDA_ARCHITECTURES:-}" ]; then
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
  export FASTINTERP_CUDA_ARCHITECTURES=${found:-90}
fi
FASTINTERP_CUDA=1 "$python" setup.py -q build_ext --inplace >"$made/build" 2>&1 || { tail -n 40 "$made/build"; exit 1; }

# Compiling Triton's kernels takes most of the time, so several processes each run a part of the tests.
tests() {
  step "the same bytes everywhere; no bad access, no race"
  local checked=("${pytest[@]}" tests/devices/test_gpu.py -k sanitized) at_once=2 pids=() names=() i tool
  collected() { "${pytest[@]}" --collect-only "$@" >"$made/collected" 2>&1 || cat "$made/collected" >&2; grep :: "$made/collected"; }
  started() { pids+=("$!") && names+=("$1"); }
  if [ -n "$rehearse" ]; then
    collected tests/devices/test_gpu.py | grep -E 'launch|measures' >"$made/tests"
    "${checked[@]}" >"$made/log.sanitized" 2>&1 &
    started sanitized
  else
    export FASTINTERP_REQUIRE=gpu
    at_once=$(($(nproc) < 16 ? $(nproc) : 16))
    {
      collected tests/devices/test_gpu.py tests/devices/test_gpu_merge.py tests/devices/test_resident_gpu.py | grep -vE 'sanitized|32_bits'
      collected tests/devices/cuda/test_cuda_{groups,histogram,masked,masked_stats,measure}.py
      collected tests/numerics/test_same_bits.py | grep -F '[cuda-' | grep -v emulated
    } | sort -R --random-source=Makefile >"$made/tests"
    command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not there: bad accesses and races are not looked for"
    for tool in memcheck racecheck synccheck; do # errors of calls that torch only tries are not ours
      command -v compute-sanitizer >/dev/null || break
      timeout 250 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 --target-processes all \
        "${checked[@]}" >"$made/log.$tool" 2>&1 &
      started $tool
    done
  fi
  wc -l <"$made/tests" | sed 's/$/ tests/'
  [ -s "$made/tests" ] || failed+=("no tests were found")
  for ((i = 0; i < at_once; i++)); do
    awk -v n="$at_once" -v i="$i" 'NR % n == i' "$made/tests" >"$made/tests.$i"
    timeout 280 xargs -r -a "$made/tests.$i" -d '\n' "${pytest[@]}" >"$made/log.part $i" 2>&1 &
    started "part $i"
  done
  for i in "${!pids[@]}"; do
    wait "${pids[i]}" || {
      if grep -qiE 'not supported|unable to find injection|permission' "$made/log.${names[i]}" && [[ ${names[i]} == *check ]]; then
        echo "${names[i]}: compute-sanitizer does not work here" # some containers and GPUs: no failure of the kernels
      else
        failed+=("${names[i]}")
      fi
      grep -E '^(FAILED|ERROR|E  |=========)' "$made/log.${names[i]}" | head -n 40
    }
    tail -n 1 "$made/log.${names[i]}" | sed "s/^/${names[i]}: /"
  done
  [ -n "$rehearse" ] || "${pytest[@]}" tests/devices/test_gpu_merge.py -k 32_bits || failed+=("more elements than 32 bits count")
}

speed() {
  step "speed"
  timeout 300 "$python" -m benchmarks.gpu ${rehearse:+--rehearse} --commit "${COMMIT:-}" --out "$results/gpu.json" ||
    failed+=("speed: a bound, or see above")
}

# A pipe would make a subshell of it, in which what failed is forgotten.
[[ $only != *tests* ]] || tests > >(tee "$results/gpu-tests.txt") 2>&1
[[ $only != *speed* ]] || speed
step "end"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
echo "all of it holds"
