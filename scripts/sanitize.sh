#!/usr/bin/env bash
# The op tests against CPU kernels and bindings that are built with AddressSanitizer and UndefinedBehaviorSanitizer.
#
# usage: scripts/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
bin=$(dirname "$python")
# But for what tests how torch takes the ops in: it calls them no differently.
tests=(tests/test_ops_*.py tests/test_bad_input.py tests/test_concurrency.py tests/test_large_indices.py
    -k "not opcheck and not graph_break")
[[ $# -gt 0 ]] && tests=("$@")

build=build/sanitize overlay=build/sanitize/overlay
scripts/build_overlay.sh "$python" $build -DTRANSFEROPS_SANITIZE=address,undefined

# The interpreter is not instrumented, so the runtimes come first; libstdc++ too, or throwing aborts (the runtime looks
# for __cxa_throw when it starts). Leaks are not looked for: what Python and torch keep until exit would be all of it.
compiler=${CXX:-g++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$PWD/$overlay PYTHONDONTWRITEBYTECODE=1
# Not with -m, which puts the working directory, and so the tree itself, before the overlay.
[[ $("$python" -c 'import sys; del sys.path[0]; import transferops._C as m; print(m.__file__)') == "$PWD/$overlay"/* ]]
"$bin/pytest" -q -p no:cacheprovider --capture=sys --numprocesses auto --maxprocesses 4 --dist loadfile "${tests[@]}"
