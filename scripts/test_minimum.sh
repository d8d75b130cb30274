#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml allows, in an environment of their own: the package is built
# against the oldest torch and, in the end, tried with the newest one, without being built again.
# Needs a Python for which the oldest NumPy and SciPy have wheels: 3.10 to 3.12. Usage: scripts/test_minimum.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=build/minimum
venv=$work/venv
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip packaging "tomli; python_version < '3.11'" "setuptools>=77" wheel "pybind11==2.13.*" "cmake>=3.22" ninja
"$venv/bin/python" scripts/dependencies.py minimum >$work/requirements.txt
cat $work/requirements.txt
$pip -r $work/requirements.txt

# A copy of the sources, so that the working tree's own extension is left alone.
rm -rf $work/source && mkdir -p $work/source
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $work/source
cd $work/source
python=$OLDPWD/$venv/bin/python
pip="$python -m pip install --quiet --disable-pip-version-check"
TRANSFEROPS_CUDA=OFF TRANSFEROPS_WERROR=ON $pip --no-build-isolation --no-deps --force-reinstall .
rm -rf transferops  # test what was installed
# Old packages warn of what newer ones beneath them deprecate.
"$python" -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning tests --ignore tests/kernels \
    --ignore tests/test_docs.py

if [ -n "${NEWEST_TORCH:-}" ]; then
    $pip --upgrade "$NEWEST_TORCH"
    "$python" -m pytest -q -p no:cacheprovider -W ignore tests/test_ops_*.py tests/test_h_score.py
fi
