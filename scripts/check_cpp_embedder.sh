#!/usr/bin/env bash
# Builds libtransferops, installs it into a temporary prefix, and builds and runs a C++ program against the installed
# package through find_package(transferops). Where PYTHON has transferops, its score of the same data is compared with the
# program's. Not optimised, which takes a third of the time: what is tried is the package. Usage:
# scripts/check_cpp_embedder.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PATH="$(dirname "$python"):$PATH"
torch_prefix=$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')

cmake -S . -B "$work/library" -G Ninja -DPython_EXECUTABLE="$python" -DTRANSFEROPS_WERROR=ON -DCMAKE_BUILD_TYPE=Debug \
    -DTRANSFEROPS_CUDA="${TRANSFEROPS_CUDA:-AUTO}" -DCMAKE_INSTALL_PREFIX="$work/prefix" >"$work/log" 2>&1 \
    && cmake --build "$work/library" >>"$work/log" 2>&1 \
    && cmake --install "$work/library" >>"$work/log" 2>&1 \
    && cmake -S examples/cpp_embedder -B "$work/embedder" -G Ninja -DPython_EXECUTABLE="$python" \
        -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$work/prefix;$torch_prefix" >>"$work/log" 2>&1 \
    && cmake --build "$work/embedder" >>"$work/log" 2>&1 \
    || { cat "$work/log"; exit 1; }
"$work/embedder/embedder" | tee "$work/output"

"$python" -c 'import transferops' 2>/dev/null || { echo "not compared: $python has no transferops"; exit 0; }
"$python" - "$work/output" <<'PY'
import re
import sys

import torch

from transferops.scores import h_score

torch.manual_seed(0)  # the program's data
expected = h_score(torch.randn(4000, 40), torch.randint(5, (4000,)))
found = float(re.search(r"labels (\S+)", open(sys.argv[1]).read())[1])
assert abs(found - expected) < 1e-6 * expected, f"C++ {found}, Python {expected}"
print(f"the same from Python: {expected:.9f}")
PY
