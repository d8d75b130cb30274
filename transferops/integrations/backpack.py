"""Extensions for BackPACK that take their sums from the kernels of this library.

BackPACK hands an extension the input and the output gradient of every extended layer; these compute from them what
BackPACK's extensions of the same names do, and store it in the same fields of the parameters:

    >>> model, loss = extend(model), extend(nn.CrossEntropyLoss())
    >>> with backpack(SumGradSquared(), BatchL2Grad()):
    ...     loss(model(inputs), labels).backward()
    >>> model[0].weight.sum_grad_squared, model[0].weight.batch_l2

No per-sample gradient of a linear layer or convolution is in memory, nor its unfolded input. Where they differ from
BackPACK 1.7:

* ``BatchL2Grad`` of a convolution with groups: BackPACK's value mixes the groups; here it is the norm.
* The first two also take LayerNorm, RMSNorm and GroupNorm, which BackPACK leaves out with a warning.
* Layer types that are none of these go to BackPACK's own rules.

What BackPACK demands stays so: each extended layer is called once in a forward pass; the values scale with the loss,
which by default is a mean; batch norm has to be in evaluation mode. Without these demands, and without ``extend``,
:class:`transferops.fisher.FisherInformation` gives the same quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from transferops._validate import fail
from transferops.fisher.layers import FORMULAS, Gradients, formulas

try:
    from backpack import extensions
    from backpack.core.derivatives.conv1d import Conv1DDerivatives
    from backpack.core.derivatives.conv2d import Conv2DDerivatives
    from backpack.core.derivatives.conv3d import Conv3DDerivatives
    from backpack.core.derivatives.linear import LinearDerivatives
    from backpack.extensions.firstorder.base import FirstOrderModuleExtension
    from backpack.extensions.secondorder.diag_ggn.diag_ggn_base import DiagGGNBaseModule
except ImportError as error:
    raise ImportError(
        f"transferops.integrations.backpack needs BackPACK ({error}): pip install backpack-for-pytorch"
    ) from error

__all__ = ["BatchL2Grad", "DiagGGNExact", "DiagGGNMC", "SumGradSquared"]


class SumGradSquared(extensions.SumGradSquared):  # type: ignore[misc, unused-ignore]
    """sum_n g_n^2 elementwise, in ``parameter.sum_grad_squared`` [*shape]; g_n the gradient of a sample's loss.

    Raises:
        ValueError: in the backward pass, for batch norm in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        _use_first_order(self, lambda gradients: gradients.diagonal())


class BatchL2Grad(extensions.BatchL2Grad):  # type: ignore[misc, unused-ignore]
    """|g_n|^2, in ``parameter.batch_l2`` [N].

    Raises:
        ValueError: in the backward pass, for batch norm in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        _use_first_order(self, lambda gradients: gradients.norms())


class DiagGGNExact(extensions.DiagGGNExact):  # type: ignore[misc, unused-ignore]
    """The diagonal of the generalised Gauss-Newton matrix, in ``parameter.diag_ggn_exact`` [*shape].

    BackPACK carries the square root of the loss's curvature back through the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        _use_second_order(self)


class DiagGGNMC(extensions.DiagGGNMC):  # type: ignore[misc, unused-ignore]
    """The same with labels drawn from the model, in ``parameter.diag_ggn_mc`` [*shape].

    Args:
        mc_samples: draws per sample.
    """

    def __init__(self, mc_samples: int = 1) -> None:
        super().__init__(mc_samples)
        _use_second_order(self)


def _use_first_order(extension: Any, quantity: Callable[[Gradients], Tensor]) -> None:
    for kind in FORMULAS:
        extension.set_module_extension(kind, _FirstOrder(kind, quantity), overwrite=True)


def _use_second_order(extension: Any) -> None:
    derivatives = {
        nn.Linear: LinearDerivatives,
        nn.Conv1d: Conv1DDerivatives,
        nn.Conv2d: Conv2DDerivatives,
        nn.Conv3d: Conv3DDerivatives,
    }
    for kind, derivative in derivatives.items():
        extension.set_module_extension(kind, _SquareRoot(derivative()), overwrite=True)


class _FirstOrder(FirstOrderModuleExtension):  # type: ignore[misc, unused-ignore]
    """A quantity of the per-sample gradients of one layer type."""

    def __init__(self, kind: type[nn.Module], quantity: Callable[[Gradients], Tensor]) -> None:
        self._quantity = quantity
        for own in FORMULAS[kind]:
            setattr(self, own, partial(self._rule, own))
        super().__init__(list(FORMULAS[kind]))

    def _rule(self, own: str, extension: Any, module: nn.Module, g_inp: Any, g_out: Any, backproped: Any) -> Tensor:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            fail("model", "batch norm in evaluation mode", "training mode, in which samples depend on each other")
        return self._quantity(_gradients(module, own, g_out[0]))


class _SquareRoot(DiagGGNBaseModule):  # type: ignore[misc, unused-ignore]
    """The diagonal from output gradients [V, N, ...], the columns of a square root of the curvature."""

    def __init__(self, derivatives: Any) -> None:
        self.weight, self.bias = partial(self._rule, "weight"), partial(self._rule, "bias")
        super().__init__(derivatives, params=["bias", "weight"])

    @staticmethod
    def _rule(own: str, extension: Any, module: nn.Module, g_inp: Any, g_out: Any, backproped: Tensor) -> Tensor:
        first, *others = backproped
        diagonal = _gradients(module, own, first).diagonal()
        for column in others:
            diagonal += _gradients(module, own, column).diagonal()
        return diagonal


def _gradients(module: Any, own: str, grad_output: Tensor) -> Gradients:
    """The per-sample gradients of a parameter, from the input that BackPACK has kept."""
    return formulas(module)[own](module, [(module.input0.detach(), grad_output.detach())], len(grad_output))
