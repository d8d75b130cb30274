#!/usr/bin/env bash
# Compiles the bindings of the CUDA kernels, with warnings as errors, against any torch: what they need of it is in the
# headers of a CPU build too. `make cuda-build` makes the whole extension, with a CUDA torch, and imports it.
#
# usage: scripts/check_cuda_bindings.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$("$1" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include
for source in csrc/torch/*_cuda.cpp; do
    nvcc -std=c++20 -DUSE_CUDA -isystem "$torch" -isystem "$torch/torch/csrc/api/include" \
        -Xcompiler -fvisibility=hidden,-Wall,-Wextra,-Werror,-fsyntax-only -c "$source" -o /dev/null
done
echo "$(ls csrc/torch/*_cuda.cpp | wc -l) bindings of CUDA kernels compiled"
