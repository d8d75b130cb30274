"""What was inherited, tensor by tensor, for a person and for a program."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transferops.adapt.masks import Masks

_LISTED = 8  # unused upstream tensors named in the table


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor of the target.

    Attributes:
        name: In the target's state dict.
        source: The upstream tensor it takes after, or None.
        shape: Here.
        source_shape: Upstream, or None.
        copied: Elements inherited.
        total: Elements in all; those not inherited keep the values they had.
        note: Why not more could be inherited, or what was done on the way; empty if there is nothing to say.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None
    copied: int
    total: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class InheritanceReport:
    """What :func:`transferops.adapt.inherit` did.

    Attributes:
        alpha, granularity, select, seed: As given.
        tensors: One entry per tensor of the target's state dict, in its order.
        masks: Which elements were inherited, by name: bool, on the CPU, of the tensor's shape. A plain dictionary:
            ``torch.save`` and ``torch.load(weights_only=True)`` keep it, :func:`freeze` takes it.
        unused: Upstream tensors that nothing was inherited from.
        note: How channels were tied, if not by the model's graph.
    """

    alpha: float
    granularity: str
    select: str
    seed: int
    tensors: tuple[TensorReport, ...]
    masks: Masks = field(repr=False)
    unused: tuple[str, ...]
    note: str = ""

    @property
    def copied(self) -> int:
        """Elements inherited."""
        return sum(tensor.copied for tensor in self.tensors)

    @property
    def total(self) -> int:
        """Elements of the target's state dict."""
        return sum(tensor.total for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, for JSON."""
        plain = {key: value for key, value in vars(self).items() if key not in ("tensors", "masks")}
        plain["unused"] = list(self.unused)
        tensors = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(t).items()} for t in self.tensors]
        return {**plain, "copied": self.copied, "total": self.total, "tensors": tensors}

    def __str__(self) -> str:
        """A table with a line per tensor, then what was not used."""
        rows = [("tensor", "inherited", "shape", "from", "note")]
        for t in self.tensors:
            there = "" if t.source_shape in (None, t.shape) else f" <- {_shape(t.source_shape)}"
            source = "-" if t.source is None else "same name" if t.source == t.name else t.source
            rows.append((t.name, f"{t.copied}/{t.total}", f"{_shape(t.shape)}{there}", source, t.note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        percent = 100 * self.copied / max(self.total, 1)
        lines.append(f"inherited {self.copied} of {self.total} elements ({percent:.1f} %)")
        if self.unused:
            more = f" and {len(self.unused) - _LISTED} more" if len(self.unused) > _LISTED else ""
            lines.append(f"not used upstream: {', '.join(self.unused[:_LISTED])}{more}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "1"
