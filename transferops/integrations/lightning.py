"""Lightning callbacks: transferability scores while a model trains, and OTQMS sampling of its training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Sampler

from transferops._validate import check_positive, check_positive_int, describe, fail
from transferops.fisher import FisherInformation
from transferops.integrations._scoring import DEFAULT_LAYER, DEFAULT_SCORES, ModelScores
from transferops.otqms import Allocation, allocate
from transferops.otqms.pool import Pool
from transferops.otqms.sampling import Deck
from transferops.scores.features import FeatureScore

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("transferops.integrations.lightning needs Lightning: pip install lightning") from error

__all__ = ["OtqmsSampling", "ScoreCallback"]


class ScoreCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Logs transferability scores of labelled data after every training epoch.

    The module is called with the inputs of each batch, in evaluation mode and without gradients. With several
    processes each reads all batches.

    Args:
        batches: labelled batches, such as a validation loader: (inputs, labels), or mappings with "labels".
        scores: names from :data:`transferops.scores.SCORES` that take features, or named scores with options.
        layer: name of the submodule whose output is scored; by default the input of the last layer.
        head: name of that last layer, if it is not the last linear or convolutional layer to run.
        prefix: of the logged names: "transfer/h_score".
        every: epochs from one measurement to the next.

    Raises:
        ValueError: a score is unknown, or ``every`` is not positive. During training, as
            :func:`transferops.rank.extract`.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        scores: Iterable[str] | Mapping[str, FeatureScore] = DEFAULT_SCORES,
        *,
        layer: str = DEFAULT_LAYER,
        head: str | None = None,
        prefix: str = "transfer/",
        every: int = 1,
    ) -> None:
        self._measure = ModelScores(batches, scores, layer, head, prefix, every)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if self._measure.due(trainer.current_epoch):
            pl_module.log_dict(self._measure(pl_module))


class OtqmsSampling(Callback):  # type: ignore[misc, unused-ignore]
    """Trains every epoch on the target's samples and on as many of each source as OTQMS finds best.

    Before an epoch, the Fisher information of the module on the target and its differences to the source models give
    A = Theta^T J Theta, :func:`transferops.otqms.allocate` the quantities of least predicted risk [paper: NeurIPS 2025,
    arXiv 2502.04242], and those are drawn, classes in proportion. Pass the callback to the trainer and its ``dataset``
    and ``sampler`` to the loader:

        >>> otqms = OtqmsSampling(target, {"photo": photo, "sketch": sketch}, {"photo": model_1, "sketch": model_2})
        >>> loader = DataLoader(otqms.dataset, batch_size=64, sampler=otqms.sampler)
        >>> Trainer(callbacks=[otqms]).fit(module, loader)

    The module maps a batch of inputs to logits. Logs "otqms/<source>", the quantities, and "otqms/risk". One process
    only: :class:`transferops.otqms.OTQMS` is the trainer for several.

    Args:
        target: map-style data set of (input, label).
        sources: data sets of the same kind by name.
        source_models: by the same names; trained on the sources, with the parameter names of the module.
        dimension: d of the risk; the number of trained parameters if None.
        estimator: of the Fisher information, see :class:`transferops.fisher.FisherInformation`.
        batch_size: for the Fisher information.
        seed: of the draws.

    Attributes:
        dataset: the target and the sources, one after the other.
        sampler: positions in ``dataset``, in random order; drawn anew before every epoch.
        allocation: of the current epoch, :class:`transferops.otqms.Allocation`; None before the first.

    Raises:
        ValueError: names of sources and models differ, a data set is empty, or an option is out of range.
        TypeError: a data set is not map-style.
    """

    def __init__(
        self,
        target: Dataset[Any],
        sources: Mapping[str, Dataset[Any]],
        source_models: Mapping[str, nn.Module],
        *,
        dimension: float | None = None,
        estimator: str = "exact",
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        if not sources or set(sources) != set(source_models):
            fail("source_models", f"a model for each source ({', '.join(sources)})", ", ".join(source_models) or "none")
        parts = {"target": target, **{f"sources[{name!r}]": source for name, source in sources.items()}}
        for argument, part in parts.items():
            if not hasattr(part, "__getitem__"):
                fail(argument, "a map-style data set of (input, label)", describe(part), TypeError)
        self._pool = Pool(parts, torch.device("cpu"))
        self._names = tuple(sources)
        self._models = [source_models[name] for name in sources]
        self._dimension = None if dimension is None else check_positive("dimension", dimension)
        self._estimator = estimator
        self._batch_size = check_positive_int("batch_size", batch_size)
        self._decks = [Deck(self._pool.part_labels(part)) for part in range(1, len(parts))]
        self._generator = torch.Generator().manual_seed(seed)
        self.dataset: Dataset[Any] = ConcatDataset([target, *sources.values()])
        self.sampler = DrawnSampler(self._pool.positions(0))
        self.allocation: Allocation | None = None
        self._ready = False  # whether the next epoch's samples are drawn already

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw for the first epoch, whose loader Lightning starts before the epoch does.

        Raises:
            ValueError: several processes train.
        """
        if trainer.world_size != 1:
            fail("trainer", "one process", f"{trainer.world_size}")
        self._draw(pl_module)
        self._ready = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and log what was decided."""
        if not self._ready:
            self._draw(pl_module)
        self._ready = False
        assert self.allocation is not None
        quantities = self.allocation.rounded().tolist()
        facts = {f"otqms/{name}": float(n) for name, n in zip(self._names, quantities, strict=True)}
        pl_module.log_dict({**facts, "otqms/risk": self.allocation.risk})

    def _draw(self, model: nn.Module) -> None:
        sizes, target = self._pool.sizes, self._pool.positions(0)
        batches = self._pool.batches(target, self._batch_size)
        gram = FisherInformation(model, self._estimator).gram(self._models, batches)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.allocation = allocate(gram, sizes[0], sizes[1:], self._dimension or trained)
        drawn = [target]
        for part, quantity in enumerate(self.allocation.rounded().tolist(), 1):
            drawn.append(self._pool.positions(part)[self._decks[part - 1].deal(quantity, self._generator)])
        positions = torch.cat(drawn)
        self.sampler.positions = positions[torch.randperm(len(positions), generator=self._generator)]

    def state_dict(self) -> dict[str, Any]:
        """What the draws of later epochs depend on; Lightning puts it into its checkpoints."""
        return {"generator": self._generator.get_state(), "decks": [deck.state_dict() for deck in self._decks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._generator.set_state(state_dict["generator"])
        for deck, content in zip(self._decks, state_dict["decks"], strict=True):
            deck.load_state_dict(content)


class DrawnSampler(Sampler[int]):
    """The positions that were drawn for this epoch.

    It has no length: Lightning would take that of the first epoch for all.

    Args:
        positions: int64 [M], the first to be gone through; assign others before an epoch.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions.tolist())
