#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, GPU tests, compute-sanitizer, benchmarks, one JSON.
#   bench/gpu.sh [OUTPUT_DIRECTORY]        default: bench/results
# Needs no network: Python with torch (CUDA), numpy, pytest, pybind11, setuptools, cmake, ninja; nvcc; compute-sanitizer
# if there is one. Every step runs even if an earlier one failed; the exit status is that of the worst.
#
# All of it ends within GPU_SECONDS (default 570): a step that the rest of the time is too short for is stopped, the
# benchmarks after the last row that they finish. Rows are written as they are measured.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
status=0
declare -A steps

limit=${GPU_SECONDS:-570}

step() {  # step NAME COMMAND...: run it, keep its log and its exit status; 124 if the time is up
    local name=$1 left=$((limit - SECONDS))
    shift
    echo "== $name"
    timeout --kill-after=5 $((left > 1 ? left : 1)) "$@" >"$site/$name.log" 2>&1
    steps[$name]=$?
    tail -n 15 "$site/$name.log"
    [ "${steps[$name]}" -eq 0 ] || status=1
}

"$python" -c 'import sys, torch
torch.cuda.is_available() or sys.exit(f"needs a CUDA device: torch {torch.__version__} finds none")' || exit 1
command -v nvcc >/dev/null || { echo "needs nvcc on PATH, of the CUDA version of torch" >&2; exit 1; }

TRANSFEROPS_CUDA=ON step build "$python" -m pip install --no-index --no-deps --no-build-isolation --no-compile \
    --target "$site/packages" .
[ "${steps[build]}" -eq 0 ] || { cat "$site/build.log"; exit 1; }
export PYTHONPATH="$site/packages" PYTHONUNBUFFERED=1

# -P: import what was installed, not the source tree.
step tests timeout $((limit * 2 / 5)) "$python" -P -m pytest -q -p no:cacheprovider -m gpu -W "ignore::UserWarning" tests
# Before the sanitizers, which cost a factor of 10 to 100.
step benchmarks "$python" bench/gpu.py --seconds $((limit - SECONDS - 60)) --output "$out"
cat "$site/benchmarks.log"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 3 --target-processes all \
            "$python" bench/gpu_sanitizer_cases.py
    done
else
    echo "compute-sanitizer is not installed: memcheck and racecheck not run"
fi
for name in "${!steps[@]}"; do echo "$name=${steps[$name]}"; done >"$site/steps"
"$python" bench/gpu.py --steps "$site/steps" --output "$out" || status=1
exit $status
