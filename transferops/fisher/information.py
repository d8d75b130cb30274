"""The Fisher information of a network, and what is asked of it: never a d x d matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.accumulate import Accumulator, evaluate
from transferops.fisher.directions import Direction, GivenDirection, Selection
from transferops.fisher.estimation import Estimation
from transferops.fisher.quantities import Block, Diagonal, Factors, Gram, Kronecker, Product, Trace
from transferops.fisher.routes import plan
from transferops.fisher.spectrum import EffectiveDimension, effective_dimension


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
    batch-norm statistics fixed), after it each has its own mode again. Forward hooks run. Parts that compute under
    ``torch.no_grad`` contribute no derivative. A compiled model (``torch.compile``) runs uncompiled, one wrapped in
    DistributedDataParallel without synchronisation, each under the names that its parameters have there.

    How the derivatives are taken is chosen parameter by parameter, see :meth:`explain`. The choice is checked
    against autograd on one or two samples whenever samples of a new shape are seen: from a model in which samples
    depend on each other, or of which the outputs are random, nothing is computed.

    Batches are an iterable of inputs [N, ...], of (inputs, targets, ...), where inputs may be a mapping of keyword
    arguments for the model, or of such mappings with the targets under "labels". The model returns a tensor or an
    object with a tensor ``logits``.

    Args:
        model: a module on any device, in any floating-point precision.
        estimator: "exact", "monte_carlo" or "empirical".
        loss: "cross_entropy" or "mse".
        chunk_size: how many directions are differentiated forwards at once (5 if None), and how many samples have
            their gradients in memory at once where that is needed (chosen if None). Models that ``torch.vmap``
            refuses have it 1, a plain loop.
        parameters: which of the trainable parameters J is over: a predicate on names, or the names. All if None.
        draws: how many targets per sample "monte_carlo" draws; each costs a backward pass.
        seed: of these draws. Every method starts from it, so that calls repeat.
        dtype: torch.float32 or torch.float64, in which results by parameter (``diagonal``, ``matvec``, ``kfac``) and
            their sums over samples are kept; the parameter's if None, at least float32. Those of a batch are formed in
            the model's precision. What is returned as numbers or K x K is float64 in any case.
        device: where those results and sums are kept, "cpu" for instance to leave a GPU's memory to the model; the
            parameter's if None. The model stays where it is, and batches are brought to it.
        autocast: torch.float16 or torch.bfloat16, under which the model runs (:class:`torch.autocast`); what is in
            force outside if None.
        cuda_graphs: whether, on a GPU, the exact ``gram`` of batches of one shape is recorded as a CUDA graph and
            replayed, see :mod:`transferops.fisher.graphs`. It takes the memory of all K directions and of a step for as
            long as this object lives. What the model does in Python, hooks included, it does while it is recorded only:
            it must not depend on values, nor on anything but modules, parameters and buffers that changes later.

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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self._estimation = Estimation(
            model, estimator, loss, chunk_size, parameters, draws, seed, dtype, device, autocast, cuda_graphs
        )
        self.model = model
        self.estimator = estimator
        self.loss = loss

    @property
    def parameters(self) -> Direction:
        """The parameters that J is over, by name, detached; flat vectors and matrices have them in this order.

        Raises:
            ValueError: none is selected.
        """
        return self._estimation.selected()

    @overload
    def accumulate(self, quantity: Literal["gram"], what: Sequence[GivenDirection] | Tensor) -> Accumulator[Tensor]: ...
    @overload
    def accumulate(self, quantity: Literal["diagonal"]) -> Accumulator[Direction]: ...
    @overload
    def accumulate(self, quantity: Literal["trace"]) -> Accumulator[float]: ...
    @overload
    def accumulate(self, quantity: Literal["matvec"], what: GivenDirection) -> Accumulator[Direction]: ...
    @overload
    def accumulate(self, quantity: Literal["block"], what: str) -> Accumulator[Tensor]: ...
    @overload
    def accumulate(self, quantity: Literal["kfac"]) -> Accumulator[Factors]: ...

    def accumulate(self, quantity: str, what: Any = None) -> Accumulator[Any]:
        """A quantity of samples that come in parts, or are divided over processes.

        ``fisher.accumulate("diagonal").update(share).all_reduce().compute()`` is, in every process, the
        ``diagonal`` of all shares together.

        Args:
            quantity: the method of this name, called once all samples have been seen.
            what: its argument other than the batches: directions of "gram", direction of "matvec", name of "block".

        Returns:
            An accumulator with ``update(batches)``, ``merge(other)``, ``all_reduce(group)`` and ``compute()``.

        Raises:
            TypeError: ``what`` has the wrong type.
            ValueError: ``quantity`` is none of these, or as the method.
        """
        inner = self._estimation
        with self._estimation.passes():
            if quantity == "gram":
                return Gram(inner, inner.directions(what))
            if quantity == "matvec":
                return Product(inner, inner.direction(what))
            if quantity == "block":
                return Block.of(inner, what)
            simple: dict[str, Callable[[Estimation], Accumulator[Any]]]
            simple = {"diagonal": Diagonal, "trace": Trace, "kfac": Kronecker}
            if quantity not in simple:
                fail("quantity", "'gram', 'diagonal', 'trace', 'matvec', 'block' or 'kfac'", describe(quantity))
            if what is not None:
                fail("what", f"nothing, {quantity!r} having no argument", describe(what))
            return simple[quantity](inner)

    def gram(self, directions: Sequence[GivenDirection] | Tensor, batches: Iterable[Any]) -> Tensor:
        """A = Theta^T J Theta for K directions at once [derived].

        Exact: K forward-mode derivatives of the outputs per batch, nothing being kept for a backward pass;
        scaled dot-product attention runs on its plain (math) backend. Models without forward-mode derivatives take a
        backward pass for each output of a sample instead. Otherwise the scores g_n . delta_k from one
        forward pass and one backward pass through activations, summed over layers before their outer product.
        Scores and derivatives are taken in the model's own precision, products summed in float64.

        Args:
            directions: delta_k, each one of:

                - a dictionary from parameter name to a floating-point tensor of the parameter's shape, or to a
                  :class:`LowRank` product; a parameter left out does not move. Either name of a tied parameter will
                  do. Unless ``parameters`` was given, frozen parameters may move, too. See
                  :func:`parameter_differences`.
                - a module: the difference of its parameters to the model's, over the selected ones, formed one
                  parameter at a time.
                - a flat vector over the selected parameters, in the model's order; K of them may be a [K, P] tensor.

                Tensors may be of any floating-point precision, on the parameter's device or on the CPU, from where
                they are brought to the device one parameter at a time. Products are contracted factor by factor
                where linear layers use their weights in the plain way, and formed one parameter at a time elsewhere.
            batches: see the class.

        Returns:
            A, float64 [K, K] on the CPU, symmetric.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has the wrong shape, names, device or values, there is no sample, or the
                outputs have the wrong shape, are not finite, or depend on other samples of the batch.
        """
        return evaluate(self._estimation, lambda inner: Gram(inner, inner.directions(directions)), batches)

    def quadratic(self, direction: GivenDirection, batches: Iterable[Any]) -> float:
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
            Name to a tensor of the parameter's shape; ``dtype`` and ``device`` as of the class.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        return evaluate(self._estimation, Diagonal, batches)

    def trace(self, batches: Iterable[Any]) -> float:
        """tr J = (1/N) sum_n |g_n|^2, from per-sample norms; cost and errors as :meth:`diagonal`."""
        return evaluate(self._estimation, Trace, batches)

    def matvec(self, direction: GivenDirection, batches: Iterable[Any]) -> Direction:
        """J v.

        Exact: a forward-mode derivative, then J_n^T H_n (J_n v) by a backward pass. Otherwise the scores
        g_n . v, then a backward pass in which they weigh the samples.

        Args:
            direction: v, as a direction of :meth:`gram`, over selected parameters.
            batches: see the class.

        Returns:
            Name to a tensor of the parameter's shape; ``dtype`` and ``device`` as of the class.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        return evaluate(self._estimation, lambda inner: Product(inner, inner.direction(direction)), batches)

    def block(self, name: str, batches: Iterable[Any]) -> Tensor:
        """The block of J of one parameter or one layer, as a matrix over its elements.

        Args:
            name: of a selected parameter, or of a module whose selected parameters are taken side by side, in the
                model's order, each in row-major order; at most 4096 elements.
            batches: see the class.

        Returns:
            float64 [P, P] on the CPU, symmetric; P is the number of elements.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, or nothing of this name is selected, or more elements are.
        """
        return evaluate(self._estimation, lambda inner: Block.of(inner, name), batches)

    def kfac(self, batches: Iterable[Any]) -> Factors:
        """Kronecker factors of the weights of all linear layers and convolutions.

        With a_nt the inputs (patches, for a convolution) and b_nt the output gradients at position t,
        A = (1/N) sum_n mean_t a_nt a_nt^T and G = (1/N) sum_n sum_t b_nt b_nt^T: G (x) A approximates the block of
        the weight, flattened by rows. Martens and Grosse (2015) for a single position; the "expand" form of
        Eschenhagen et al. (2023) for several, which for convolutions is that of Grosse and Martens (2016).

        Args:
            batches: see the class.

        Returns:
            Name of the weight to (A [I, I], G [O, O]); ``dtype`` and ``device`` as of the class. Other parameters are
            not in it.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in :meth:`gram`, no parameter is selected, or one of these weights has no such factors:
                it is tied or used outside its layer, or its convolution has groups. ``parameters`` can leave it out.
        """
        return evaluate(self._estimation, Kronecker, batches)

    def effective_dimension(
        self, damping: float, batches: Iterable[Any], *, probes: int = 8, steps: int = 32
    ) -> EffectiveDimension:
        """d_eff = tr(J (J + lambda I)^-1), between 0 and the rank of J.

        J is R^T R / N with R the gradient rows: one per sample ("monte_carlo": per draw; "exact": per output of a
        sample). Exact, from eigenvalues, if there are at most 4096 rows, or as many selected elements: of the Gram
        matrix of the rows or of J, the smaller. Otherwise, or if the rows of some weight (other than that of a
        linear layer without positions) would take more than 1 GiB, estimated from ``probes`` random vectors by
        Lanczos quadrature, at a cost of ``probes * steps`` calls of :meth:`matvec` and with ``steps`` vectors over
        the parameters in memory.

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
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            fail("batches", "an iterable of batches, such as [inputs]", describe(batches), TypeError)
        if not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
            fail("damping", "a positive number", describe(damping))
        check_positive_int("probes", probes, minimum=2)
        check_positive_int("steps", steps)
        repeatable = list(batches) if isinstance(batches, Iterator) else batches
        return effective_dimension(self._estimation, damping, repeatable, probes, steps)

    def explain(self, batch: Any = None) -> str:
        """A table of every selected parameter, its route, and why.

        - "captured": the layer's inputs and output gradients are kept from one forward and one backward pass through
          activations, and a formula of its type does the rest; no per-sample gradient is in memory.
        - "copies": every sample gets its own copy of a parameter that broadcasts; its gradient is per sample.
        - "per sample": a further forward and backward pass under ``torch.func``, a chunk of samples at a time.

        The exact estimator uses them for all but ``gram``, ``quadratic`` and ``matvec``, which take forward-mode
        derivatives; of a model that has none, or others than its backward pass, a backward pass per output.
        With ``cuda_graphs`` a last line says how many shapes are recorded, or why none is.

        Args:
            batch: one batch, as the iterables of the other methods yield it. What a model does with its parts
                can be seen only by running it: without a batch, the table tells what its make-up suggests.

        Raises:
            TypeError: the batch has the wrong type.
            ValueError: as in :meth:`gram`, or no parameter is selected.
        """
        with self._estimation.passes():
            selected = self._estimation.selected()
            if batch is None:
                routes = plan(self.model, selected)
            else:
                (parsed,) = self._estimation.batches([batch])
                routes = self._estimation.routes(selected, parsed)
            rows = [("parameter", "route", "why"), *routes.table(selected)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        graphs = [] if self._estimation.graphs is None else [self._estimation.graphs.sentence()]
        return "\n".join([*(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows), *graphs])
