"""transferops: decide what to transfer, from where, and how much.

* :mod:`transferops.ops` - the C++/CUDA kernels as pure functions of tensors
* :mod:`transferops.fisher` - Fisher information of a model over data
* :mod:`transferops.scores` - which source or model suits the target (H-score and kin)
* :mod:`transferops.rank` - features of models over data, many scores at once, and how well they rank
* :mod:`transferops.otqms` - how many samples of each source to train with
* :mod:`transferops.adapt` - heads in closed form, inheritance of parameters, and whether it hurts
* :mod:`transferops.compat` - the signatures that other packages have, over the scores here
* :mod:`transferops.integrations` - scikit-learn, Lightning, Hugging Face, laplace-torch and others: extras
* ``transferops`` on the command line - the same questions without a program
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transferops import ops
from transferops._config import show_config

try:
    __version__ = version("transferops")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "adapt",
    "compat",
    "data",
    "fisher",
    "integrations",
    "ops",
    "otqms",
    "rank",
    "scores",
    "show_config",
]

_LAZY = {"adapt", "compat", "data", "fisher", "integrations", "otqms", "rank", "scores"}


def __getattr__(name: str) -> Any:
    """Import the applications when they are first asked for, so that ``import transferops.ops`` stays light."""
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
