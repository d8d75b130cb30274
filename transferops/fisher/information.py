"""The Fisher information of a network, and what is asked of it: never a d x d matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.collect import Collector, Dense, Diagonal, Kronecker, Scores, Trace, zeros
from transferops.fisher.directions import (
    Direction,
    Selection,
    check_direction,
    check_directions,
    check_finite,
    moved_by,
    select,
    stack,
)
from transferops.fisher.exact import push_forward
from transferops.fisher.fallback import pull_back
from transferops.fisher.likelihood import ESTIMATORS, LOSSES, Likelihood
from transferops.fisher.modes import evaluation, gradients_for
from transferops.fisher.routes import kronecker_weights, plan
from transferops.fisher.spectrum import EffectiveDimension, lanczos_quadrature, shrinkage
from transferops.fisher.sweep import Sweeper

_BLOCK_ELEMENTS = 4096  # 128 MiB as a float64 matrix


class FisherInformation:
    """The Fisher information J of a model at its current parameters, averaged over samples.

    With z_n = f(x_n) the outputs, J_n = dz_n/dtheta, l_n the log-likelihood of a sample and g_n its gradient:

    - "exact": (1/N) sum_n J_n^T H_n J_n with H_n the expected curvature of -l_n; H_n = diag p_n - p_n p_n^T with
      p_n = softmax(z_n) for "cross_entropy", the identity for "mse". No labels enter. This is also the
      generalised Gauss-Newton matrix.
    - "empirical": (1/N) sum_n g_n g_n^T with the targets of the data.
    - "monte_carlo": the same with targets drawn from the model; its expectation is the exact one.

    Outputs are [N, C], or [N, T, C] with one prediction per position; the log-likelihood of a sample is then the
    sum over its positions, targets being [N, T]. Positions with target -100 do not count, for every estimator if
    targets are given. "mse" is a Gaussian of unit variance, l_n = -|y_n - z_n|^2 / 2.

    J is over the parameters that require a gradient, or those of them that ``parameters`` picks. The model is read
    when a method is called and never changed: for the duration every module is in evaluation mode (dropout off,
    batch-norm statistics fixed), after it each has its own mode again. Forward hooks run; compiled modules run
    uncompiled. Parts that compute under ``torch.no_grad`` contribute no derivative.

    How the derivatives are taken is chosen parameter by parameter, see :meth:`explain`. The choice is checked
    against autograd on one or two samples whenever samples of a new shape are seen: from a model in which samples
    depend on each other nothing is computed.

    Batches are an iterable of inputs [N, ...], of (inputs, targets, ...), where inputs may be a mapping of keyword
    arguments for the model, or of such mappings with the targets under "labels". The model returns a tensor or an
    object with a tensor ``logits``.

    Args:
        model: a module on any device, in any floating-point precision.
        estimator: "exact", "monte_carlo" or "empirical".
        loss: "cross_entropy" or "mse".
        chunk_size: how many directions are differentiated forwards at once, and how many samples have their
            gradients in memory at once where that is needed; chosen if None. 1 is a plain loop over directions,
            which also serves models that ``torch.vmap`` refuses.
        parameters: which of the trainable parameters J is over: a predicate on names, or the names. All if None.
        draws: how many targets per sample "monte_carlo" draws; each costs a backward pass.
        seed: of these draws. Every method starts from it, so that calls repeat.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an option is not one of the above.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: str = "exact",
        loss: str = "cross_entropy",
        chunk_size: int | None = None,
        *,
        parameters: Selection = None,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            fail("model", "a torch.nn.Module", describe(model), TypeError)
        for argument, value, accepted in (("estimator", estimator, ESTIMATORS), ("loss", loss, LOSSES)):
            if value not in accepted:
                fail(argument, " or ".join(repr(a) for a in accepted), describe(value))
        if chunk_size is not None:
            check_positive_int("chunk_size", chunk_size)
        self.model = model
        self.estimator = estimator
        self.loss = loss
        self.chunk_size = chunk_size
        self.parameters = parameters
        self.draws = check_positive_int("draws", draws)
        self.seed = check_positive_int("seed", seed, minimum=0)
        self._sweeper = Sweeper(model, chunk_size)

    def gram(self, directions: Sequence[Mapping[str, torch.Tensor]], batches: Iterable[Any]) -> torch.Tensor:
        """A = Theta^T J Theta for K directions at once [derived].

        Exact: K forward-mode derivatives of the outputs per batch, nothing being kept for a backward pass;
        scaled dot-product attention runs on its plain (math) backend. Otherwise the scores g_n . delta_k from one
        forward pass and one backward pass through activations, summed over layers before their outer product.
        Scores and derivatives are taken in the model's own precision, products summed in float64.

        Args:
            directions: delta_k, K dictionaries from parameter name to a floating-point tensor of the
                parameter's shape, on its device; a parameter left out does not move. Either name of a tied
                parameter will do. Unless ``parameters`` was given, frozen parameters may move, too. See
                :func:`parameter_differences`.
            batches: see the class.

        Returns:
            A, float64 [K, K] on the CPU, symmetric.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has the wrong shape, names, device or values, there is no sample, or the
                outputs have the wrong shape, are not finite, or depend on other samples of the batch.
        """
        _check_batches(batches)
        with evaluation(self.model):
            movable = self._movable()
            checked = check_directions(directions, self.model, movable)
            moved = moved_by(checked, movable)
            total = torch.zeros((len(directions), len(directions)), dtype=torch.float64)
            if self.estimator == "exact":
                tangents = {name: stack(checked, name, p) for name, p in moved.items()}
                likelihood, samples = self._likelihood(), 0
                for batch in self._parse(batches):
                    outputs, derivatives = push_forward(self.model, tangents, batch, self.chunk_size)
                    total += likelihood.gram(batch, outputs, derivatives).cpu()
                    samples += batch.samples
            else:
                samples = self._collect(moved, batches, Scores(checked, moved, total))
            check_finite([total], {f"directions[{k}]": d for k, d in enumerate(checked)})
            return (total + total.T) / (2 * samples)

    def quadratic(self, direction: Mapping[str, torch.Tensor], batches: Iterable[Any]) -> float:
        """delta^T J delta, the Gram matrix of one direction; see :meth:`gram`."""
        return float(self.gram([direction], batches))

    def diagonal(self, batches: Iterable[Any]) -> Direction:
        """The diagonal of J, (1/N) sum_n g_n^2 elementwise.

        One forward and one backward pass through activations per batch, in which no per-sample gradient of a
        captured layer is in memory. "monte_carlo" takes a backward pass per draw; "exact" one per output of a
        sample, with the columns of a square root of H_n as output gradients: C times the empirical cost.

        Args:
            batches: see the class.

        Returns:
            Name to a tensor of the parameter's shape, on its device, in at least float32, in which the sum over
            samples is kept, too.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        _check_batches(batches)
        with evaluation(self.model):
            parameters, collector = self._selected(), Diagonal()
            samples = self._collect(parameters, batches, collector)
            result = collector.result(parameters)
            check_finite(result.values(), {})
            return {name: value.div_(samples) for name, value in result.items()}

    def trace(self, batches: Iterable[Any]) -> float:
        """tr J = (1/N) sum_n |g_n|^2, from per-sample norms; cost and errors as :meth:`diagonal`."""
        _check_batches(batches)
        with evaluation(self.model):
            collector = Trace()
            samples = self._collect(self._selected(), batches, collector)
            check_finite([torch.tensor(collector.result)], {})
            return collector.result / samples

    def matvec(self, direction: Mapping[str, torch.Tensor], batches: Iterable[Any]) -> Direction:
        """J v.

        Exact: a forward-mode derivative, then J_n^T H_n (J_n v) by a backward pass. Otherwise the scores
        g_n . v, then a backward pass in which they weigh the samples.

        Args:
            direction: v, as a direction of :meth:`gram`, over selected parameters.
            batches: see the class.

        Returns:
            Name to a tensor of the parameter's shape, dtype (at least float32) and device.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        _check_batches(batches)
        with evaluation(self.model):
            parameters = self._selected()
            vector = check_direction("direction", direction, self.model, parameters)
            if not vector:
                fail("direction", "at least one parameter to move", "an empty dictionary")
            result = {name: zeros(p) for name, p in parameters.items()}
            likelihood, samples = self._likelihood(), 0
            for batch in self._parse(batches):
                cotangent = self._response(parameters, vector, batch, likelihood)
                for name, value in pull_back(self.model, parameters, batch, cotangent).items():
                    result[name] += value
                samples += batch.samples
            check_finite(result.values(), {"direction": vector})
            return {name: value.div_(samples) for name, value in result.items()}

    def block(self, name: str, batches: Iterable[Any]) -> torch.Tensor:
        """The block of J of one parameter, as a matrix over its elements in row-major order.

        Args:
            name: of a selected parameter with at most 4096 elements.
            batches: see the class.

        Returns:
            float64 [P, P] on the CPU, symmetric; P is the number of elements.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or the parameter is not selected or larger.
        """
        _check_batches(batches)
        with evaluation(self.model):
            selected = self._selected()
            if name not in selected:
                fail("name", "the name of a selected parameter", describe(name))
            size = selected[name].numel()
            if size > _BLOCK_ELEMENTS:
                fail("name", f"a parameter of at most {_BLOCK_ELEMENTS} elements", f"{name!r} of {size}")
            return self._matrix({name: selected[name]}, batches)

    def kfac(self, batches: Iterable[Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Kronecker factors of the weights of all linear layers and convolutions.

        With a_nt the inputs (patches, for a convolution) and b_nt the output gradients at position t,
        A = (1/N) sum_n mean_t a_nt a_nt^T and G = (1/N) sum_n sum_t b_nt b_nt^T: G (x) A approximates the block of
        the weight, flattened by rows. Martens and Grosse (2015) for a single position; the "expand" form of
        Eschenhagen et al. (2023) for several, which for convolutions is that of Grosse and Martens (2016).

        Args:
            batches: see the class.

        Returns:
            Name of the weight to (A [I, I], G [O, O]), in at least float32. Other parameters are not in it.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, no parameter is selected, or one of these weights has no such factors:
                it is tied or used outside its layer, or its convolution has groups. ``parameters`` can leave it out.
        """
        _check_batches(batches)
        with evaluation(self.model):
            selected, collector = self._selected(), Kronecker()
            weights = kronecker_weights(self.model, selected)
            samples = self._collect(weights, batches, collector) if weights else 1
            missing = [name for name in weights if name not in collector.inputs]
            if missing:
                fail("model", f"{missing[0]!r} to be used by its layer only", "a weight without Kronecker factors")
            check_finite([*collector.inputs.values(), *collector.grads.values()], {})
            return {n: (collector.inputs[n] / samples, collector.grads[n] / samples) for n in weights}

    def effective_dimension(
        self, damping: float, batches: Iterable[Any], *, probes: int = 8, steps: int = 32
    ) -> EffectiveDimension:
        """d_eff = tr(J (J + lambda I)^-1), between 0 and the rank of J.

        Exact, from the eigenvalues of J, for at most 4096 selected elements; otherwise estimated from ``probes``
        random vectors by Lanczos quadrature, at a cost of ``probes * steps`` calls of :meth:`matvec` and with
        ``steps`` vectors over the parameters in memory.

        Args:
            damping: lambda, positive.
            batches: see the class; read repeatedly and the same each time. A one-time iterator is kept in a list.
            probes: random vectors, at least 2.
            steps: Lanczos steps for each.

        Returns:
            :class:`EffectiveDimension`: value, standard error (0 if exact) and method.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, no parameter is selected, or an option is out of range.
        """
        _check_batches(batches)
        if not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
            fail("damping", "a positive number", describe(damping))
        check_positive_int("probes", probes, minimum=2)
        check_positive_int("steps", steps)
        selected = self._selected()
        if sum(p.numel() for p in selected.values()) <= _BLOCK_ELEMENTS:
            with evaluation(self.model):
                return EffectiveDimension(shrinkage(self._matrix(selected, batches), damping), 0.0, "parameters")
        repeatable = list(batches) if isinstance(batches, Iterator) else batches
        return lanczos_quadrature(lambda v: self.matvec(v, repeatable), selected, damping, probes, steps, self.seed)

    def explain(self, batch: Any = None) -> str:
        """A table of every selected parameter, its route, and why.

        - "captured": the layer's inputs and output gradients are kept from one forward and one backward pass through
          activations, and a formula of its type does the rest; no per-sample gradient is in memory.
        - "copies": every sample gets its own copy of the parameter, of which the gradient is per sample.
        - "per sample": a further forward and backward pass under ``torch.func``, a chunk of samples at a time.

        The exact estimator uses them for all but ``gram``, ``quadratic`` and ``matvec``, which take forward-mode
        derivatives.

        Args:
            batch: one batch, as the iterables of the other methods yield it. What a model does with its parts
                can be seen only by running it: without a batch, the table tells what its make-up suggests.

        Raises:
            TypeError: the batch has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        with evaluation(self.model):
            selected = self._selected()
            if batch is None:
                routes = plan(self.model, selected)
            else:
                with gradients_for(self.model, ()):
                    routes = self._sweeper.routes(selected, Batch.parse(0, batch, self._device()))
            rows = [("parameter", "route", "why"), *routes.table(selected)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)

    def _response(self, parameters: Direction, vector: Direction, batch: Batch, likelihood: Likelihood) -> torch.Tensor:
        """The cotangent of the outputs that pulled back is N J v."""
        if self.estimator == "exact":
            tangents = {name: stack([vector], name, parameters[name]) for name in vector}
            outputs, derivatives = push_forward(self.model, tangents, batch, 1)
            return likelihood.curvature(batch, outputs, derivatives[0])
        moved = moved_by([vector], parameters)
        collector = Scores([vector], moved, torch.zeros((1, 1), dtype=torch.float64))
        weighted = []
        with gradients_for(self.model, ()):
            for cotangent in self._sweeper.sweeps(moved, batch, likelihood, collector):
                scores = collector.scores.view(-1, *[1] * (cotangent.dim() - 1))
                weighted.append(cotangent * scores.to(cotangent.dtype))
        return torch.stack(weighted).sum(0)

    def _collect(self, parameters: Direction, batches: Iterable[Any], collector: Collector) -> int:
        """Run the collector over all batches; the number of samples."""
        likelihood, samples = self._likelihood(), 0
        with gradients_for(self.model, ()):
            for batch in self._parse(batches):
                for _ in self._sweeper.sweeps(parameters, batch, likelihood, collector):
                    pass
                samples += batch.samples
        return samples

    def _matrix(self, parameters: Direction, batches: Iterable[Any]) -> torch.Tensor:
        collector = Dense(parameters)
        samples = self._collect(parameters, batches, collector)
        check_finite([collector.result], {})
        return collector.result / samples

    def _parse(self, batches: Iterable[Any]) -> Iterator[Batch]:
        device, i = self._device(), -1
        for i, batch in enumerate(batches):
            yield Batch.parse(i, batch, device)
        if i < 0:
            fail("batches", "at least one sample", "none")

    def _likelihood(self) -> Likelihood:
        return Likelihood(self.estimator, self.loss, self.draws, self.seed)

    def _movable(self) -> Direction:
        if self.parameters is not None:
            return self._selected()
        movable = {name: p.detach() for name, p in self.model.named_parameters()}
        if not movable:
            fail("model", "a module with parameters", "one without")
        return movable

    def _selected(self) -> Direction:
        return select(self.model, self.parameters)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _check_batches(batches: Any) -> None:
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        fail("batches", "an iterable of batches, such as [inputs]", describe(batches), TypeError)
