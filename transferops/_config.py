"""What was built, and what it runs on."""

from __future__ import annotations

import platform

import torch

from transferops._extension import build_info


def show_config() -> dict[str, object]:
    """Return the facts of this build and of the running machine, as a printable dictionary.

    Keys: ``version``, ``torch_built``, ``torch_running``, ``cuda_built`` (toolkit version, or None in a CPU build),
    ``cuda_architectures``, ``gpu`` (name, or None), ``compiler``, ``build_type``, ``cpu_level`` (the instruction set
    that the CPU kernels chose on this machine), ``threads`` and ``python``.
    """
    info = build_info()
    return {
        "version": info["version"],
        "torch_built": info["torch"],
        "torch_running": torch.__version__,
        "cuda_built": info["cuda"],
        "cuda_architectures": info["cuda_architectures"].split(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compiler": info["compiler"],
        "build_type": info["build_type"],
        "cpu_level": info["cpu_level"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
