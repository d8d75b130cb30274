"""Samples of a least-squares problem as rows: checked, joined, sampled; and its other arguments, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transferops._validate import as_tensor, describe, fail

BLOCK = 4096  # rows converted to float64 at a time
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rows:
    """Samples as they came.

    Attributes:
        features: [N, p] floating point, any precision.
        targets: [N, c] floating point, or [N] int64 labels, which stand for one-hot targets less 1/c.
        weights: [N] float64, or None where every weight is 1.
        keys: [N] float64, one random number per row; the rows with the smallest are a uniform sample of all.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor | None
    keys: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @property
    def labelled(self) -> bool:
        """Whether the targets are labels."""
        return self.targets.dim() == 1

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index``, copied."""
        weights = None if self.weights is None else self.weights[index]
        return Rows(self.features[index], self.targets[index], weights, self.keys[index])

    def clone(self) -> Rows:
        """A copy of the rows."""
        weights = None if self.weights is None else self.weights.clone()
        return Rows(self.features.clone(), self.targets.clone(), weights, self.keys)

    def blocks(self, size: int = BLOCK) -> Iterator[Rows]:
        """The rows in order, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            cut = slice(start, start + size)
            weights = None if self.weights is None else self.weights[cut]
            yield Rows(self.features[cut], self.targets[cut], weights, self.keys[cut])

    def weight(self) -> Tensor:
        """The weights [N] float64."""
        return torch.ones_like(self.keys) if self.weights is None else self.weights

    def dense_targets(self, outputs: int) -> Tensor:
        """The targets [N, c] float64."""
        if self.labelled:
            return torch.nn.functional.one_hot(self.targets, outputs).double() - 1 / outputs
        return self.targets.double()

    def smallest(self, count: int) -> Rows:
        """The rows of the ``count`` smallest keys, copied; all of them in order if there are no more."""
        return self.clone() if count >= len(self) else self.take(self.keys.topk(count, largest=False).indices)

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """All rows in order; features in the widest of their dtypes."""
        if len(parts) == 1:
            return parts[0]
        weighted = any(part.weights is not None for part in parts)
        return Rows(
            _promoted([part.features for part in parts]),
            _promoted([part.targets for part in parts]),
            torch.cat([part.weight() for part in parts]) if weighted else None,
            torch.cat([part.keys for part in parts]),
        )


class Format(NamedTuple):
    """What rows have to look like, as far as it is known."""

    features: int | None
    outputs: int | None
    labelled: bool | None
    device: torch.device | None


def parse_rows(features: Any, targets: Any, weights: Any | None, known: Format, generator: torch.Generator) -> Rows:
    """Checked rows, not copied; features are not searched for NaN unless there are weights.

    Args:
        features, targets, weights: as for :meth:`transferops.adapt.HeadSolver.update`.
        known: what they have to agree with.
        generator: of the keys.
    """
    features = check_matrix("features", features, "[N, p]")
    targets = as_tensor("targets", targets).detach()
    labelled = not targets.is_floating_point()
    if labelled and (targets.is_complex() or targets.dtype == torch.bool):
        fail("targets", "floating point [N, c] or integer labels [N]", describe(targets), TypeError)
    if targets.dim() != (1 if labelled else 2) or len(targets) != len(features):
        shape = f"labels [{len(features)}]" if labelled else f"shape [{len(features)}, c]"
        fail("targets", f"{shape}, one for each row of features", describe(targets))
    if targets.device != features.device:
        fail("targets", f"the device of features, {features.device}", str(targets.device))
    outputs = known.outputs
    if labelled:
        if outputs is None:
            fail("classes", "a number of classes, or a prior, where targets are labels", "None")
        targets = targets.long()
        bad = ((targets < 0) | (targets >= outputs)).nonzero()
        if len(bad):
            position = int(bad[0])
            fail("targets", f"{outputs} classes 0..{outputs - 1}", f"{int(targets[position])} at row {position}")
    else:
        if targets.dtype not in _FLOATING or targets.shape[1] == 0:
            fail("targets", "at least one output of float16, bfloat16, float32 or float64", describe(targets))
        if outputs is not None and targets.shape[1] != outputs:
            fail("targets", f"{outputs} outputs", f"{targets.shape[1]}")
        check_finite("targets", targets)
    dimension, device = known.features, known.device
    if dimension is not None and features.shape[1] != dimension:
        fail("features", f"{dimension} features", f"{features.shape[1]}")
    if device is not None and features.device != device:
        fail("features", f"the device of prior and earlier samples, {device}", str(features.device))
    if known.labelled is not None and labelled != known.labelled:
        kinds = ("numbers [N, c]", "labels [N]")
        fail("targets", f"{kinds[known.labelled]} as before", kinds[labelled])
    if weights is not None:
        weights = as_tensor("weights", weights).detach().double()
        if list(weights.shape) != [len(features)] or weights.device != features.device:
            fail("weights", f"shape [{len(features)}] on {features.device}", describe(weights))
        check_finite("weights", weights)
        check_finite("features", features)
        if bool((weights < 0).any()):
            position = int(weights.argmin())
            fail("weights", "numbers of at least 0", f"{float(weights[position])} at row {position}")
    keys = torch.rand(len(features), generator=generator, dtype=torch.float64).to(features.device)
    return Rows(features, targets, weights, keys)


def check_matrix(argument: str, value: Any, shape: str) -> Tensor:
    """``value`` as a floating point matrix with at least one column."""
    tensor = as_tensor(argument, value).detach()
    if tensor.dtype not in _FLOATING:
        fail(argument, "float32, float64, float16 or bfloat16", describe(tensor), TypeError)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        fail(argument, f"shape {shape} with at least one column", describe(tensor))
    return tensor


def check_finite(argument: str, values: Tensor) -> None:
    """Raise if an entry is NaN or infinite, naming its position."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        position = bad[0].tolist()
        fail(argument, "finite values", f"{values[tuple(position)].item()} at position {position}")


def _promoted(parts: list[Tensor]) -> Tensor:
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts])


def parse_prior(weight: Any | None, bias: Any | None) -> tuple[Tensor | None, Tensor | None]:
    """The checked prior in float64."""
    if weight is None:
        if bias is not None:
            fail("prior_bias", "None without prior_weight", describe(bias))
        return None, None
    weight = check_matrix("prior_weight", weight, "[c, p]").double()
    check_finite("prior_weight", weight)
    if bias is not None:
        bias = as_tensor("prior_bias", bias).detach().double()
        if list(bias.shape) != [len(weight)] or bias.device != weight.device:
            fail("prior_bias", f"shape [{len(weight)}] on {weight.device}", describe(bias))
        check_finite("prior_bias", bias)
    return weight, bias


def parse_penalties(values: Sequence[float] | Tensor) -> Tensor:
    """Checked penalties [L] float64, ascending, on the CPU."""
    lams = torch.as_tensor(values, dtype=torch.float64).cpu()
    if lams.dim() != 1 or len(lams) == 0:
        fail("lams", "at least one penalty", describe(lams))
    bad = (lams.isnan() | (lams < 0)).nonzero()
    if len(bad):
        fail("lam", "numbers of at least 0", f"{float(lams[bad[0, 0]])}")
    return lams.sort().values
