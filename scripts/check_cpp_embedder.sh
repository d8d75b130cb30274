#!/usr/bin/env bash
# Builds libtransferops, installs it into a temporary prefix, and builds and runs a C++ program against the installed
# package through find_package(transferops). Usage: scripts/check_cpp_embedder.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PATH="$(dirname "$python"):$PATH"
torch_prefix=$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')

cmake -S . -B "$work/library" -G Ninja -DPython_EXECUTABLE="$python" -DTRANSFEROPS_WERROR=ON \
    -DTRANSFEROPS_CUDA="${TRANSFEROPS_CUDA:-AUTO}" -DCMAKE_INSTALL_PREFIX="$work/prefix" >"$work/log" 2>&1 \
    && cmake --build "$work/library" >>"$work/log" 2>&1 \
    && cmake --install "$work/library" >>"$work/log" 2>&1 \
    && cmake -S examples/cpp_embedder -B "$work/embedder" -G Ninja -DPython_EXECUTABLE="$python" \
        -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$work/prefix;$torch_prefix" >>"$work/log" 2>&1 \
    && cmake --build "$work/embedder" >>"$work/log" 2>&1 \
    || { cat "$work/log"; exit 1; }
"$work/embedder/embedder"
