"""Which samples of a part come next: stratified, and none twice before all have come."""

from __future__ import annotations

from typing import Any

import torch


def draw(labels: torch.Tensor, quantity: int, generator: torch.Generator) -> torch.Tensor:
    """Choose samples at random, without replacement, in the proportions of the classes.

    The sample that comes r-th (from 0) in a random order of its class of m gets the key (r + u) / m, u
    uniform in [0, 1), and the smallest keys are taken: every class is represented by its share of
    ``quantity`` up to a rounding that is itself random. The positions come in the order of the keys, so
    that the classes are as even in any stretch of them.

    Args:
        labels: int64 ``[N]``, on the CPU.
        quantity: How many, from 0 to N.
        generator: On the CPU.

    Returns:
        Positions, int64 ``[quantity]``.
    """
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    keys = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    for label in torch.unique(shuffled):
        members = shuffled == label
        count = int(members.sum())
        keys[members] = (keys[members] + torch.arange(count)) / count
    return order[keys.argsort()[:quantity]]


class Deck:
    """The samples of one part in a stratified random order, dealt from the top and shuffled when used up.

    Over the epochs every sample comes as often as any other, give or take one, whatever the quantities.

    Args:
        labels: int64 ``[N]``, on the CPU.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        self._labels = labels
        self._order = torch.zeros(0, dtype=torch.int64)

    def deal(self, quantity: int, generator: torch.Generator) -> torch.Tensor:
        """The next ``quantity`` positions; more than there are samples come in several rounds.

        Within one call no sample comes twice unless ``quantity`` is more than N.
        """
        dealt = [torch.zeros(0, dtype=torch.int64)]
        while quantity > 0:
            if len(self._order) == 0:
                self._order = draw(self._labels, len(self._labels), generator)
            hand, self._order = self._order[:quantity], self._order[quantity:]
            dealt.append(hand)
            quantity -= len(hand)
            if 0 < quantity < len(self._labels) and len(hand) < len(self._labels):
                self._order = _last(draw(self._labels, len(self._labels), generator), hand, len(self._labels))
        return torch.cat(dealt)

    def state_dict(self) -> dict[str, Any]:
        """What is left, for :meth:`load_state_dict`."""
        return {"order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._order = state["order"]


def _last(order: torch.Tensor, late: torch.Tensor, samples: int) -> torch.Tensor:
    """``order`` with the positions in ``late`` moved to its end."""
    moved = torch.zeros(samples, dtype=torch.bool)
    moved[late] = True
    return torch.cat([order[~moved[order]], order[moved[order]]])
