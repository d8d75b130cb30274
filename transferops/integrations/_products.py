"""Products of a Fisher information with the columns of a matrix, for the linear operators of other packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from transferops._validate import describe, fail
from transferops.fisher import FisherInformation


class FisherProducts:
    """J V for V [P, K], over the flattened selected parameters in the model's order.

    Args:
        fisher: J.
        batches: as for its methods; read once for each product. A one-time iterator is kept in a list.

    Attributes:
        shapes: of the selected parameters.
        size: P, their elements together.
        dtype: of the products, at least float32.
        device: of the parameters.

    Raises:
        TypeError: an argument is something else.
        ValueError: no parameter is selected, or they are on several devices.
    """

    def __init__(self, fisher: FisherInformation, batches: Iterable[Any]) -> None:
        if not isinstance(fisher, FisherInformation):
            fail("fisher", "a transferops.fisher.FisherInformation", describe(fisher), TypeError)
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            fail("batches", "an iterable of batches, such as [inputs]", describe(batches), TypeError)
        self._fisher = fisher
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        selected = list(fisher.parameters.values())
        devices = {parameter.device for parameter in selected}
        if len(devices) > 1:
            fail("fisher", "parameters on one device", ", ".join(sorted(map(str, devices))))
        (self.device,) = devices
        self.shapes = [parameter.shape for parameter in selected]
        self.size = sum(shape.numel() for shape in self.shapes)
        self.dtype = torch.float32
        for parameter in selected:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)

    def __call__(self, columns: Tensor) -> Tensor:
        """J V, [P, K] as ``columns``.

        Raises:
            ValueError: as :meth:`transferops.fisher.FisherInformation.matvec`.
        """
        products = [self._fisher.accumulate("matvec", column) for column in columns.T]
        if not products:
            return columns.to(self.dtype)
        for batch in self._batches:
            for product in products:
                product.update([batch])
        found = [torch.cat([part.flatten() for part in product.compute().values()]) for product in products]
        return torch.stack(found, 1).to(self.dtype)
