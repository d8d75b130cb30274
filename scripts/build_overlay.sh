#!/usr/bin/env bash
# The package with a module _C built in another way: links to the Python files of the tree, and that module.
#
# usage: scripts/build_overlay.sh PYTHON FOLDER [CMake options]; then PYTHONPATH=FOLDER/overlay
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1") build=$2
shift 2
export PATH=$(dirname "$python"):$PATH PYTHONDONTWRITEBYTECODE=1
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" -DTRANSFEROPS_PYTHON=ON -DTRANSFEROPS_CUDA=OFF \
    -DTRANSFEROPS_WERROR=ON "$@"
cmake --build "$build"
rm -rf "$build/overlay"
mkdir -p "$build/overlay"
cp -rs "$PWD/transferops" "$build/overlay/"
rm -f "$build"/overlay/transferops/_C.*.so
cmake --install "$build" --prefix "$build/overlay/transferops"
