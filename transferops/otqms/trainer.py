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
* The last epoch is kept, and all labelled samples are trained on; with early stopping, the epoch is chosen on a
  *validation* part of the target, or by cross-validation. The paper's released code errs here: it chooses on the test
  set, which makes its accuracies optimistic. This trainer is never given the test part.
* An epoch has at least ``min_steps`` optimiser steps. One pass over a few target samples is a handful of
  steps, and patience, counted in epochs, would stop a strategy that takes little before it is trained.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.directions import select
from transferops.otqms.akaike import explain_shares
from transferops.otqms.cross_validation import CrossValidation
from transferops.otqms.discrepancy import State
from transferops.otqms.fitting import fit
from transferops.otqms.guard import caution, judge_sources
from transferops.otqms.options import TrainingOptions
from transferops.otqms.pool import Pool, Source, check_labels
from transferops.otqms.preparation import Preparation
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.report import Report, SourceValue, leave_one_out, rule_of
from transferops.otqms.strategies import STRATEGIES, check_strategies
from transferops.otqms.surroundings import Surroundings


class OTQMS:
    """Trains models for a target with samples of several sources, by any strategy, for one seed.

    Everything random (initialisation, order, draws, dropout) comes from ``seed``: on the CPU the same calls
    give the same result. The strategies share the initialisation and the source models.

    Started by torchrun, with a default process group, the processes share every batch, the target's samples
    for the Fisher information, and the source models between them. With the same ``batch_size`` the result is
    that of one process up to rounding; dropout and batch statistics aside, which each process has its own of.

    Args:
        model: Makes the network, a module from inputs to logits. Called once, under ``seed``. A compiled one is
            trained compiled.
        target: Target samples to train on: tensors, or a data set of pairs (:data:`transferops.otqms.pool.Source`).
        sources: Samples of each source, by name.
        validation: Target samples that choose the epoch to keep under early stopping, see
            :class:`transferops.otqms.early_stopping.EarlyStopping`; without it they are trained on like ``target``.
        watched: Target samples on which loss and accuracy are noted after every epoch, for the comparison of predicted
            and realised risk, and for nothing else: what is trained and kept is the same without.
        options: How to train.
        seed: At least 0.
        source_models: A model, or its state dictionary, for every source, by name: instead of training them.
        checkpoint: A folder. What is in it is gone on from; what is trained is written into it.

    Attributes:
        dimension: The d of the risk formulas.
        device: Where it trains.
        samples: The target, part 0, and the sources; the validation samples are the target's without early stopping.

    Raises:
        ValueError: If a set of samples is empty, a label has no logit, the model has nothing to train, or there are
            no validation samples for early stopping, or a single one of a class where folds are asked for.

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
        target: Source,
        sources: Mapping[str, Source],
        *,
        validation: Source | None = None,
        watched: Source | None = None,
        options: TrainingOptions | None = None,
        seed: int = 0,
        source_models: Mapping[str, nn.Module | State] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self.options = options or TrainingOptions()
        self.seed = check_positive_int("seed", seed, minimum=0)
        if not sources:
            fail("sources", "at least one source", "none")
        if isinstance(model, nn.Module) or not callable(model):
            fail("model", "a function that makes the network", describe(model), TypeError)
        self.device = torch.device(self.options.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            made = model()
        wrapped = getattr(made, "_orig_mod", None)  # where torch.compile keeps the module
        if isinstance(wrapped, nn.Module):
            self.options, made = dataclasses.replace(self.options, compile=True), wrapped
        initial = made.to(self.device)
        if not any(parameter.requires_grad for parameter in initial.parameters()):
            fail("model", "parameters that require a gradient", "none")
        names = ["target", *(() if validation is None else ("validation",)), *(f"sources[{n!r}]" for n in sources)]
        given = [target, *(() if validation is None else (validation,)), *sources.values()]
        pool = Pool(dict(zip(names, given, strict=True)), self.device, self.options.workers)
        early = self.options.early_stopping is True
        if early and validation is None:
            fail("validation", "target samples to choose the epoch on, for early stopping", "none")
        initial, pool, classes = _laid_out(initial, pool, self.options.channels_last)
        check_labels(pool, names, classes)
        first = len(names) - len(sources)
        source_parts = {name: [first + i] for i, name in enumerate(sources)}
        labelled = pool.view({"target": list(range(first)), **source_parts})
        self.samples = pool.view({"target": [0], **source_parts}) if early else labelled
        held_out = pool.view({"validation": [1]}) if early else None
        chosen = select(initial, self.options.selection(initial))
        parameters = sum(value.numel() for value in chosen.values())
        folder = None if checkpoint is None else Path(checkpoint) / f"seed-{self.seed}"
        seen = None if watched is None else Pool({"watched": watched}, self.device, self.options.workers)
        if seen is not None:
            check_labels(seen, ["watched"], classes)
        around = Surroundings(self.options, self.samples, held_out, initial, self.seed, folder, seen)
        together = dataclasses.replace(around, samples=labelled, validation=None) if early else around
        supplied = None if source_models is None else _states(source_models, sources)
        self._prepared = Preparation(around, together, parameters, classes, supplied)
        self.dimension = self._prepared.dimension
        crossed = self.options.guard or self.options.early_stopping == "folds"
        self._cross_validation = CrossValidation(self._prepared, self.options.folds) if crossed else None
        self._given, self._given_target, self._given_validation = dict(sources), target, validation

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return self.samples.names[1:]

    def fit(self, strategy: str, on_epoch: Callable[[EpochRecord], None] | None = None) -> TrainingRun:
        """Train from the common initialisation with one strategy.

        Args:
            strategy: A name in :data:`transferops.otqms.STRATEGIES`.
            on_epoch: Called with the record of every epoch as soon as it is over; not again for epochs that a
                checkpoint has, unless the process was killed between the two.

        Returns:
            The kept model and the records.

        Raises:
            ValueError: If the strategy is unknown, or a checkpoint is damaged or of another training.
            RuntimeError: If the training diverges.
        """
        check_strategies([strategy])
        cross, trained = self._cross_validation, strategy
        if cross is None:
            return fit(self._prepared, strategy, on_epoch=on_epoch)
        before, verdicts = cross.seconds, tuple[str, ...]()
        if self.options.guard:
            choice = cross.choice(strategy)
            trained, verdicts = choice.chosen, choice.sentences()
        run = fit(self._prepared, trained, planned=cross.planned(trained), on_epoch=on_epoch)
        return dataclasses.replace(
            run,
            strategy=strategy,
            replaced_by=None if trained == strategy else trained,
            verdicts=verdicts,
            cross_validation_seconds=cross.seconds - before,
        )

    def report(self, run: TrainingRun, *, retrain: bool = False) -> Report:
        """What a run of this trainer did and why.

        Args:
            run: From :meth:`fit`.
            retrain: Whether to repeat the training without each source in turn (K trainings, source models and
                checkpoints not shared), for what the sources are really worth.

        Raises:
            ValueError: If ``retrain`` is asked for and there are fewer than two sources, no early stopping, or a
                strategy that does not look at the validation samples.
        """
        if retrain and self.options.early_stopping is not True:
            fail("retrain", "early stopping, whose validation samples measure what a source is worth", "none")
        if retrain and len(self.source_names) < 2:
            fail("retrain", "at least two sources", "one")
        if run.gram is None and not retrain:
            return Report(run, self.source_names, (), (*run.screening, *run.verdicts))
        plan = STRATEGIES[run.replaced_by or run.strategy]
        (target, *sizes), dimension = self.samples.sizes, float(self.dimension)
        available: Sequence[int] = sizes
        survey = self._prepared.survey(plan.all_labels) if plan.surveys else None
        if survey is not None:
            target = (self._prepared.labelled if plan.all_labels else self._prepared.around).samples.sizes[0]
            available, dimension = survey.available(sizes), survey.dimension
        gram = compared = self.gram(run.model) if run.gram is None else run.gram
        rule, told = rule_of(run), list[str]()
        if survey is not None and rule == "quantity":
            compared, told = survey.shrunk(target, sizes), survey.explain(target, sizes)
        rises = leave_one_out(compared, target, available, dimension, rule)
        kept = [i for i, samples in enumerate(available) if samples]
        among = gram[kept][:, kept], target, [sizes[i] for i in kept], dimension
        names = [self.source_names[i] for i in kept]
        if rule == "shares":
            reasons = explain_shares(*among, names)
        else:
            reasons = judge_sources(among[0].diagonal().clamp_min(0), *among[1:]).sentences(names)
        told += caution(among[0].diagonal().clamp_min(0), target, dimension)
        values = [
            SourceValue(name, float(gram[i, i]), rise, self._without(name, run) if retrain else None)
            for i, (name, rise) in enumerate(zip(self.source_names, rises, strict=True))
        ]
        worth = [value.predicted if value.retrained is None else value.retrained for value in values]
        order = sorted(range(len(values)), key=lambda i: -worth[i])
        return Report(
            run, self.source_names, tuple(values[i] for i in order), (*run.screening, *run.verdicts, *told, *reasons)
        )

    def _without(self, source: str, run: TrainingRun) -> float:
        """Rise of the kept validation loss when ``source`` is left out."""
        rest = {name: part for name, part in self._given.items() if name != source}
        trainer = OTQMS(
            lambda: copy.deepcopy(self._prepared.around.initial),
            self._given_target,
            rest,
            validation=self._given_validation,
            options=self.options,
            seed=self.seed,
        )
        with_it, without = run.kept.validation_loss, trainer.fit(run.strategy).kept.validation_loss
        if with_it is None or without is None:
            fail("retrain", "a strategy that validates", repr(run.strategy))
        return without - with_it

    def source_models(self) -> list[nn.Module]:
        """One trained model per source, in evaluation mode; trained once, when first needed."""
        return self._prepared.source_models()

    def gram(self, model: nn.Module) -> torch.Tensor:
        """A = Theta^T J Theta at ``model``, float64 ``[K, K]``.

        J is the Fisher information on the target's training samples; the exact one by default: the empirical
        one vanishes with the training loss, and with it every reason not to take everything.
        """
        return self._prepared.gram(model, self.samples)


def _laid_out(model: nn.Module, pool: Pool, channels_last: bool) -> tuple[nn.Module, Pool, int]:
    """Both in the faster memory format where that is wanted, has a meaning and is accepted; and the classes."""

    def classes(model: nn.Module, pool: Pool) -> int:
        with torch.no_grad():
            inputs, _ = next(pool.batches(torch.arange(1)))
            return int(model.eval()(inputs).shape[1])

    found = classes(model, pool)
    faster = pool.channels_last() if channels_last else None
    if faster is None:
        return model, pool, found
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        classes(laid_out, faster)
    except RuntimeError:  # it views images as they lie in memory
        return model, pool, found
    return laid_out, faster, found


def _states(models: Mapping[str, nn.Module | State], sources: Mapping[str, Source]) -> list[State]:
    missing = [name for name in sources if name not in models]
    if missing:
        fail("source_models", f"a model for every source, {missing[0]!r} included", describe(", ".join(models)))
    chosen = [models[name] for name in sources]
    return [model.state_dict() if isinstance(model, nn.Module) else model for model in chosen]
