"""One training: its phases, epoch by epoch and step by step, from wherever it was interrupted."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn

from transferops import __version__
from transferops import _checkpoint as checkpoint
from transferops._validate import fail
from transferops.otqms.augmentation import draw_offsets
from transferops.otqms.averaging import WeightAverage, midpoint
from transferops.otqms.distributed import World
from transferops.otqms.early_stopping import EarlyStopping
from transferops.otqms.phases import Decision, Phase, Situation, shares
from transferops.otqms.records import EpochRecord
from transferops.otqms.sampling import Deck
from transferops.otqms.surroundings import Surroundings, stream_seed
from transferops.otqms.training import EpochPlan, Evaluation, Stepper, evaluate

# Options that change nothing in the result of a run.
_NOT_OF_THE_RUN = ("workers", "checkpoint_steps", "guard", "folds", "cuda_graphs")


class Run:
    """A training through its phases.

    Its state is all that the next step depends on: model, optimiser, schedule, random generators, decks, the
    plan of the epoch and the step in it, decision, early stopping, records. With a folder, it is written every
    so many steps and after every epoch, and a run of the same name goes on from there.

    Args:
        around: What it shares with other trainings.
        name: Of the run; of its checkpoint, too.
        stream: Its random numbers; runs with the same are paired.
        phases: At least one.
        situation: What a decision may look at, for this run, an epoch of its phase, and the last decision.
        start_from: The state to start from where a phase says "best-source" or "survey".
        world: The processes that share its batches.
        validated: Whether it looks at the validation samples.
        planned: Epochs of each phase, of what schedules take for its length; a phase with 0 is left out. ``None``:
            as the phases say.
        patient: Whether every phase lasts as long as it may, whatever its epochs validate at.
        on_epoch: Called with every record.
    """

    def __init__(
        self,
        around: Surroundings,
        name: str,
        stream: str,
        phases: Sequence[Phase],
        situation: Callable[[Run, int, Decision | None], Situation],
        start_from: Callable[[Run, str], Mapping[str, torch.Tensor]],
        world: World,
        validated: bool = True,
        planned: Sequence[int] | None = None,
        patient: bool = False,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> None:
        self.name = name
        self.model = copy.deepcopy(around.initial)
        self.records: list[EpochRecord] = []
        self.gram: torch.Tensor | None = None
        self.around = around
        self._stream = stream
        self._phases = phases
        self._situation = situation
        self._start_from = start_from
        self._world = world
        self._validated = validated
        self._planned = planned
        self._patient = patient
        self._on_epoch = on_epoch
        self._path = None if around.folder is None else around.folder / f"{name}.ckpt"
        self._generator = torch.Generator()
        self._decks = [Deck(around.samples.part_labels(part)) for part in range(len(around.samples.sizes))]
        self._phase = -1
        self._phase_epoch = 0  # finished epochs of the phase
        self._decision: Decision | None = None
        self._plan: EpochPlan | None = None
        self._step = 0
        self._loss = torch.zeros((), device=around.samples.device)
        self._seconds = self._decision_seconds = 0.0  # of the epoch so far
        self._clock = 0.0
        self.finished = False

    @property
    def kept_epoch(self) -> int:
        """The epoch that the model is from."""
        return self._stopping.epoch

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(record.seconds for record in self.records)

    def complete(self) -> nn.Module:
        """Train to the end, from the checkpoint if there is one.

        Returns:
            The kept model in evaluation mode.

        Raises:
            RuntimeError: If the training diverges.
            ValueError: If the checkpoint is damaged or of another run.
        """
        with self._seeded():
            if not self._resume():
                self._begin_phase(0)
            while not self.finished:
                if self._plan is None:
                    self._begin_epoch()
                self._take_steps()
                self._end_epoch()
        return self.model.eval()

    def _begin_phase(self, number: int) -> None:
        phase = self._phases[number]
        if phase.start == "initial":
            self.model.load_state_dict(self.around.initial.state_dict())
        elif phase.start != "previous":
            self.model.load_state_dict(self._start_from(self, phase.start))
        before = 0 if number == 0 else self.kept_epoch
        self._phase, self._phase_epoch = number, 0
        self._decision = None
        self._prepare_phase()
        self._stopping = EarlyStopping(phase.patience or self.around.options.patience, len(self.records))
        if phase.may_stay and before:
            self._stopping.update(before, self._assess(self.model), self.model)

    def _prepare_phase(self) -> None:
        """What the phase at hand trains with, from the model as it is."""
        phase, options = self._phases[self._phase], self.around.options
        own = dataclasses.replace(options, schedule=phase.schedule or options.schedule)
        self._stepper = Stepper(self.model, own, options.lr * phase.lr_factor, self._world)
        self._average = None if phase.averaging is None else WeightAverage(self.model, phase.averaging)
        self._origin = copy.deepcopy(self.model) if phase.halfway else None

    def _candidate(self) -> nn.Module:
        """The model that would be kept now."""
        model = self.model if self._average is None else self._average.applied(self.model)
        return model if self._origin is None else midpoint(self._origin, model)

    def _assess(self, model: nn.Module) -> Evaluation | None:
        """Loss and accuracy of ``model`` on the validation samples, where the phase looks at them."""
        validation = self.around.validation
        if validation is None or not self._validated or not self._phases[self._phase].early_stopping:
            return None
        return evaluate(model, validation, None, self._world)

    def _begin_epoch(self) -> None:
        self._clock = start = perf_counter()
        options, phase = self.around.options, self._phases[self._phase]
        due = not phase.decide_once and self._phase_epoch % options.resolve_every == 0
        if self._decision is None or due:
            self._decision = phase.decide(self._situation(self, self._phase_epoch + 1, self._decision))
            self._decision_seconds = perf_counter() - start
        decision, samples = self._decision, self.around.samples
        counts = [samples.sizes[0] if decision.target is None else decision.target, *decision.quantities]
        drawn = torch.cat(
            [
                samples.positions(part)[deck.deal(count, self._generator)]
                for part, (deck, count) in enumerate(zip(self._decks, counts, strict=True))
            ]
        )
        if len(drawn) == 0:
            fail("decision", "at least one sample to train on", "none")
        plan = EpochPlan.shuffled(
            drawn,
            phase.batch_size or options.batch_size,
            phase.steps or options.min_steps,
            self._generator,
            self._weights(drawn),
        )
        if phase.translation:
            offsets = draw_offsets(samples.sample_shape, phase.translation, plan.order.shape, self._generator)
            plan = dataclasses.replace(plan, offsets=offsets)
        self._plan = plan

    def _take_steps(self) -> None:
        assert self._plan is not None
        every = self.around.options.checkpoint_steps
        epochs = self._phases[self._phase].epochs or self.around.options.epochs
        progress = (self._phase_epoch, epochs)
        for loss in self._stepper.steps(self.around.samples, self._plan, self._step, progress):
            self._loss += loss
            if self._average is not None:
                self._average.update(self.model)
            self._step += 1
            if self._step % every == 0 and self._step < self._plan.total_steps:
                self._save()

    def _end_epoch(self) -> None:
        assert self._plan is not None
        assert self._decision is not None
        plan, decision = self._plan, self._decision
        loss = self._world.sum(self._loss).item() / (len(plan.order) * plan.samples)
        if not math.isfinite(loss):
            raise RuntimeError(f"the training diverged: its mean loss is {loss}; a smaller learning rate may help")
        self._stepper.end_epoch()
        candidate = self._candidate()
        assessed = self._assess(candidate)
        epoch = len(self.records) + 1
        self._stopping.update(epoch, assessed, candidate)
        names, watched = self.around.samples.names[1:], self.around.watched
        if assessed is None and watched is not None and self._validated:
            assessed = evaluate(candidate, watched, None, self._world)
        record = EpochRecord(
            epoch=epoch,
            quantities=dict(zip(names, decision.quantities, strict=True)),
            samples=plan.samples,
            train_loss=loss,
            validation_loss=None if assessed is None else assessed.loss,
            validation_accuracy=None if assessed is None else assessed.accuracy,
            predicted_risk=decision.predicted_risk,
            seconds=self._elapsed(),
            allocation_seconds=self._decision_seconds,
            phase=self._phases[self._phase].name,
            shares=dict(zip(names, shares(decision, self.around.samples.sizes[0])[1:], strict=True)),
        )
        self.records.append(record)
        self._plan, self._step = None, 0
        self._loss = torch.zeros_like(self._loss)
        self._seconds = self._decision_seconds = 0.0
        self._clock = perf_counter()
        self._phase_epoch += 1
        stopped = not self._patient and self._stopping.over(epoch)
        if stopped or self._phase_epoch == self._phase_epochs(self._phase):
            self._stopping.restore(self.model)
            rest = [number for number in range(self._phase + 1, len(self._phases)) if self._phase_epochs(number)]
            if rest:
                self._begin_phase(rest[0])
            else:
                self.finished = True
        if self._on_epoch is not None:
            self._on_epoch(record)
        self._save()

    def _phase_epochs(self, number: int) -> int:
        """The most that a phase lasts."""
        if self._planned is not None:
            return self._planned[number]
        return self._phases[number].epochs or self.around.options.epochs

    def _weights(self, drawn: torch.Tensor) -> torch.Tensor | None:
        """The loss weight of each of ``drawn``."""
        assert self._decision is not None
        if self._decision.weights is None:
            return None
        table = torch.tensor(self._decision.weights, dtype=torch.float64)
        samples = self.around.samples
        part = samples.part_of(drawn)
        weights = table[part] if table.dim() == 1 else table[part, samples.labels[drawn]]
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or float(weights.sum()) <= 0:
            fail("decision", "finite weights of at least 0, not all of them 0", str(self._decision.weights))
        return weights.float()

    def _elapsed(self) -> float:
        """Wall time of the epoch so far, also of what was done before an interruption."""
        now = perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        return self._seconds

    # Checkpoints

    def _save(self) -> None:
        if self._path is None:
            return
        cuda = self.around.samples.device.type == "cuda"
        local = {"loss": self._loss, "cpu": torch.get_rng_state()}
        if cuda:
            local["cuda"] = torch.cuda.get_rng_state(self.around.samples.device)
        processes = {name: self._world.gather(value) for name, value in local.items()}
        stepper = None if self.finished else self._stepper.state_dict()
        if not self._world.leads:
            return
        plan = self._plan
        state: dict[str, Any] = {
            "run": json.dumps(self._identity()),
            "records": json.dumps([dataclasses.asdict(record) for record in self.records]),
            "decision": json.dumps(None if self._decision is None else dataclasses.asdict(self._decision)),
            "processes": processes,
            "model": self.model.state_dict(),
            "stopping": self._stopping.state_dict(),
            "gram": self.gram,
            "finished": self.finished,
            "phase": self._phase,
        }
        if not self.finished:
            state |= {
                "stepper": stepper,
                "average": None if self._average is None else self._average.state_dict(),
                "origin": None if self._origin is None else self._origin.state_dict(),
                "decks": [deck.state_dict() for deck in self._decks],
                "generator": self._generator.get_state(),
                "phase_epoch": self._phase_epoch,
                "plan": None if plan is None else vars(plan),
                "step": self._step,
                "seconds": self._elapsed() if plan is not None else 0.0,
                "decision_seconds": self._decision_seconds,
            }
        checkpoint.save(state, self._path)

    def _resume(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        state = None if self._path is None else checkpoint.load(self._path)
        if state is None:
            return False
        written, identity = json.loads(state["run"]), json.loads(json.dumps(self._identity()))
        for key, value in identity.items():
            if written.get(key) != value:
                fail("checkpoint", f"a run with {key} {value} in {self._path}", str(written.get(key)))
        self._phase = state["phase"]
        phase, options = self._phases[self._phase], self.around.options
        self.records = [EpochRecord(**record) for record in json.loads(state["records"])]
        self.gram = state["gram"]
        self.model.load_state_dict(state["model"])
        self._stopping = EarlyStopping(phase.patience or options.patience)
        self._stopping.load_state_dict(state["stopping"])
        self.finished = state["finished"]
        if self.finished:
            return True
        self._prepare_phase()
        self._stepper.load_state_dict(state["stepper"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if self._origin is not None:
            self._origin.load_state_dict(state["origin"])
        for deck, content in zip(self._decks, state["decks"], strict=True):
            deck.load_state_dict(content)
        self._generator.set_state(state["generator"])
        processes = state["processes"]
        self._loss = processes["loss"][self._world.rank].to(self._loss.device)
        torch.set_rng_state(processes["cpu"][self._world.rank])
        if "cuda" in processes:
            torch.cuda.set_rng_state(processes["cuda"][self._world.rank], self.around.samples.device)
        decision = json.loads(state["decision"])
        self._decision = None if decision is None else _decision(decision)
        self._plan = None if state["plan"] is None else EpochPlan(**state["plan"])
        self._step, self._phase_epoch = state["step"], state["phase_epoch"]
        self._seconds, self._decision_seconds = state["seconds"], state["decision_seconds"]
        self._clock = perf_counter()
        return True

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        around = self.around
        shapes = [(name, list(p.shape), p.requires_grad) for name, p in around.initial.named_parameters()]
        options = {k: v for k, v in around.options.as_dict().items() if k not in _NOT_OF_THE_RUN}
        return {
            "name": self.name,
            "seed": around.seed,
            "processes": self._world.size,
            "planned epochs": self._planned,
            **{f"option {key}": value for key, value in options.items()},
            "parts": dict(zip(around.samples.names, around.samples.sizes, strict=True)),
            "samples": hashlib.sha256(around.samples.content().encode()).hexdigest()[:16],
            "parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
            "torch": torch.__version__,
            "transferops": __version__,
        }

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seed everything random inside, give the caller's random state back after."""
        device = self.around.samples.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # The draws are the same in every process, what layers draw (dropout) is not.
            self._generator.manual_seed(stream_seed(self.around.seed, self._stream))
            torch.manual_seed(stream_seed(self.around.seed, self._stream, self._world.rank))
            yield


def _decision(values: dict[str, Any]) -> Decision:
    """From JSON, which has lists for tuples."""
    weights = values["weights"]
    if weights is not None:
        weights = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in weights)
    return Decision(**{**values, "quantities": tuple(values["quantities"]), "weights": weights})
