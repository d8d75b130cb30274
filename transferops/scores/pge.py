"""Principal gradient expectation: how alike two tasks pull at the same untrained, or pretrained, network.

[paper: "Improving molecular property prediction with principal gradient-based measurement", arXiv 2211.16299]: PGE(D)
is the gradient of the mean cross-entropy at a freshly initialised network in train mode, averaged over batches and
restarts, over all parameters but the head's. :mod:`transferops.scores.pge_gap` compares two of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transferops import ops
from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.batches import Batch
from transferops.scores._distributed import check_group, gather
from transferops.scores.pge_gap import cosines, gaps, jackknife, weigh
from transferops.scores.restarts import RestartedNetwork, find_head
from transferops.scores.running import RunningGradients, gather_tasks


@dataclass(frozen=True)
class PgeResult:
    """Gaps and cosines between K tasks, float64 on the CPU.

    Attributes:
        tasks: names of the K tasks, in the order in which they came.
        gap: [K, K], symmetric, 0 on the diagonal; smaller = more transferable.
        cosine: [K, K], symmetric, 1 on the diagonal.
        norms: [K], |g_k|.
        gap_standard_error, cosine_standard_error: [K, K], from the variation between restarts; NaN for a single one.
    """

    tasks: tuple[str, ...]
    gap: Tensor
    cosine: Tensor
    norms: Tensor
    gap_standard_error: Tensor
    cosine_standard_error: Tensor

    @property
    def score(self) -> Tensor:
        """-gap, [K, K]: higher = more transferable, as for every other score."""
        return -self.gap


class PrincipalGradientExpectation:
    """Gradient expectations of any number of tasks over the same restarts of one network.

    Tasks are paired by construction: the seeds are drawn once, and every task sees the same initialisations. With
    ``torch.distributed`` initialised, each rank takes its share of the restarts of the same data; :meth:`all_reduce`
    joins them. Standard errors are those of a jackknife over groups of restarts, left out of all tasks at once
    [derived; delete-m jackknife for unequal groups: Busing, Meijer and van der Leeden, 1999].

    Args:
        model: any module that returns logits [N, C] or [N, T, C]; copied, never changed.
        restarts: R, initialisations.
        init: "random" draws the whole network anew at each restart, by the modules' ``reset_parameters``; "pretrained"
            keeps the model's parameters and draws the head alone.
        seed: what the restarts' seeds (attribute ``seeds``) are drawn from.
        head: names of the modules that belong to the head and so not to the expectation, the last of which gives the
            outputs; () for none. None: the last linear layer or convolution to run in a forward pass.
        initialize: draws a module's parameters anew, in place; None for its ``reset_parameters``.
        groups: restarts are averaged in so many groups for the standard errors, of which memory is a multiple.
        variance: keep the variance of every weight's gradient over restarts and batches too (:meth:`variance`).
        restart_batch: restarts drawn and differentiated at once, by ``torch.func.vmap``; 1 for one by one. If it is
            below R, initialisations are drawn anew for each batch. None: as many are drawn as have parameters and
            gradients of 256 MiB in all, and on a CPU as many of them differentiated at once as fit its cache, one by
            one if those are below 4.
        shard: (rank, ranks), which restarts are taken here; None for those of ``torch.distributed``, or all.

    Raises:
        TypeError: the model is no module, or an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    higher_is_better: ClassVar[bool] = True  # of PgeResult.score

    def __init__(
        self,
        model: nn.Module,
        *,
        restarts: int = 8,
        init: str = "random",
        seed: int = 0,
        head: str | Sequence[str] | None = None,
        initialize: Callable[[nn.Module], None] | None = None,
        groups: int = 8,
        variance: bool = False,
        restart_batch: int | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            fail("model", "a torch.nn.Module", describe(model), TypeError)
        if init not in ("random", "pretrained"):
            fail("init", "'random' or 'pretrained'", describe(init))
        self.model, self.init, self.initialize = model, init, initialize
        self.restarts = check_positive_int("restarts", restarts)
        self.groups = min(check_positive_int("groups", groups), self.restarts)
        self.seed = check_positive_int("seed", seed, minimum=0)
        self.restart_batch = None if restart_batch is None else check_positive_int("restart_batch", restart_batch)
        self.keeps_variance = bool(variance)
        generator = torch.Generator().manual_seed(self.seed)
        self.seeds = tuple(torch.randint(2**48, (self.restarts,), generator=generator).tolist())
        self.shard = _check_shard(shard)
        self._head = _check_head(model, head)
        self._networks: dict[int, RestartedNetwork] = {}
        self._drawn: dict[int, dict[str, Tensor]] = {}
        self._tasks: dict[str, RunningGradients] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks seen so far."""
        return tuple(self._tasks)

    @property
    def head(self) -> tuple[str, ...] | None:
        """Names of the head's modules; None if they are to be found on the first batch."""
        return self._head

    @property
    def loop_reason(self) -> str | None:
        """Why restarts are differentiated one by one, if the network did not allow otherwise."""
        return next((n.loop_reason for n in self._networks.values() if n.loop_reason), None)

    def update(
        self, task: str, inputs: Tensor | Mapping[str, Any], labels: Tensor, num_classes: int | None = None
    ) -> PrincipalGradientExpectation:
        """Add a batch of a task: one gradient at each restart. All batches count alike.

        With labels on a GPU the program waits for it once, to look at them; with labels on the CPU, not at all.

        Args:
            task: the task's name.
            inputs: what the model is called with: a tensor [N, ...], or keyword arguments.
            labels: integers 0 .. C-1, [N], or [N, T] for outputs [N, T, C].
            num_classes: C, outputs of the task's own fresh head; None for those of the model's head. Needed once.

        Raises:
            TypeError: labels are not integers.
            ValueError: no samples, a label out of range, another ``num_classes`` than before; or the head cannot be
                found, or a module not drawn anew.
        """
        with torch.inference_mode(False):
            self._update(task, self._check_batch(task, inputs, labels), num_classes)
        return self

    def expectation(self, task: str) -> list[Tensor]:
        """The task's expectation: a list of tensors, as :func:`pge_gap` takes."""
        return self._running(task).mean()

    def variance(self, task: str) -> list[Tensor]:
        """Variance of every weight's gradient over restarts and batches (n - 1 in the denominator).

        Raises:
            ValueError: no variance was asked for, or the task is unknown.
        """
        if not self.keeps_variance:
            fail("variance", "an expectation that was told variance=True", "variance=False")
        return self._running(task).variance()

    def compute(self) -> PgeResult:
        """Gaps and cosines between all tasks, with standard errors, over the groups of restarts that all have seen.

        Raises:
            ValueError: no task has been seen, or an expectation is zero or not finite.
        """
        tasks = list(self._tasks.values())
        if not tasks:
            fail("task", "a batch of at least one task before the gaps are computed", "none")
        groups = [g for g in range(self.groups) if all(task.counts[g] for task in tasks)]
        if not groups:
            fail("task", "batches of every task at the same restarts", "none")
        gram = ops.gradient_gram([task.means[g] for task in tasks for g in groups]).cpu()
        gram = gram.view(len(tasks), len(groups), len(tasks), len(groups))
        weights = torch.tensor([[task.counts[g] for g in groups] for task in tasks], dtype=torch.float64)
        whole = weigh(gram, weights)
        for index, name in enumerate(self._tasks):
            if not 0 < float(whole[index, index]) < math.inf:
                norm = math.sqrt(float(whole[index, index])) if whole[index, index] >= 0 else math.nan
                fail("inputs", f"a non-zero finite gradient expectation of the task {name!r}", f"norm {norm}")
        errors = jackknife(gram, weights, (gaps, cosines))
        return PgeResult(tuple(self._tasks), gaps(whole), cosines(whole), whole.diagonal().sqrt(), errors[0], errors[1])

    def merge(self, other: PrincipalGradientExpectation) -> PrincipalGradientExpectation:
        """Add what ``other`` has seen: other restarts, other batches or other tasks; ``other`` is left as it is.

        Raises:
            TypeError: ``other`` is something else.
            ValueError: its settings are others.
        """
        if not isinstance(other, PrincipalGradientExpectation):
            fail("other", "a PrincipalGradientExpectation", describe(other), TypeError)
        self._check_settings("other", other._settings())
        for name, running in other._tasks.items():
            if name in self._tasks:
                self._tasks[name].merge(running)
            else:
                self._tasks[name] = running.copy()
        return self

    def all_reduce(self, group: Any = None) -> PrincipalGradientExpectation:
        """Join the ranks of ``torch.distributed``; all end with the whole. To be called once, at the end.

        Raises:
            ValueError: torch.distributed is not initialised, or the ranks disagree.
        """
        check_group()
        heads = [head for head in gather(self._head, group) if head is not None]
        if self._head is None and heads:  # no batch has come here
            self._head = heads[0]
        for name, classes in gather_tasks({n: r.classes for n, r in self._tasks.items()}, group):
            if name not in self._tasks:
                network = self._network(classes)
                self._tasks[name] = RunningGradients(network.expected, self.groups, classes, self.keeps_variance)
            self._tasks[name].all_reduce(group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that has been seen, and the settings that it depends on, as tensors and plain values."""
        return {
            **self._settings(),
            "head": self._head,
            "tasks": {name: running.state_dict() for name, running in self._tasks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, exactly as if there had been no interruption.

        Raises:
            ValueError: the settings are not those of this object.
        """
        self._check_settings("state", state)
        self._head = None if state["head"] is None else tuple(state["head"])
        self._tasks = {name: RunningGradients.from_state(saved) for name, saved in state["tasks"].items()}

    # ---- inner steps ----

    def _update(self, task: str, batch: Batch, num_classes: int | None) -> None:
        if self._head is None:
            self._head = (find_head(self.model, batch),)
        running = self._tasks.get(task)
        classes = self._check_classes(batch, running, num_classes)
        network = self._network(classes)
        if running is None:
            running = RunningGradients(network.expected, self.groups, classes, self.keeps_variance)
        chosen = self._chosen()
        step = self.restart_batch or network.chunk(len(chosen))
        for first in range(0, len(chosen), step):
            part = chosen[first : first + step]
            seeds = [self.seeds[e] for e in part]
            state = self._state(network, classes, part, chosen)
            gradients = network.gradients(batch, state, seeds, running.batches, self.restart_batch)
            running.add(gradients, [e * self.groups // self.restarts for e in part])
        running.batches += 1
        self._tasks[task] = running

    def _settings(self) -> dict[str, Any]:
        return {
            "restarts": self.restarts,
            "init": self.init,
            "seed": self.seed,
            "seeds": list(self.seeds),
            "groups": self.groups,
            "variance": self.keeps_variance,
        }

    def _check_settings(self, argument: str, settings: Mapping[str, Any]) -> None:
        for key, value in self._settings().items():
            if settings.get(key) != value:
                fail(argument, f"{key}={value!r}", f"{key}={settings.get(key)!r}")

    def _chosen(self) -> list[int]:
        rank, ranks = self.shard
        return [e for e in range(self.restarts) if e * ranks // self.restarts == rank]

    def _running(self, task: str) -> RunningGradients:
        if task not in self._tasks:
            fail("task", f"one of {list(self._tasks)}", describe(task))
        return self._tasks[task]

    def _network(self, classes: int) -> RestartedNetwork:
        if classes not in self._networks:
            self._networks[classes] = RestartedNetwork(
                self.model, self._head or (), classes, random=self.init == "random", initialize=self.initialize
            )
        return self._networks[classes]

    def _state(self, network: RestartedNetwork, classes: int, part: list[int], chosen: list[int]) -> dict[str, Tensor]:
        """Initialisations at these restarts; kept if they are all there are."""
        if part != chosen:
            return network.draw([self.seeds[e] for e in part])
        if classes not in self._drawn:
            self._drawn[classes] = network.draw([self.seeds[e] for e in part])
        return self._drawn[classes]

    def _check_batch(self, task: str, inputs: Any, labels: Any) -> Batch:
        if not isinstance(task, str):
            fail("task", "a name", describe(task), TypeError)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            fail("labels", "a tensor of integers", describe(labels), TypeError)
        if isinstance(inputs, Mapping):
            inputs = {**inputs, "labels": labels.long()}
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = Batch.parse(0, inputs if isinstance(inputs, Mapping) else (inputs, labels.long()), device)
        if labels.dim() == 0 or len(labels) != batch.samples:
            fail("labels", f"{batch.samples} of them, as there are samples", describe(labels))
        return batch

    def _check_classes(self, batch: Batch, running: RunningGradients | None, num_classes: int | None) -> int:
        if num_classes is not None:
            check_positive_int("num_classes", num_classes, minimum=2)
        if running is not None:
            if num_classes not in (None, running.classes):
                fail("num_classes", f"{running.classes}, as before", describe(num_classes))
            classes = running.classes
        else:
            classes = num_classes or self._default_classes(batch)
        labels = batch.given  # of which those on the CPU are looked at without waiting for a GPU
        bad = ((labels < 0) | (labels >= classes)).nonzero()
        if len(bad):
            place = bad[0].tolist()
            at = place[0] if len(place) == 1 else place
            got = f"{int(labels[tuple(place)])} at position {at}"
            fail("labels", f"{classes} classes 0..{classes - 1}", got)
        return classes

    def _default_classes(self, batch: Batch) -> int:
        module = self.model.get_submodule(self._head[-1]) if self._head else None
        found = getattr(module, "out_features", getattr(module, "out_channels", None))
        if not isinstance(found, int):
            fail("num_classes", "the number of classes, which the head does not tell", "None")
        return found


def _check_shard(shard: Any) -> tuple[int, int]:
    if shard is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    valid = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(type(x) is int for x in shard)
    if not valid or not 0 <= shard[0] < shard[1]:
        fail("shard", "(rank, ranks) with 0 <= rank < ranks", repr(shard))
    return shard[0], shard[1]


def _check_head(model: nn.Module, head: Any) -> tuple[str, ...] | None:
    if head is None:
        return None
    names = (head,) if isinstance(head, str) else tuple(head)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            fail("head", "names of modules of the model", describe(name))
    return names
