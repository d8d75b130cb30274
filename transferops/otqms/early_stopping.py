"""Which epoch to keep, and when to stop waiting for a better one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from transferops.otqms.training import Evaluation


class EarlyStopping:
    """Remembers the model of the epoch with the highest validation accuracy, of several the latest.

    A few validation samples make many ties, and longer training is the better bet among them: on the embedded
    digits the latest of the tied epochs tests better than the one of lowest validation loss (with target
    samples only by two points). Without validation every epoch is as good as any, so the last is kept and
    nothing stops early.

    Args:
        patience: Stop after so many epochs without one as good as the best.
        epoch: The epoch before the first.

    Attributes:
        epoch: The kept epoch; as given before the first.
    """

    def __init__(self, patience: int, epoch: int = 0) -> None:
        self.patience = patience
        self.epoch = epoch
        self._first = epoch
        self._accuracy = 0.0
        self._state: dict[str, Any] = {}

    def update(self, epoch: int, evaluation: Evaluation | None, model: nn.Module) -> None:
        """Take note of an epoch.

        Args:
            epoch: Its number.
            evaluation: Of ``model`` on the validation samples; ``None`` without any.
            model: As it is after the epoch.
        """
        accuracy = 0.0 if evaluation is None else evaluation.accuracy
        if accuracy >= self._accuracy:
            self.epoch, self._accuracy = epoch, accuracy
            self._state = copy.deepcopy(model.state_dict())

    def over(self, epoch: int) -> bool:
        """Whether ``patience`` epochs have passed since the kept one and since the first."""
        return epoch - max(self.epoch, self._first) >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Load the kept epoch into ``model``."""
        model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """For :meth:`load_state_dict`."""
        return {"epoch": self.epoch, "first": self._first, "accuracy": self._accuracy, "state": dict(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.epoch, self._first = state["epoch"], state["first"]
        self._accuracy, self._state = state["accuracy"], state["state"]
