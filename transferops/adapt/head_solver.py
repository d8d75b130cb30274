"""The best linear head for new data in closed form, kept near a pretrained one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from transferops import _checkpoint as checkpoint
from transferops._validate import check_positive_int, describe, fail
from transferops.adapt.head_held_out import leave_one_out
from transferops.adapt.head_path import HeadPath, Prior, Spectrum
from transferops.adapt.head_rows import Format, Rows, check_finite, parse_penalties, parse_prior, parse_rows
from transferops.adapt.head_statistics import HeadStatistics, Spread, row_spread

_FORMAT = 1  # of state_dict


class HeadSolver:
    """Least squares for a linear head, with a penalty on the distance to a prior head.

    Finds weight W' [c, p] and bias b [c] of least sum_i w_i |y_i - W' z_i - b|^2 + lam |W' - W|_F^2: layer
    variational analysis (arXiv 2302.01798) in its ridge form [derived]. lam is in units of the sum of squares; the bias
    is not penalised. lam -> 0 is the least-squares head nearest to the prior (what the paper's pseudo-inverse computes
    in exact mode), lam = inf the prior as it is, its bias included if it has one. Without a prior, W = 0: ordinary
    ridge regression.

    **What is kept.** Up to p samples stay as rows, and the N x N form is solved; more are folded into float64 sums
    (p x p), which is all that a solution for a given lam needs. Besides, up to ``keep_rows`` rows are kept in their
    dtype for the leave-one-out loss, which needs rows:

    * all samples fit: the loss is exact, over all samples;
    * they do not: a uniform random sample of the rows is kept. Each of them has its exact leave-one-out residual
      under all samples; the ratio of leave-one-out to training loss is measured on them and multiplies the exact
      training loss of all samples. ``keep_rows=None`` keeps every row;
    * after :meth:`subtract` no row is known to remain, and with ``keep_rows=0`` none is kept: choose lam by
      :func:`transferops.adapt.k_fold_path`, which needs sums only, or give it.

    Cost of ``solve``: min(N, p)^3 once for all penalties; the leave-one-out loss takes 2 M c min(M, p) for each penalty
    and M rows.

    Args:
        prior_weight: [c, p], the pretrained head; 0 if left out.
        prior_bias: [c], its bias. Without it the prior's bias is fitted.
        classes: number of outputs if targets are labels and there is no prior.
        target_scale: factor of the targets, so that they match the scale of the prior's outputs: a head trained with
            cross-entropy puts out logits, not zeros and ones. "auto" gives targets and prior outputs the same
            standard deviation about their means, pooled over outputs, if targets are labels and there is a prior, and
            is 1 otherwise. Regressing one on the other would shrink the scale by their correlation, and fails where
            that is small or negative; on few-shot digits equal deviations did best.
        keep_rows: how many rows to keep for the leave-one-out loss, None for all.
        seed: of the choice of rows.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        prior_weight: Tensor | Any | None = None,
        prior_bias: Tensor | Any | None = None,
        *,
        classes: int | None = None,
        target_scale: float | str = "auto",
        keep_rows: int | None = 4096,
        seed: int = 0,
    ) -> None:
        weight, bias = parse_prior(prior_weight, prior_bias)
        if classes is not None:
            check_positive_int("classes", classes)
            if weight is not None and len(weight) != classes:
                fail("classes", f"the {len(weight)} rows of prior_weight", str(classes))
        if keep_rows is not None:
            check_positive_int("keep_rows", keep_rows, minimum=0)
        if target_scale != "auto" and (isinstance(target_scale, (str, bool)) or not 0 < float(target_scale) < math.inf):
            fail("target_scale", "'auto' or a positive number", describe(target_scale))
        self.classes = classes
        self.target_scale = target_scale
        self.keep_rows = keep_rows
        self._weight, self._bias = weight, bias
        self._generator = torch.Generator().manual_seed(seed)
        self._folded: HeadStatistics | None = None
        self._waiting: list[Rows] = []  # not in the sums yet, at most p rows
        self._kept: list[Rows] | None = []  # None once a subtraction has made the choice meaningless
        self._outputs = classes if weight is None else len(weight)
        self._labelled: bool | None = None

    @property
    def samples(self) -> int:
        """Samples seen, whatever their weights."""
        return sum(map(len, self._waiting)) + (self._folded.samples if self._folded is not None else 0)

    @property
    def labelled(self) -> bool | None:
        """Whether targets are labels; None before the first."""
        return self._labelled

    @property
    def has_prior(self) -> bool:
        """Whether there is a prior head."""
        return self._weight is not None

    def update(self, features: Tensor | Any, targets: Tensor | Any, weights: Tensor | Any | None = None) -> Self:
        """Add samples. Nothing is changed if they are refused.

        Args:
            features: [N, p] float32, float64, float16 or bfloat16.
            targets: [N, c] floating point, or integer labels [N] in 0 .. c-1, which stand for one-hot targets less
                1/c: every row then sums to 0, which changes nothing but the bias.
            weights: [N], at least 0; a weight of k counts like k equal samples (but is left out as one).

        Raises:
            TypeError: an argument is no array or has the wrong kind of dtype.
            ValueError: shapes or devices disagree with each other, the prior or earlier samples; a number is NaN or
                infinite, a label out of range, a weight negative; the message names the position.
        """
        rows = self.check(features, targets, weights)
        if len(rows) == 0:
            return self
        self._add(rows)
        return self

    def merge(self, other: HeadSolver) -> Self:
        """Add all that ``other`` has seen, which is left as it is and must have the same prior.

        Raises:
            TypeError: ``other`` is no solver.
            ValueError: it has another prior, other options or samples of another kind.
        """
        self.check_alike(other)
        if other.samples == 0:
            return self
        self._outputs, self._labelled = other._outputs, other._labelled
        kept = None if self._kept is None or other._kept is None else [*self._kept, *other._kept]
        if other._folded is not None:
            self._fold_waiting()
            self._folded = other._folded if self._folded is None else self._folded.merge(other._folded)
        for rows in other._waiting:
            self._wait(rows)
        self._kept = kept
        self._trim()
        return self

    def subtract(self, other: HeadSolver) -> Self:
        """Remove all that ``other`` has seen, which must be a part of what this one has.

        The rows kept for leave-one-out are dropped: which of them remain is not known.

        Raises:
            TypeError, ValueError: as :meth:`merge`.
        """
        self.check_alike(other)
        if other.samples == 0:
            return self
        self._folded = self.statistics().subtract(other.statistics())
        self._waiting, self._kept = [], None
        return self

    def discount(self, factor: float) -> Self:
        """Multiply the weights of all samples seen so far, to forget old ones before new ones come.

        Args:
            factor: in (0, 1].

        Raises:
            ValueError: ``factor`` is not in (0, 1].
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            fail("factor", "a number in (0, 1]", describe(factor))

        def discounted(rows: Rows) -> Rows:
            return Rows(rows.features, rows.targets, rows.weight() * factor, rows.keys)

        if self._folded is not None:
            self._folded = self._folded.discount(factor)
        self._waiting = [discounted(rows) for rows in self._waiting]
        if self._kept is not None:
            self._kept = [discounted(rows) for rows in self._kept]
        return self

    def all_reduce(self, group: Any = None) -> Self:
        """Merge the solvers of all processes of a torch.distributed group; every process ends with the whole.

        Each contributes its state as an object, so that processes without samples take part too; sums are added in
        the order of the ranks, so that all processes hold the same bits.

        Raises:
            ValueError: torch.distributed is not initialised, or the solvers have different priors.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            fail("group", "an initialised torch.distributed process group", "none")
        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group=group)
        device = None if self._weight is None else self._weight.device
        whole = self._empty()
        for state in states:
            part = self._empty()
            part.load_state_dict(state, device=device)
            whole.merge(part)
        self.load_state_dict({**whole.state_dict(), "generator": self._generator.get_state()})
        return self

    def statistics(self) -> HeadStatistics:
        """The sums over all samples, p x p; at least one sample must have come."""
        self._check_any()
        self._fold_waiting()
        assert self._folded is not None
        return self._folded

    def solve(self, lam: float | str | Tensor = "loo", *, per_output: bool = False) -> tuple[Tensor, Tensor]:
        """The head of one penalty.

        Args:
            lam: the penalty, at least 0, inf for the prior as it is, one per output [c]; or "loo": the one of least
                leave-one-out loss among 50 from 1e-8 to 100 times the largest eigenvalue of the features' Gram matrix
                and infinity.
            per_output: choose one penalty for each output.

        Returns:
            Weight [c, p] and bias [c], float64.

        Raises:
            ValueError: no samples, or "loo" without rows or with fewer than two samples.
        """
        if isinstance(lam, str):
            if lam != "loo":
                fail("lam", "'loo' or a number of at least 0", describe(lam))
            path = self.path()
            return path.head(path.best(per_output=per_output))
        if not isinstance(lam, Tensor):
            return self._spectrum()[0].head(parse_penalties([lam])[0])
        spectrum = self._spectrum()[0]
        if list(lam.shape) not in ([], list(spectrum.target_mean.shape)):
            fail("lam", f"a number or shape [{len(spectrum.target_mean)}]", describe(lam))
        parse_penalties(lam.flatten().tolist())
        return spectrum.head(lam)

    def path(self, lams: Sequence[float] | Tensor | None = None, *, held_out: bool = True) -> HeadPath:
        """Losses, degrees of freedom and heads for a whole grid of penalties, from one eigendecomposition.

        Args:
            lams: penalties, at least 0, infinity allowed; the default grid (see :meth:`solve`) if left out.
            held_out: measure the leave-one-out loss, as said in the description of the class.

        Raises:
            ValueError: no samples; with ``held_out``, a single one, or rows that were not kept.
        """
        spectrum, scale = self._spectrum()
        grid = spectrum.default_lams() if lams is None else parse_penalties(lams)
        if not held_out:
            return HeadPath.of(spectrum, grid, None, "not measured", scale)
        if spectrum.samples < 2:
            fail("lam", "a number where there is one sample, nothing being left without it", "'loo'")
        how = "exact leave-one-out"
        if spectrum.basis is not None:
            rows = self._waiting[0]
        elif not self._kept:
            removed = "subtract has removed them" if self._kept is None else "keep_rows=0"
            fail("lam", "a number, or the rows that leave-one-out needs", f"'loo' and no rows ({removed})")
        else:
            rows = self._kept_rows()
            if len(rows) < spectrum.samples:
                how = f"leave-one-out of {len(rows)} random samples of {spectrum.samples}"
        assert self._outputs is not None
        targets = rows.dense_targets(self._outputs) * scale
        return HeadPath.of(spectrum, grid, leave_one_out(spectrum, grid.tolist(), rows, targets), how, scale)

    def without_prior(self, target_scale: float = 1.0) -> HeadSolver:
        """A solver of ordinary ridge regression on the same samples."""
        plain = HeadSolver(classes=self._outputs, target_scale=target_scale, keep_rows=self.keep_rows)
        plain.load_state_dict({**self.state_dict(), "prior_weight": None, "prior_bias": None})
        return plain

    def rows(self) -> Rows | None:
        """All samples, or None if not all of them are kept as rows."""
        parts = self._waiting if self._folded is None else self._kept
        return Rows.join(parts) if parts and sum(map(len, parts)) == self.samples else None

    def state_dict(self) -> dict[str, Any]:
        """All that was seen, as tensors and plain values; the prior is included for a check when it is loaded."""
        return {
            "format": _FORMAT,
            "prior_weight": self._weight,
            "prior_bias": self._bias,
            "outputs": self._outputs,
            "labelled": self._labelled,
            "folded": None if self._folded is None else vars(self._folded).copy(),
            "waiting": [vars(rows).copy() for rows in self._waiting],
            "kept": None if self._kept is None else [vars(rows).copy() for rows in self._kept],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str | None = None) -> None:
        """Take over what :meth:`state_dict` returned; the prior must be the same.

        Args:
            state: of a solver with the same prior.
            device: where to put its tensors; as they are if left out.

        Raises:
            ValueError: it is no such state, or of a solver with another prior.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            fail("state", f"what state_dict returned, format {_FORMAT}", describe(state))

        def move(entry: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(device) if isinstance(v, Tensor) and device is not None else v for k, v in entry.items()}

        prior = move({"weight": state["prior_weight"], "bias": state["prior_bias"]})
        if not (_equal(prior["weight"], self._weight) and _equal(prior["bias"], self._bias)):
            fail("state", "that of a solver with the same prior", "another prior")
        self._outputs, self._labelled = state["outputs"], state["labelled"]
        self._folded = None if state["folded"] is None else HeadStatistics(**move(state["folded"]))
        self._waiting = [Rows(**move(entry)) for entry in state["waiting"]]
        self._kept = None if state["kept"] is None else [Rows(**move(entry)) for entry in state["kept"]]
        self._generator.set_state(state["generator"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state, the prior and the options to a file."""
        options = {"classes": self.classes, "target_scale": self.target_scale, "keep_rows": self.keep_rows}
        checkpoint.save({"options": options, "state": self.state_dict()}, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> HeadSolver:
        """A solver from a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is another file, or damaged.
        """
        content = checkpoint.load(Path(path), device)
        if content is None:
            fail("path", "a file that save wrote", f"none at {path}", FileNotFoundError)
        state = content["state"]
        state["generator"] = state["generator"].cpu()
        solver = cls(state["prior_weight"], state["prior_bias"], **content["options"])
        solver.load_state_dict(state)
        return solver

    # How rows come in.

    def check(self, features: Any, targets: Any, weights: Any | None = None) -> Rows:
        """The rows that :meth:`update` would add, or its errors; NaN in features is found when they are added."""
        return parse_rows(features, targets, weights, self._format(), self._generator)

    def _format(self) -> Format:
        device = None
        features = None
        if self._waiting:
            features, device = self._waiting[0].features.shape[1], self._waiting[0].features.device
        elif self._folded is not None:
            features, device = len(self._folded.feature_mean), self._folded.gram.device
        elif self._weight is not None:
            features, device = self._weight.shape[1], self._weight.device
        return Format(features, self._outputs, self._labelled, device)

    def _add(self, rows: Rows) -> None:
        outputs = rows.targets.shape[1] if self._outputs is None else self._outputs
        statistics = None
        if len(rows) > rows.features.shape[1]:
            statistics = HeadStatistics.of(rows, outputs)  # refuses features that are not finite
        else:
            check_finite("features", rows.features)
        self._outputs, self._labelled = outputs, rows.labelled
        if statistics is not None:
            self._fold(statistics)
            rows = rows.clone() if self.keep_rows is None else rows.smallest(self.keep_rows)
        else:
            rows = rows.clone()
            self._wait(rows)
        if self._kept is not None and len(rows):
            self._kept.append(rows)
            self._trim()

    def _wait(self, rows: Rows) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) > rows.features.shape[1]:
            self._fold_waiting()

    def _fold(self, statistics: HeadStatistics) -> None:
        self._folded = statistics if self._folded is None else self._folded.merge(statistics)

    def _fold_waiting(self) -> None:
        if self._waiting:
            assert self._outputs is not None
            self._fold(HeadStatistics.of(Rows.join(self._waiting), self._outputs))
            self._waiting = []

    def _trim(self) -> None:
        """Keep the rows of the smallest keys, looking only when there are twice as many as wanted."""
        if self._kept is None or self.keep_rows is None:
            return
        if sum(map(len, self._kept)) > 2 * self.keep_rows:
            self._kept = [Rows.join(self._kept).smallest(self.keep_rows)] if self.keep_rows else []

    def _kept_rows(self) -> Rows:
        rows = Rows.join(self._kept or [])
        self._kept = [rows if self.keep_rows is None else rows.smallest(self.keep_rows)]
        return self._kept[0]

    # How a solution comes out.

    def _spectrum(self) -> tuple[Spectrum, float]:
        """The spectrum for the scaled targets, and their scale."""
        scale = self.fitted_scale()
        assert self._outputs is not None
        if self._folded is None:
            rows = self._waiting[0]
            return Spectrum.of_rows(rows, rows.dense_targets(self._outputs) * scale, self.prior(rows.features)), scale
        statistics = self.statistics().scaled(scale)
        return Spectrum.of_statistics(statistics, self.prior(statistics.gram)), scale

    def fitted_scale(self) -> float:
        """The factor of the targets, see ``target_scale``; at least one sample must have come."""
        self._check_any()
        assert self._outputs is not None
        if self._folded is None:
            rows = Rows.join(self._waiting)
            self._waiting = [rows]
            prior = self.prior(rows.features)
            return self.scale(lambda: row_spread(rows, rows.dense_targets(self._outputs or 0), prior.weight))
        return self.scale(lambda: self.statistics().spread(self.prior(self.statistics().gram).weight))

    def scale(self, spread: Callable[[], Spread]) -> float:
        """The factor of the targets; ``spread`` is called if it has to be fitted."""
        if self.target_scale != "auto":
            return float(self.target_scale)
        if not self._labelled or self._weight is None:
            return 1.0
        outputs, targets = spread()
        return math.sqrt(float(outputs) / float(targets)) if outputs > 0 and targets > 0 else 1.0

    def prior(self, like: Tensor) -> Prior:
        """The prior head, zeros if there is none, for features or a Gram matrix like these."""
        if self._weight is not None:
            return Prior(self._weight, self._bias)
        return Prior(like.new_zeros(self._outputs or 0, like.shape[1], dtype=torch.float64), None)

    def prior_outputs(self, rows: Rows) -> Tensor:
        """What the prior head puts out for rows, [N, c] float64."""
        prior = self.prior(rows.features)
        outputs = rows.features.double() @ prior.weight.mT
        return outputs if prior.bias is None else outputs + prior.bias

    def _check_any(self) -> None:
        if self.samples == 0:
            fail("features", "at least one sample before a head is solved for", "none")
        weight = 0.0 if self._folded is None else float(self._folded.weight)
        if not weight + sum(float(rows.weight().sum()) for rows in self._waiting) > 0:
            fail("weights", "a positive sum", "0")

    def check_alike(self, other: Any) -> None:
        """Raise unless ``other`` has the same prior, options and kind of samples, and can be merged."""
        if not isinstance(other, HeadSolver):
            fail("other", "a HeadSolver", describe(other), TypeError)
        if not (_equal(self._weight, other._weight) and _equal(self._bias, other._bias)):
            fail("other", "a HeadSolver with the same prior", "one with another")
        for name in ("target_scale", "keep_rows"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                fail("other", f"a HeadSolver with {name}={mine}", f"one with {its}")
        if other.samples and self.samples:
            mine, its = self._format(), other._format()
            for name in Format._fields:
                if getattr(mine, name) != getattr(its, name):
                    fail("other", f"samples with {name} {getattr(mine, name)}", f"{getattr(its, name)}")

    def _empty(self) -> HeadSolver:
        options: dict[str, Any] = {"target_scale": self.target_scale, "keep_rows": self.keep_rows}
        return HeadSolver(self._weight, self._bias, classes=self.classes, **options)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
