"""The Fisher information as a linear operator of curvlinops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from transferops.fisher import FisherInformation
from transferops.integrations._products import FisherProducts

try:
    from curvlinops._torch_base import PyTorchLinearOperator
except ImportError as error:
    raise ImportError(
        f"transferops.integrations.curvlinops needs curvlinops >= 3 ({error}): pip install curvlinops-for-pytorch"
    ) from error

__all__ = ["FisherOperator"]


class FisherOperator(PyTorchLinearOperator):  # type: ignore[misc, unused-ignore]
    """The Fisher information where curvlinops takes one of its own operators.

    That is: ``operator @ v`` for v a tensor [P] or [P, K], or a list of tensors of the parameters' shapes; sums,
    products, submatrices and inverses of operators; ``to_scipy()``; traces, diagonals and spectra from products.

        >>> operator = FisherOperator(FisherInformation(model), batches)
        >>> CGInverseLinearOperator(operator + damping) @ gradient

    "exact" is curvlinops' ``GGNLinearOperator``, "empirical" its ``EFLinearOperator``, both for
    ``CrossEntropyLoss()``; with ``MSELoss()``, which averages over the C outputs too, theirs are 2 / C and 4 / C times
    the J of "mse". The data are read once for a product with K columns.

    Args:
        fisher: J, with its model, estimator, loss and selection of parameters.
        batches: as for its methods; read once for each product. A one-time iterator is kept in a list.

    Attributes:
        shape: (P, P), P the elements of the selected parameters in the model's order.
        dtype, device: of a product; at least float32.

    Raises:
        TypeError: an argument is something else.
        ValueError: no parameter is selected, or they are on several devices. In products, as
            :meth:`transferops.fisher.FisherInformation.matvec`.
    """

    SELF_ADJOINT = True

    def __init__(self, fisher: FisherInformation, batches: Iterable[Any]) -> None:
        self._products = FisherProducts(fisher, batches)
        shapes = [tuple(shape) for shape in self._products.shapes]
        super().__init__(shapes, shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Of a product."""
        return self._products.dtype

    @property
    def device(self) -> torch.device:
        """Of a product."""
        return self._products.device

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        """J X in curvlinops' list format: a tensor [*shape, K] for each parameter."""
        columns = torch.cat([part.flatten(0, -2) for part in X])
        parts = torch.split(self._products(columns), [shape.numel() for shape in self._products.shapes])
        return [part.reshape(*shape, -1) for part, shape in zip(parts, self._products.shapes, strict=True)]
