"""The kernels of a layer's Fisher information in the emulation: the Python side of fisher_harness.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from emulator import HERE, KERNELS, ORDERS, TYPES, Emulator, decode, encode

KERNEL_FILES = ("fisher.cu", "fisher_diagonal.cu", "fisher_positions.cu", "fisher_projection.cu", "fisher_routes.cu")
SOURCES = (*(KERNELS / file for file in KERNEL_FILES), HERE / "fisher_harness.cpp")
FUNCTIONS = ("diagonal", "projection", "norm")
WAYS = ("tile_norm", "ghost_norm", "tile_projection", "contraction")  # of which norms and projections take one
DIAGONAL_WAYS = ("tile_diagonal", "wide_diagonal")
WIDE_PROJECTION = "wide_projection"  # one more way, of 16-bit types


@dataclass(frozen=True)
class Signal:
    """``stored`` [samples, depth, height, width, channels], and how it lies in memory."""

    stored: np.ndarray
    strides: tuple[int, ...]  # in elements, of all but the channels
    displacement: int = 0  # of the first element from an aligned address, in elements

    @classmethod
    def of(
        cls, values: np.ndarray, type: str, *, row_padding: int = 0, sample_padding: int = 0, displacement: int = 0
    ) -> Signal:
        """Rounds ``values`` to ``type``. A row is the channels of one position."""
        _, _, height, width, channels = values.shape
        row = channels + row_padding
        sample = int(np.prod(values.shape[1:4])) * row + sample_padding
        return cls(encode(values, type), (sample, height * width * row, width * row, row), displacement)


@dataclass(frozen=True)
class Layer:
    """A batch of a layer; its window as in torch's conv3d."""

    inputs: Signal
    grad_outputs: Signal
    type: str = "float32"
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    directions: np.ndarray | None = None  # [K, O, I / groups, *kernel]
    cache: dict = field(default_factory=dict, repr=False, compare=False)  # of the reference

    @property
    def weight_shape(self) -> tuple[int, ...]:
        channels = self.inputs.stored.shape[-1] // self.groups
        return (self.grad_outputs.stored.shape[-1], channels, *self.kernel)

    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and output gradients as torch has them, channels second."""
        signals = (self.inputs, self.grad_outputs)
        inputs, grad_outputs = (np.moveaxis(decode(x.stored, self.type), -1, 1) for x in signals)
        return inputs, grad_outputs


class FisherEmulator(Emulator):
    def run(
        self, function: str, layer: Layer, *, multiprocessors: int = 4, order: str = "forward", seed: int = 0
    ) -> tuple[np.ndarray]:
        """The output of ``function``; raises EmulationError where the process dies."""
        samples, *in_size, in_channels = layer.inputs.stored.shape
        _, *out_size, out_channels = layer.grad_outputs.stored.shape
        count = 0 if layer.directions is None else len(layer.directions)
        header = [
            (*FUNCTIONS, *WAYS, *DIAGONAL_WAYS, WIDE_PROJECTION).index(function),
            TYPES.index(layer.type),
            ORDERS.index(order),
            seed,
        ]
        header += [samples, in_channels, out_channels, *in_size, *out_size]
        for signal in (layer.inputs, layer.grad_outputs):
            header += [signal.displacement, *signal.strides]
        header += [*layer.kernel, *layer.stride, *layer.padding, *layer.dilation, layer.groups]
        header += [count, multiprocessors]
        compute = "float64" if layer.type == "float64" else "float32"
        arrays = [layer.inputs.stored, layer.grad_outputs.stored]
        is_projection = function in ("projection", "tile_projection", "contraction", WIDE_PROJECTION)
        if is_projection:
            arrays.append(layer.directions.astype(compute))
        is_diagonal = function in ("diagonal", *DIAGONAL_WAYS)
        shape = (samples, count) if is_projection else layer.weight_shape if is_diagonal else (samples,)
        return self.call(function, header, arrays, [(shape, compute)])
