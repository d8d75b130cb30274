"""The softmax kernels in the emulation, the Python side of softmax_fisher_harness.cpp, and their reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from emulator import HERE, KERNELS, ORDERS, TYPES, Emulator, decode, encode

KERNEL = KERNELS / "softmax_fisher.cu"
SOURCES = (KERNEL, HERE / "softmax_fisher_harness.cpp")


@dataclass(frozen=True)
class Batch:
    logits: np.ndarray  # stored, [samples, classes]
    tangents: np.ndarray  # stored, [directions, samples, classes]
    type: str = "float32"
    row_padding: int = 0
    direction_padding: int = 0
    displacement: int = 0

    @classmethod
    def of(cls, logits: np.ndarray, tangents: np.ndarray, type: str = "float32", **layout: int) -> Batch:
        return cls(encode(logits, type), encode(tangents, type), type, **layout)


class SoftmaxEmulator(Emulator):
    def run(
        self, batch: Batch, *, multiprocessors: int = 4, order: str = "forward", seed: int = 0
    ) -> tuple[np.ndarray]:
        """The Gram matrix; raises EmulationError where the process dies."""
        directions, samples, classes = batch.tangents.shape
        row = classes + batch.row_padding
        header = [TYPES.index(batch.type), ORDERS.index(order), seed, directions, samples, classes]
        header += [row, samples * row + batch.direction_padding, row, batch.displacement, multiprocessors]
        outputs = [((directions, directions), "float64")]
        return self.call("softmax_fisher_gram", header, [batch.logits, batch.tangents], outputs)


def expected(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(value, tolerance), in extended precision.

    With d the distance of a logit to the largest: rounding d and the exponential of d / 2 (to 2 units in the last
    place, 4 u) leave a relative error of 8 u + |d| u in a probability; so does their sum, which a thread rescales at
    most once for each logit it sees and then in 6 steps (a lane takes at most a 32nd of the classes). All else is
    double: sums of at most C N terms, and means that are off by delta, first order only where chunks of classes meet.
    """
    z, t = decode(batch.logits, batch.type).astype(np.longdouble), decode(batch.tangents, batch.type)
    t = t.astype(np.longdouble)
    directions, samples, classes = t.shape
    if z.size == 0:
        return [(np.zeros((directions, directions)), np.zeros((directions, directions)))]
    distance = z.max(axis=1, keepdims=True) - z
    p = np.exp(-distance)
    p /= p.sum(axis=1, keepdims=True)
    y = t - (p * t).sum(axis=2, keepdims=True)
    value, spread = (np.einsum("nc,knc,lnc->kl", p, x, x, optimize=True) for x in (y, abs(y)))
    double = 2.0**-53
    u = double if batch.type == "float64" else 2.0**-24
    error = (8 + distance + distance.max(axis=1, keepdims=True) + 4 * (-(-classes // 32) + 6)) * u
    tolerance = np.einsum("nc,knc,lnc->kl", p * error, abs(y), abs(y), optimize=True)
    tolerance += (classes * samples + 20) * double * spread
    delta = (classes + 4) * double * abs(t).max(axis=2)
    deviation = np.sqrt((p * y**2).sum(axis=2))
    tolerance += delta @ deviation.T + deviation @ delta.T + delta @ delta.T
    return [(value, 1.01 * tolerance)]
