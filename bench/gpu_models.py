"""Fisher information of a whole model on a GPU: a ViT-B/16, against a plain step and against its own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transferops.fisher import FisherInformation


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT-B/16 at 224 x 224 unless smaller: 86.6 million weights, 197 positions."""

    def __init__(
        self, size: int = 224, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size // 16) ** 2 + 1, width) / 50)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out


def vision_transformer_calls(device: str, small: bool) -> dict[str, Callable[[], object]]:
    """What is timed on ``device``, by name."""
    dtype = torch.float32 if small else torch.bfloat16
    options: dict[str, Any] = {"size": 32, "width": 24, "depth": 2, "heads": 2, "classes": 7} if small else {}
    model = VisionTransformer(**options).to(dtype).eval()
    samples, size = (3, 32) if small else (64, 224)
    images = torch.randn(samples, 3, size, size).to(dtype)
    classes = model.head.out_features
    labels = torch.randint(classes, (samples,))
    directions = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(5)]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()

    def jvp(direction: dict[str, Tensor]) -> Tensor:
        def outputs(weights: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(model, weights, (images,))
            return out

        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
            tangent: Tensor = torch.func.jvp(outputs, (parameters,), (direction,))[1]
        return tangent

    empirical = FisherInformation(model, "empirical", device=device)
    exact, recorded = FisherInformation(model, "exact"), FisherInformation(model, "exact", cuda_graphs=True)
    return {
        "forward and backward": step,
        "diagonal": lambda: empirical.diagonal([(images, labels)]),
        "5 JVPs": lambda: [jvp(direction) for direction in directions],
        "exact 5 x 5 Gram matrix": lambda: exact.gram(directions, [images]),
        "exact 5 x 5 Gram matrix, replayed": lambda: recorded.gram(directions, [images]),
    }
