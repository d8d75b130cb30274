"""What strategies need before they train: source models, models of the target alone, a survey."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from time import perf_counter

import torch
from torch import nn

from transferops import _checkpoint as checkpoint
from transferops.fisher import FisherInformation
from transferops.otqms import costs, discrepancy, screening, survey
from transferops.otqms.averaging import midpoint
from transferops.otqms.discrepancy import State
from transferops.otqms.distributed import World
from transferops.otqms.options import TrainingOptions, resolve_dimension
from transferops.otqms.phases import Anchor, Decision, Phase, Situation, target_alone
from transferops.otqms.pool import Pool
from transferops.otqms.records import EpochRecord
from transferops.otqms.run import Run
from transferops.otqms.sampling import draw
from transferops.otqms.screening import LabelVerdicts, Screening, Sources, judge_labels
from transferops.otqms.surroundings import Surroundings, stream_seed
from transferops.otqms.survey import Survey
from transferops.otqms.training import evaluate, predict

_SCREENED_SAMPLES = 2048  # of a source: enough to tell one of use from one with arbitrary labels


class Preparation:
    """Makes each of them once, when first needed, and sets up runs that can ask for them.

    Args:
        around: What all runs share.
        labelled: The same with the validation samples among the target's, for runs that do not validate.
        parameters: How many are trained and count.
        classes: C.
        supplied: The source models' states, if they need not be trained.
        whole: What this is for a part of the target's samples of: whatever knows no target sample is taken from there.
    """

    def __init__(
        self,
        around: Surroundings,
        labelled: Surroundings,
        parameters: int,
        classes: int,
        supplied: list[State] | None = None,
        whole: Preparation | None = None,
    ) -> None:
        self.around = around
        self.labelled = labelled
        self.parameters = parameters
        self.classes = classes
        self.options = around.options
        self.dimension = resolve_dimension(self.options.dimension, parameters, around.samples.sizes[0], classes)
        self.device = around.samples.device
        self._world = World.current()
        self._supplied = supplied
        self._whole = whole
        self._surveys: dict[bool, Survey] = {}
        self._starts: dict[Sources, tuple[nn.Module, float]] = {}
        self._judging_seconds = 0.0
        self._anchors: dict[Anchor, tuple[nn.Module, float]] = {}
        self._anchor_grams: dict[Anchor, torch.Tensor] = {}
        self._fisher: FisherInformation | None = None

    @property
    def samples(self) -> Pool:
        """The target's, part 0, and the sources'."""
        return self.around.samples

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return self.around.samples.names[1:]

    def run(
        self,
        name: str,
        stream: str,
        phases: tuple[Phase, ...],
        on_epoch: Callable[[EpochRecord], None] | None = None,
        alone: bool = False,
        validated: bool = True,
        around: Surroundings | None = None,
        planned: Sequence[int] | None = None,
        patient: bool = False,
    ) -> Run:
        """A run in these surroundings, or others; ``alone`` in this process. The rest is as for :class:`Run`."""
        return Run(
            around or self.around,
            name,
            stream,
            phases,
            self._situation,
            self._start_from,
            World() if alone else self._world,
            validated=validated,
            planned=planned,
            patient=patient,
            on_epoch=on_epoch,
        )

    def source_models(self) -> list[nn.Module]:
        """One trained model per source, in evaluation mode; trained once, when first needed."""
        models = []
        for state in self.sources[0]:
            model = copy.deepcopy(self.around.initial)
            model.load_state_dict(dict(state))
            models.append(model.eval())
        return models

    def gram(self, model: nn.Module, samples: Pool) -> torch.Tensor:
        """A at ``model`` with the Fisher information of the target's part of ``samples``."""
        if self.options.directions == "models":
            # Kept from epoch to epoch, so that a model that trains on is checked once.
            if self._fisher is None or self._fisher.model is not model:
                self._fisher = discrepancy.information(model, len(self.source_names), self.options)
            return discrepancy.gram(model, self.sources[0], samples, self.options, self._world, self._fisher)
        generator = torch.Generator().manual_seed(stream_seed(self.around.seed, "gradients"))
        found = discrepancy.newton_directions(model, samples, self.options, generator, self._world)
        moved = {name: value.detach() for name, value in model.named_parameters()}
        states: list[State] = [{name: moved[name] + value for name, value in d.items()} for d in found]
        options = dataclasses.replace(self.options, parameters=list(found[0]))
        return discrepancy.gram(model, states, samples, options, self._world)

    @cached_property
    def sources(self) -> tuple[list[State], float]:
        """The parameters of the source models and the seconds that their training took.

        Process r trains sources r, r + size, ... alone, so that they do not depend on how many processes
        there are.
        """
        if self._supplied is not None:
            return self._supplied, 0.0
        if self._whole is not None:
            return self._whole.sources
        states: list[State] = []
        seconds = torch.zeros(len(self.source_names), dtype=torch.float64)
        for i, name in enumerate(self.source_names):
            if i % self._world.size == self._world.rank:
                phases = (_source_phase(i, self.options),)
                run = self.run(f"source-{i}", f"source/{name}", phases, alone=True, validated=False)
                states.append(self._stored(run.complete()))
                seconds[i] = run.seconds
            else:
                blank = self._stored(self.around.initial)
                states.append({key: torch.empty_like(value) for key, value in blank.items()})
        for i, state in enumerate(states):
            self._world.send(state.values(), i % self._world.size)
        return states, float(self._world.sum(seconds).sum())

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """Seconds that a sample of the target and of each source takes; measured once, also over interruptions."""
        if self._whole is not None:
            return self._whole.costs
        path = None if self.around.folder is None else self.around.folder / "costs.ckpt"
        kept = None if path is None else checkpoint.load(path)
        if kept is not None:
            return tuple(kept["seconds"].tolist())
        generator = torch.Generator().manual_seed(stream_seed(self.around.seed, "costs"))
        found = costs.measure(self.around.initial, self.samples, self.options, generator, self._world)
        if path is not None and self._world.leads:
            checkpoint.save({"seconds": found}, path)
        return tuple(found.tolist())

    def survey(self, all_labels: bool) -> Survey:
        """A look at all tasks from a common start; with the validation samples among the target's, or without."""
        all_labels = all_labels or self.around is self.labelled
        if all_labels in self._surveys:
            return self._surveys[all_labels]
        around, batch = self.labelled if all_labels else self.around, self.options.batch_size
        generator = torch.Generator().manual_seed(stream_seed(self.around.seed, "halves"))
        parts = survey.halves(around.samples, generator)
        screened = self.screening
        common = self._common_start(screened.kept)[0]
        starts = {*screened.judges[1:], screened.kept}  # the first judge is the target's model
        seconds = self._judging_seconds + sum(self._common_start(sources)[1] for sources in starts)
        start = dataclasses.replace(around, validation=None, watched=None, initial=common)
        suffix = "-all" if all_labels else ""

        def trained(name: str, stream: str, phase: Phase, around: Surroundings) -> nn.Module:
            nonlocal seconds
            run = self.run(f"survey-{name}", f"survey/{stream}", (phase,), around=around)
            model = run.complete()
            seconds += run.seconds
            return model

        states = [
            self._stored(trained(f"source-{i}{suffix}", name, survey.source_probe(i, batch), start))
            for i, name in enumerate(self.source_names)
        ]
        sizes, models = [len(part) for part in parts], []
        for name, part in zip(("first", "second"), parts, strict=True):
            half = dataclasses.replace(start, samples=Pool({"target": part}, self.device))
            models.append(trained(f"{name}-half{suffix}", "target", survey.half_probe(), half))
        states += [model.state_dict() for model in models]  # not rounded: their difference is small
        middle = midpoint(*models)
        gram = discrepancy.gram(middle, states, start.samples, self.options, self._world)
        apart = gram[-1, -1] + gram[-2, -2] - 2 * gram[-1, -2]
        measured = survey.measured_dimension(float(apart), *sizes)
        sources = len(self.source_names)
        self._surveys[all_labels] = Survey(gram[:sources, :sources].contiguous(), measured, seconds, screened)
        return self._surveys[all_labels]

    @cached_property
    def screening(self) -> Screening:
        """Which sources mean the same by their labels as the target, judged without the validation samples."""
        if not self.options.screen or self.classes < 2:
            return Screening(tuple(range(len(self.source_names))))
        return screening.screen(self.source_names, self._judge_labels)

    def _judge_labels(self, admitted: Sources, others: Sources) -> LabelVerdicts:
        """What a model of the sources admitted so far, or of the target, makes of the labels of the others."""
        if admitted:
            model = self._common_start(admitted)[0]
        else:
            model, self._judging_seconds = self.anchor("exact")
        clock = perf_counter()
        probabilities, labels = [], []
        for source in others:
            generator = torch.Generator().manual_seed(stream_seed(self.around.seed, f"screening/{source}"))
            own, positions = self.samples.part_labels(source + 1), self.samples.positions(source + 1)
            chosen = positions[draw(own, min(len(own), _SCREENED_SAMPLES), generator)]
            found = predict(model, self.samples, chosen)
            self._world.send([found])  # so that no two processes can judge differently
            probabilities.append(found.numpy())
            labels.append(self.samples.labels[chosen].numpy())
        verdicts = judge_labels(probabilities, labels)
        self._judging_seconds += perf_counter() - clock
        return verdicts

    def _common_start(self, sources: Sources) -> tuple[nn.Module, float]:
        """A model trained on these sources, without the target, and the seconds that took."""
        if self._whole is not None:
            return self._whole._common_start(sources)
        if sources not in self._starts:
            around = dataclasses.replace(self.labelled, validation=None, watched=None)
            some = len(sources) < len(self.source_names)
            name = "warm-up" + (f"-{sum(1 << source for source in sources):x}" if some else "")
            run = self.run(name, "warm-up", (survey.warm_up(sources),), around=around)
            self._starts[sources] = run.complete(), run.seconds
        return self._starts[sources]

    def anchor(self, anchor: Anchor) -> tuple[nn.Module, float]:
        """A model trained on the target alone and the seconds its training took."""
        if anchor not in self._anchors:
            phase = Phase(target_alone, epochs=1 if anchor == "under" else None)
            run = self.run(f"anchor-{anchor}", "training", (phase,), validated=anchor == "exact")
            self._anchors[anchor] = run.complete(), run.seconds
        return self._anchors[anchor]

    def _start_from(self, run: Run, start: str) -> State:
        """The state that a phase of ``run`` starts from."""
        if start == "best-source":
            return self._best_source()
        return self._common_start(self.screening.kept)[0].state_dict()

    def _best_source(self) -> State:
        """The state of the source model of least cross-entropy on the target's labelled samples."""
        losses = []
        for model in self.source_models():
            loss = evaluate(model, self.around.samples, 0).loss * self.around.samples.sizes[0]
            if self.around.validation is not None:
                loss += evaluate(model, self.around.validation).loss * len(self.around.validation)
            losses.append(loss)
        return self.sources[0][min(range(len(losses)), key=losses.__getitem__)]

    def _stored(self, model: nn.Module) -> State:
        """A copy of a model's state, where and in the precision that source models are kept."""
        options = self.options

        def kept(value: torch.Tensor) -> torch.Tensor:
            dtype = options.source_dtype if value.is_floating_point() else None
            return value.to("cpu" if options.offload else self.device, dtype or value.dtype, copy=True)

        return {key: kept(value) for key, value in model.state_dict().items()}

    def _situation(self, run: Run, epoch: int, previous: Decision | None) -> Situation:
        samples = run.around.samples

        def gram() -> torch.Tensor:
            run.gram = self.gram(run.model, samples)
            return run.gram

        def anchor_gram(anchor: Anchor) -> torch.Tensor:
            if anchor not in self._anchor_grams:
                self._anchor_grams[anchor] = self.gram(self.anchor(anchor)[0], self.around.samples)
            run.gram = self._anchor_grams[anchor]
            return run.gram

        def released_gram() -> torch.Tensor:
            sources = self.sources[0]
            run.gram = discrepancy.released_gram(run.model, sources, samples, self.options, self._world)
            return run.gram

        def surveyed() -> Survey:
            found = self.survey(run.around is self.labelled)
            run.gram = found.gram
            return found

        sizes = samples.sizes
        return Situation(
            epoch=epoch,
            target_samples=sizes[0],
            source_samples=sizes[1:],
            dimension=self.dimension,
            parameters=self.parameters,
            gram=gram,
            anchor_gram=anchor_gram,
            released_gram=released_gram,
            survey=surveyed,
            costs=lambda: self.costs,
            budget=self.options.budget,
            budget_seconds=self.options.budget_seconds,
            previous=previous,
            samples=samples,
            model=run.model,
        )


def _source_phase(source: int, options: TrainingOptions) -> Phase:
    """One epoch on all samples of a source and nothing else."""

    def only(situation: Situation) -> Decision:
        taken = (size if i == source else 0 for i, size in enumerate(situation.source_samples))
        return Decision(tuple(taken), target=0)

    return Phase(only, epochs=1, steps=options.source_steps, name="source")
