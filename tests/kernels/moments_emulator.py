"""The moments kernels in the emulation: the Python side of moments_harness.cpp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from emulator import HERE, KERNELS, ORDERS, TYPES, Emulator, decode, encode

SOURCES = (
    *(KERNELS / f"{name}.cu" for name in ("moments", "gram", "gram_narrow", "centring")),
    HERE / "moments_harness.cpp",
)
NARROW = ("float32_gram", "tf32_gram", "bfloat16_gram")
FUNCTIONS = ("class_sums", "gram", "sample_gram", "norm_moments", "centred_class_sums", *NARROW)


@dataclass(frozen=True)
class Features:
    """``stored`` [sets, rows, columns], and how it lies in memory; 16-bit types are stored as their bits."""

    stored: np.ndarray
    type: str = "float32"
    row_stride: int = 0  # 0: contiguous
    set_stride: int = 0
    displacement: int = 0  # of the first element from an aligned address, in elements
    shift: np.ndarray | None = None  # [sets, columns]

    @classmethod
    def of(cls, values: np.ndarray, type: str = "float32", **layout) -> Features:
        """Rounds ``values`` to ``type``."""
        return cls(encode(values, type), type, **layout)

    @property
    def values(self) -> np.ndarray:
        return decode(self.stored, self.type)

    @property
    def shifted(self) -> np.ndarray:
        """What the kernels compute with: values minus shift, rounded to float64 once."""
        return self.values if self.shift is None else self.values - self.shift[:, None, :]


class MomentsEmulator(Emulator):
    def run(
        self,
        function: str,
        features: Features,
        *,
        labels: np.ndarray | None = None,
        classes: int = 0,
        multiprocessors: int = 4,
        order: str = "forward",
        seed: int = 0,
    ) -> tuple[np.ndarray, ...]:
        """The outputs of ``function``; raises EmulationError where the process dies."""
        sets, rows, columns = features.stored.shape
        row_stride = features.row_stride or columns
        header = [
            FUNCTIONS.index(function),
            TYPES.index(features.type),
            ORDERS.index(order),
            seed,
            sets,
            rows,
            columns,
            features.set_stride or rows * row_stride,
            row_stride,
            features.displacement,
            classes,
            multiprocessors,
            features.shift is not None,
        ]
        arrays = [features.stored]
        if features.shift is not None:
            arrays.append(features.shift.astype(np.float64))
        if function in ("class_sums", "centred_class_sums"):
            ordered = np.sort(labels)
            offsets = np.searchsorted(ordered, np.arange(classes + 1))
            arrays.append(np.argsort(labels, kind="stable").astype(np.int64))
            arrays.append((offsets if function == "class_sums" else ordered).astype(np.int64))
        shapes = {
            "class_sums": [(sets, classes, columns)],
            "gram": [(sets, columns, columns)],
            "sample_gram": [(sets, rows, rows)],
            "norm_moments": [(sets, columns), (sets,)],
            "centred_class_sums": [(classes,), (sets, classes, columns), (sets, columns)],
            **{name: [(sets, columns, columns)] for name in NARROW},
        }[function]
        return self.call(function, header, arrays, [(shape, "float64") for shape in shapes])
