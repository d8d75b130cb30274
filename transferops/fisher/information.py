"""The Fisher information of a network as a quadratic form: A = Theta^T J Theta for K directions at once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.contraction import softmax_fisher_gram, tangent_gram
from transferops.fisher.directions import Direction

_CONTRACTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": softmax_fisher_gram,
    "mse": lambda _, tangents: tangent_gram(tangents),
}
_ESTIMATORS = ("exact",)


class FisherInformation:
    """The Fisher information J of a model at its current parameters.

    With z_n = f(x_n) the outputs and J_n = dz_n/dtheta, the exact Fisher information, which for these
    losses is the generalised Gauss-Newton matrix, is

    - "cross_entropy": (1/N) sum_n J_n^T (diag p_n - p_n p_n^T) J_n with p_n = softmax(z_n);
    - "mse": (1/N) sum_n J_n^T J_n, the likelihood being Gaussian of unit variance.

    No labels enter. The model is read when :meth:`gram` is called and never changed: for the duration every
    module is in evaluation mode (dropout off, batch-norm statistics fixed), after it each has its own mode
    again. Forward hooks run. Parts that compute under ``torch.no_grad`` contribute no derivative.

    Args:
        model: a module that maps a batch to outputs [N, C], on any device, in any floating-point precision.
        estimator: "exact".
        loss: "cross_entropy" or "mse".
        chunk_size: how many directions are differentiated at once, their activations being in memory
            together; all of them if None. 1 is a plain loop, which also serves models that ``torch.vmap``
            refuses.

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
    ) -> None:
        if not isinstance(model, nn.Module):
            fail("model", "a torch.nn.Module", describe(model), TypeError)
        for argument, value, accepted in (
            ("estimator", estimator, _ESTIMATORS),
            ("loss", loss, tuple(_CONTRACTIONS)),
        ):
            if value not in accepted:
                fail(argument, " or ".join(repr(a) for a in accepted), describe(value))
        if chunk_size is not None:
            check_positive_int("chunk_size", chunk_size)
        self.model = model
        self.estimator = estimator
        self.loss = loss
        self.chunk_size = chunk_size

    def gram(self, directions: Sequence[Mapping[str, torch.Tensor]], batches: Iterable[Any]) -> torch.Tensor:
        """A = Theta^T J Theta, averaged over samples, by K forward-mode derivatives per batch [derived].

        The outputs' derivatives are taken in the model's own precision and contracted in float64; nothing
        is kept for a backward pass. Scaled dot-product attention runs on its plain (math) backend, the
        fused ones having no forward-mode derivative.

        Args:
            directions: delta_k, K dictionaries from parameter name to a floating-point tensor of the
                parameter's shape, on its device; a parameter left out does not move. Either name of a tied
                parameter will do. See :func:`parameter_differences`.
            batches: an iterable of inputs [N, ...] or of (inputs, targets, ...), of which only the inputs
                are used. They are moved to the device of the model's first parameter.

        Returns:
            A, float64 [K, K] on the CPU, symmetric.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has the wrong shape, names, device or values, there is no sample, or the
                outputs are not [N, C].
        """
        if isinstance(batches, torch.Tensor):
            fail("batches", "an iterable of batches, such as [inputs]", describe(batches), TypeError)
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        if not parameters:
            fail("model", "a module with parameters", "one without")
        checked = _check_directions(directions, self.model, parameters)
        count = len(directions)
        device = next(iter(parameters.values())).device

        samples = 0
        with _differentiable_evaluation(self.model):
            tangents = _stack(checked, parameters)
            total = torch.zeros((count, count), dtype=torch.float64)
            for i, batch in enumerate(batches):
                inputs = _inputs(i, batch).to(device)
                outputs, derivatives = self._push_forward(parameters, tangents, inputs, count)
                total += _CONTRACTIONS[self.loss](outputs, derivatives).cpu()
                samples += len(inputs)
        if samples == 0:
            fail("batches", "at least one sample", "none")
        if not total.isfinite().all():
            fail("model", "finite outputs and derivatives", "infinities or NaN among them")
        return (total + total.T) / (2 * samples)

    def _push_forward(
        self, parameters: Direction, tangents: Direction, inputs: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [N, C] and their derivatives along each direction, [K, N, C]."""
        fixed = {name: p for name, p in parameters.items() if name not in tangents}

        def outputs(moving: Direction) -> torch.Tensor:
            result = functional_call(self.model, {**fixed, **moving}, (inputs,))
            return _check_outputs(result, len(inputs))

        moving = {name: parameters[name] for name in tangents}

        def push(tangent: Direction) -> tuple[torch.Tensor, torch.Tensor]:
            value, derivative, *_ = jvp(outputs, (moving,), (tangent,))
            return value, derivative

        if self.chunk_size == 1 or count == 1:
            pairs = [push({name: t[k] for name, t in tangents.items()}) for k in range(count)]
            return pairs[0][0], torch.stack([derivative for _, derivative in pairs])
        values, derivatives = vmap(push, chunk_size=self.chunk_size)(tangents)
        return values[0], derivatives


@contextlib.contextmanager
def _differentiable_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with every operation differentiable forwards; the modes are restored module by module.

    The flags are set directly: ``eval()`` may be overridden, to merge adapters for instance.
    """
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in modes:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            warnings.catch_warnings(),
        ):
            # PyTorch scripts its own forward-mode rules on first use; the warning's class varies by version.
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training


def _check_directions(
    directions: Sequence[Mapping[str, torch.Tensor]], model: nn.Module, parameters: Direction
) -> list[Direction]:
    """The directions under the first name of each parameter."""
    if isinstance(directions, (Mapping, torch.Tensor, str)) or not isinstance(directions, Sequence):
        fail(
            "directions",
            "a list of dictionaries from parameter name to tensor",
            describe(directions),
            TypeError,
        )
    if not directions:
        fail("directions", "at least one direction", "none")
    first_name = {id(p): name for name, p in model.named_parameters()}
    canonical = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    checked: list[Direction] = []
    for k, direction in enumerate(directions):
        argument = f"directions[{k}]"
        if not isinstance(direction, Mapping):
            fail(argument, "a dictionary from parameter name to tensor", describe(direction), TypeError)
        renamed: Direction = {}
        for name, value in direction.items():
            if name not in canonical:
                fail(argument, "names of the model's parameters", repr(name))
            _check_direction(f"{argument}[{name!r}]", value, parameters[canonical[name]])
            other = renamed.setdefault(canonical[name], value)
            if other is not value and not torch.equal(other, value):
                fail(
                    f"{argument}[{name!r}]",
                    f"the values of {canonical[name]!r}, to which it is tied",
                    "others",
                )
        checked.append(renamed)
    if not any(checked):
        fail("directions", "at least one parameter to move", "empty dictionaries")
    return checked


def _check_direction(argument: str, value: Any, parameter: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        fail(argument, "a floating-point tensor", describe(value), TypeError)
    if value.shape != parameter.shape:
        fail(argument, f"shape {list(parameter.shape)}, as the parameter", f"shape {list(value.shape)}")
    if value.device != parameter.device:
        fail(argument, f"a tensor on {parameter.device}, as the parameter", f"one on {value.device}")
    if not value.isfinite().all():
        fail(argument, "finite values", "infinities or NaN among them")


def _stack(directions: list[Direction], parameters: Direction) -> Direction:
    """Name to [K, *shape], zero where a direction leaves a parameter out, over the parameters that move."""
    stacked: Direction = {}
    for name, parameter in parameters.items():
        if any(name in direction for direction in directions):
            stacked[name] = parameter.new_zeros((len(directions), *parameter.shape))
            for k, direction in enumerate(directions):
                if name in direction:
                    stacked[name][k] = direction[name].detach()
    return stacked


def _inputs(index: int, batch: Any) -> torch.Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, torch.Tensor) or inputs.dim() == 0:
        fail(f"batches[{index}]", "a tensor of inputs or (inputs, targets)", describe(batch), TypeError)
    if len(inputs) == 0:
        fail(f"batches[{index}]", "at least one sample", f"inputs of shape {list(inputs.shape)}")
    return inputs


def _check_outputs(outputs: Any, samples: int) -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor):
        fail("model", "one tensor of outputs [N, C]", describe(outputs), TypeError)
    if outputs.dim() != 2 or len(outputs) != samples:
        fail("model", f"outputs of shape [{samples}, C]", f"shape {list(outputs.shape)}")
    return outputs
