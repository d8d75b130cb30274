#!/usr/bin/env bash
# Which lines of the Python package and of the CPU code the tests run. Ends with 1 where less than 95 % do. Lists of the
# lines that do not are left in build/coverage.
#
# usage: scripts/coverage.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1") bin=$(dirname "$1")
out=build/coverage
scripts/build_overlay.sh "$python" $out -DTRANSFEROPS_COVERAGE=ON
find $out \( -name '*.gcda' -o -name 'data.*' \) -delete
export PYTHONPATH=$PWD/$out/overlay PYTHONDONTWRITEBYTECODE=1 COVERAGE_FILE=$PWD/$out/data
failed=0
"$bin/coverage" run "$bin/pytest" -q -p no:cacheprovider --ignore=tests/kernels || failed=1
"$bin/coverage" combine --quiet $out
"$bin/coverage" report --show-missing --skip-covered --fail-under=95 >$out/python.txt || failed=1
"$bin/gcovr" --root . --filter csrc/ --object-directory $out --merge-mode-functions=separate --merge-lines \
    --fail-under-line=95 --txt $out/cpp.txt || failed=1
grep --no-filename TOTAL $out/python.txt $out/cpp.txt
exit $failed
