"""Loads the compiled module, which registers the ``torch.ops.transferops`` operators.

Import it for its effect before the first operator is used. A missing or unloadable module is an error with the command
that repairs it, never a half-working package.

Versions: the module uses torch's stable ABI of one release, :data:`LEAST_TORCH`, and runs with that release and all
later ones, whichever of them it was built with. It is of one minor version of Python.
"""

from __future__ import annotations

import sys

import torch

from transferops._validate import fail

LEAST_TORCH = "2.11"
"""As in ``pyproject.toml``, and as ``TORCH_TARGET_VERSION`` in ``csrc/torch/stable.h``."""

if torch.__version__ < LEAST_TORCH:
    raise ImportError(
        f"transferops: expected torch {LEAST_TORCH} or later, whose stable ABI its compiled module uses, got "
        f"{torch.__version__}.\nUpgrade it: {sys.executable} -m pip install --upgrade 'torch>={LEAST_TORCH}'\n"
        "The module itself need not be built again."
    )

try:
    from transferops import _C
except ImportError as error:
    raise ImportError(
        f"transferops: its compiled module could not be loaded ({error}).\n"
        f"It was not built, or was built for another Python or torch; this is Python "
        f"{sys.version_info.major}.{sys.version_info.minor} with torch {torch.__version__}.\n"
        f"Build it from the source tree: {sys.executable} -m pip install --no-build-isolation ."
    ) from error

build_info = _C.build_info
_CUDA = build_info()["cuda"] is not None  # read once: torch.compile traces check_device


def has_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for ``device``."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and _CUDA)


def check_device(argument: str, device: torch.device) -> None:
    """Raise ``ValueError`` unless this build has kernels for ``device``."""
    if has_kernels(device):
        return
    devices = "a CPU or CUDA tensor" if _CUDA else "a CPU tensor"
    fail(argument, f"{devices}, this build having no other kernels (transferops.show_config())", f"one on {device}")
