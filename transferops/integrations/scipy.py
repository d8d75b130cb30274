"""The Fisher information as a linear operator of SciPy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transferops.fisher import FisherInformation
from transferops.integrations._products import FisherProducts

try:
    from scipy.sparse.linalg import LinearOperator
except ImportError as error:
    raise ImportError("transferops.integrations.scipy needs SciPy: pip install scipy") from error

__all__ = ["FisherOperator"]


class FisherOperator(LinearOperator):  # type: ignore[misc, unused-ignore]
    """The Fisher information for ``scipy.sparse.linalg``: ``eigsh``, ``cg`` and kin.

        >>> largest = eigsh(FisherOperator(FisherInformation(model), batches), k=5, return_eigenvectors=False)

    The data are read once for a product with K columns. Products are computed in the model's precision, at least
    float32: ask iterative solvers for no smaller tolerance.

    Args:
        fisher: J, with its model, estimator, loss and selection of parameters.
        batches: as for its methods; read once for each product. A one-time iterator is kept in a list.

    Attributes:
        shape: (P, P), P the elements of the selected parameters in the model's order.
        dtype: float32 or float64, that of a product.

    Raises:
        TypeError: an argument is something else.
        ValueError: no parameter is selected, or they are on several devices. In products, as
            :meth:`transferops.fisher.FisherInformation.matvec`.
    """

    def __init__(self, fisher: FisherInformation, batches: Iterable[Any]) -> None:
        self._products = FisherProducts(fisher, batches)
        dtype = np.dtype(str(self._products.dtype).removeprefix("torch."))
        super().__init__(dtype, (self._products.size, self._products.size))

    def _matmat(self, X: NDArray[Any]) -> NDArray[Any]:
        columns = torch.as_tensor(np.ascontiguousarray(X), dtype=self._products.dtype, device=self._products.device)
        product: NDArray[Any] = self._products(columns).cpu().numpy()
        return product

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        return self._matmat(x.reshape(-1, 1))

    def _adjoint(self) -> FisherOperator:
        return self
