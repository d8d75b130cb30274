"""The standard trainer of a transfer check: an upstream domain, a few labelled samples of a target domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from transferops.adapt.inheritance import inherit
from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.pool import Pool, Samples
from transferops.otqms.study import Split
from transferops.otqms.training import evaluate

_UPSTREAM_SEEDS = 2**20  # the upstream model must not share the initialisation of the one that starts afresh


class FewShotTransfer:
    """From alpha and a seed to a test accuracy, as :func:`transferops.adapt.transfer_check` wants it.

    A model inherits the share alpha of an upstream model and is then trained on the few labelled target samples
    only, the validation part included without early stopping; the test part gives the accuracy. The seed fixes the
    split, the initialisation, the inherited part and the order of samples, for all shares alike.

    Args:
        model: Makes the network.
        upstream: What to inherit: samples to train an upstream model on, from an initialisation of its own for
            every seed; or a state dict, the same for every seed.
        split: Cuts the target, given a seed.
        granularity: Of the inheritance.
        select: Of the inheritance; "fisher" is with respect to the upstream samples and needs those.
        options: How to train, upstream (``source_steps``) and downstream.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        upstream: Samples | Mapping[str, torch.Tensor],
        split: Callable[[int], Split],
        *,
        granularity: str = "filter",
        select: str = "random",
        options: TrainingOptions | None = None,
    ) -> None:
        self._model = model
        self._upstream = upstream
        self._split = split
        self._granularity = granularity
        self._select = select
        self._options = options or TrainingOptions()
        self._trained: tuple[int, nn.Module] | None = None

    def __call__(self, alpha: float, seed: int) -> float:
        """Train once; the accuracy on the test part, in [0, 1]."""
        parts = self._split(seed)
        upstream, batches = self._upstream_model(seed)

        def started() -> nn.Module:
            model = self._model()
            inherit(model, upstream, alpha, self._granularity, self._select, seed, batches=batches)
            return model

        trainer = OTQMS(
            started,
            parts.train,
            {"unused": parts.train},
            validation=parts.validation,
            options=self._options,
            seed=seed,
        )
        run = trainer.fit("target-only")
        return evaluate(run.model, Pool({"test": parts.test}, trainer.device)).accuracy

    def _upstream_model(
        self, seed: int
    ) -> tuple[nn.Module | Mapping[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]] | None]:
        if isinstance(self._upstream, Mapping):
            return self._upstream, None
        samples = self._upstream
        if self._trained is None or self._trained[0] != seed:
            trainer = OTQMS(
                self._model,
                samples,
                {"upstream": samples},
                options=self._options,
                seed=_UPSTREAM_SEEDS + seed,
            )
            self._trained = (seed, trainer.source_models()[0])
        device = torch.device(self._options.device)
        parts = (torch.split(part.to(device), 256) for part in (samples.inputs, samples.labels))
        batches = list(zip(*parts, strict=True))
        return self._trained[1], batches
