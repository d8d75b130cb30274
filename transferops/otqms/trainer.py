"""The OTQMS trainer: before every epoch choose samples of each source, then train on them and the target.

Algorithm [paper] (NeurIPS 2025, arXiv 2502.04242): train one model per source; then, every epoch, take the
current parameters as theta_0, compute A = Theta^T J Theta with the Fisher information J of the target and the
columns theta_i - theta_0 of Theta, choose the quantities of least risk, draw that many random samples of each
source, and train one epoch on them and the target.

Ours and not the paper's:

* All models start from one random initialisation where the paper has one pretrained network. They need a
  common start: a difference between parameters means something only between models in the same basin.
  (Training all of them on the pooled sources first was tried; the sources were then harder to tell apart.)
* Every source model gets the same number of optimiser steps, so that the distances reflect the data.
* The epoch to keep is chosen on a *validation* part of the target. The paper's released code errs here: it
  chooses on the test set, which makes its accuracies optimistic. This trainer is never given the test part.
* An epoch has at least ``min_steps`` optimiser steps. One pass over a few target samples is a handful of
  steps, and patience, counted in epochs, would stop a strategy that takes little before it is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from time import perf_counter

import torch
from torch import nn

from transferops._validate import check_positive_int, fail
from transferops.fisher import FisherInformation, parameter_differences
from transferops.otqms.early_stopping import EarlyStopping
from transferops.otqms.options import TrainingOptions, resolve_dimension
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.strategies import STRATEGIES, Situation, check_strategies
from transferops.otqms.training import Samples, TensorSamples, draw, evaluate, train_epoch


class OTQMS:
    """Trains models for a target with samples of several sources, by any strategy, for one seed.

    Everything random (initialisation, order, draws, dropout) comes from ``seed``: on the CPU the same calls
    give the same result. The strategies share the initialisation and the source models.

    Args:
        model: Makes the network, a module from inputs to logits. Called once, under ``seed``.
        target: Target samples to train on.
        sources: Samples of each source, by name.
        validation: Target samples that choose the epoch to keep, see
            :class:`transferops.otqms.early_stopping.EarlyStopping`. ``None``: the last is kept.
        options: How to train.
        seed: At least 0.

    Attributes:
        dimension: The d of the risk formulas.
        device: Where it trains.

    Raises:
        ValueError: If a set of samples is empty, a label has no logit, or the model has nothing to train.

    Example:
        >>> from transferops.data import few_shot_split, load_digits_domains
        >>> from transferops.otqms import OTQMS, network_for
        >>> target, sources = load_digits_domains().choose("rotated-30")
        >>> split = few_shot_split(target, shots=10)
        >>> trainer = OTQMS(
        ...     lambda: network_for((1, 8, 8), 10),
        ...     split.train,
        ...     {source.name: source for source in sources},
        ...     validation=split.validation,
        ... )
        >>> run = trainer.fit("quantities")
        >>> run.kept.quantities  # samples of each source in the epoch that was kept
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        target: Samples,
        sources: Mapping[str, Samples],
        *,
        validation: Samples | None = None,
        options: TrainingOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.options = options or TrainingOptions()
        self.seed = check_positive_int("seed", seed, minimum=0)
        if not sources:
            fail("sources", "at least one source", "none")
        self.device = torch.device(self.options.device)
        with self._seeded():
            self._initial = model().to(self.device)
        parameters = sum(p.numel() for p in self._initial.parameters() if p.requires_grad)
        if parameters == 0:
            fail("model", "parameters that require a gradient", "none")
        with torch.no_grad():
            logits = self._initial.eval()(target.inputs[:1].to(self.device))
        self._classes = int(logits.shape[1])
        self._target = self._take("target", target)
        self._sources = {name: self._take(f"sources[{name!r}]", samples) for name, samples in sources.items()}
        self._validation = None if validation is None else self._take("validation", validation)
        self.dimension = resolve_dimension(self.options.dimension, parameters, len(self._target), self._classes)

    def fit(self, strategy: str, on_epoch: Callable[[EpochRecord], None] | None = None) -> TrainingRun:
        """Train from the common initialisation with one strategy.

        Args:
            strategy: A name in :data:`transferops.otqms.STRATEGIES`.
            on_epoch: Called with the record of every epoch as soon as it is over.

        Returns:
            The kept model and the records.

        Raises:
            ValueError: If the strategy is unknown.
            RuntimeError: If the training diverges.
        """
        check_strategies([strategy])
        source_model_seconds = self._sources_trained[1] if STRATEGIES[strategy].uses_source_models else 0.0
        model = copy.deepcopy(self._initial)
        stopping = EarlyStopping(self.options.patience)
        records = []
        with self._seeded() as generator:
            optimizer = self._optimizer(model)
            for epoch in range(1, self.options.epochs + 1):
                record = self._epoch(epoch, strategy, model, optimizer, stopping, generator)
                records.append(record)
                if on_epoch is not None:
                    on_epoch(record)
                if stopping.over(epoch):
                    break
        stopping.restore(model)
        return TrainingRun(strategy, tuple(records), stopping.epoch, source_model_seconds, model.eval())

    def source_models(self) -> list[nn.Module]:
        """One trained model per source, in evaluation mode; trained once, when first needed."""
        return self._sources_trained[0]

    def gram(self, model: nn.Module) -> torch.Tensor:
        """A = Theta^T J Theta at ``model``, float64 ``[K, K]``.

        J is the exact Fisher information on the target's training samples: the empirical one vanishes with
        the training loss, and with it every reason not to take everything.
        """
        directions = parameter_differences(self.source_models(), model)
        return FisherInformation(model, estimator="exact").gram(directions, self._target.batches())

    def _epoch(
        self,
        epoch: int,
        strategy: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stopping: EarlyStopping,
        generator: torch.Generator,
    ) -> EpochRecord:
        start = perf_counter()
        available = tuple(len(samples) for samples in self._sources.values())
        decision = STRATEGIES[strategy].decide(
            Situation(epoch, len(self._target), available, self.dimension, gram=lambda: self.gram(model))
        )
        decided = perf_counter()
        drawn = [
            samples.subset(draw(samples.labels, quantity, generator))
            for samples, quantity in zip(self._sources.values(), decision.quantities, strict=True)
        ]
        union = TensorSamples.union([self._target, *drawn])
        options = self.options
        train_loss = train_epoch(model, optimizer, union, options.batch_size, options.min_steps, generator)
        validation = None if self._validation is None else evaluate(model, self._validation)
        stopping.update(epoch, validation, model)
        return EpochRecord(
            epoch=epoch,
            quantities=dict(zip(self._sources, decision.quantities, strict=True)),
            samples=len(union),
            train_loss=train_loss,
            validation_loss=None if validation is None else validation.loss,
            validation_accuracy=None if validation is None else validation.accuracy,
            predicted_risk=decision.predicted_risk,
            seconds=perf_counter() - start,
            allocation_seconds=decided - start,
        )

    @cached_property
    def _sources_trained(self) -> tuple[list[nn.Module], float]:
        """The source models and the seconds that their training took."""
        start = perf_counter()
        options = self.options
        models = []
        with self._seeded() as generator:
            for samples in self._sources.values():
                model = copy.deepcopy(self._initial)
                optimizer = self._optimizer(model)
                train_epoch(model, optimizer, samples, options.batch_size, options.source_steps, generator)
                models.append(model.eval())
        return models, perf_counter() - start

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self.options.optimizer(trained, lr=self.options.lr)

    def _take(self, name: str, samples: Samples) -> TensorSamples:
        """``samples`` on the device, checked."""
        if len(samples.labels) == 0:
            fail(name, "at least one sample", "none")
        lowest, highest = int(samples.labels.min()), int(samples.labels.max())
        if lowest < 0 or highest >= self._classes:
            expected = f"labels from 0 to {self._classes - 1}, one per logit of the model"
            fail(name, expected, f"labels from {lowest} to {highest}")
        return TensorSamples.on(self.device, samples)

    @contextmanager
    def _seeded(self) -> Iterator[torch.Generator]:
        """Seed everything random inside, give the caller's random state back after."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            yield torch.Generator().manual_seed(self.seed)
