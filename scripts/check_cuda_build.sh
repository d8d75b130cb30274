#!/usr/bin/env bash
# The full build against a CUDA torch where there is no GPU: builds, imports, runs the CPU tests of the ops and scores.
# Needs nvcc of torch's CUDA major version and about 6 GB. Usage: scripts/check_cuda_build.sh [TORCH] [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-torch==2.14.1}
python=${2:-python3}
venv=build/cuda-check/venv
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip "$torch" "setuptools>=77" wheel pybind11 cmake ninja numpy pytest

# A copy of the sources, so that the working tree's own extension is left alone.
rm -rf build/cuda-check/source && mkdir -p build/cuda-check/source
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/cuda-check/source
cd build/cuda-check/source
TRANSFEROPS_CUDA=ON TRANSFEROPS_WERROR=ON $OLDPWD/$venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation --no-deps --force-reinstall .
rm -rf transferops  # test what was installed
"$OLDPWD/$venv/bin/python" - <<'PY'
import transferops
config = transferops.show_config()
print(config)
assert config["cuda_built"], "no CUDA kernels in this build"
PY
"$OLDPWD/$venv/bin/python" -m pytest -q -p no:cacheprovider -W "ignore::UserWarning:torch" \
    tests/test_ops_moments.py tests/test_h_score.py
