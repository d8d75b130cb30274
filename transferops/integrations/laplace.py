"""The Fisher information as a back end of laplace-torch.

``Laplace(model, "classification", "all", "diag", backend=DiagonalGGN)`` uses it. For a diagonal, laplace-torch 0.3
forms the Jacobian [N, C, P] of every batch; :class:`transferops.fisher.FisherInformation` takes one backward pass per
output through activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops.fisher import FisherInformation

try:
    from laplace.curvature import GGNInterface
except ImportError as error:
    raise ImportError(
        f"transferops.integrations.laplace needs laplace-torch ({error}): pip install laplace-torch"
    ) from error

__all__ = ["DiagonalGGN"]


class DiagonalGGN(GGNInterface):  # type: ignore[misc, unused-ignore]
    """The generalised Gauss-Newton matrix, which is the exact Fisher information of both likelihoods.

    For diagonal approximations: of all weights, of the last layer, or of a subnetwork. The full matrix is
    laplace-torch's own; there are no Kronecker factors. Mappings as inputs, and ``stochastic=True``, go to
    laplace-torch's own diagonal.
    """

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch and the diagonal of its matrix, both summed over the samples.

        Args:
            x: [N, ...] inputs.
            y: [N] classes, or [N, C] targets of a regression.
            kwargs: not used.

        Returns:
            The loss, a scalar; and the diagonal [P] over the parameters, or over the subnetwork.

        Raises:
            ValueError: outputs are not finite, or depend on other samples of the batch.
        """
        if self.stochastic or not isinstance(x, Tensor):
            loss, diagonal = super().diag(x, y, **kwargs)
            return loss, diagonal
        with torch.no_grad():
            loss = self.factor * self.lossfunc(self.model(x), y)
        wanted = {id(parameter) for parameter in self.params}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in wanted]
        likelihood = "cross_entropy" if self.likelihood == "classification" else "mse"
        mean = FisherInformation(self.model, "exact", likelihood, parameters=names).diagonal([x])
        diagonal = torch.cat([mean[name].flatten() for name in names]) * len(x)
        return loss, diagonal if self.subnetwork_indices is None else diagonal[self.subnetwork_indices]
