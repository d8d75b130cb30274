"""Small members of the usual families of networks, in the layout of the well-known implementations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A basic (two 3x3) or a bottleneck (1x1, 3x3, 1x1) block; a projection where the shape changes."""

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(before, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, after, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(after)
        else:
            self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, after, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(F.relu(x)))
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    def __init__(
        self, depths: Sequence[int], width: int = 8, channels: int = 3, classes: int = 5, bottleneck: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        before = width
        for stage, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Residual(before, width << stage, stride, bottleneck))
                before = (width << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """``plan``: convolutions per stage; every stage ends in a pooling. Images are 8x8."""

    def __init__(
        self, plan: Sequence[int], width: int = 8, channels: int = 3, classes: int = 5, norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, depth in enumerate(plan):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width << stage, 3, padding=1))
                layers += [nn.BatchNorm2d(width << stage)] if norm else []
                layers.append(nn.ReLU())
                channels = width << stage
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = 8 >> len(plan)
        hidden = 4 * width
        self.classifier = nn.Sequential(
            nn.Linear(channels * side * side, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Depthwise(nn.Module):
    """A convolution per channel, a factor per channel and a transposed convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.scale = nn.Parameter(torch.rand(1, width, 1, 1))
        self.up = nn.ConvTranspose2d(width, width + 1, 2)
        self.head = nn.Conv2d(width + 1, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.depthwise(self.first(x)) * self.scale)).mean((2, 3))


class Tokens(nn.Module):
    """Words through an encoder layer and a norm, then keys, compared with that of a learned query."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 12, batch_first=True)
        self.query = nn.Parameter(torch.rand(1, width))
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.key(self.norm(self.encoder(self.embedding(x)).mean(1))) * self.key(self.query))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images are 8x8, patches ``patch`` square."""

    def __init__(
        self,
        depth: int = 2,
        heads: int = 2,
        head_width: int = 8,
        channels: int = 3,
        classes: int = 5,
        ratio: int = 2,
        patch: int = 4,
    ) -> None:
        super().__init__()
        width = heads * head_width
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (8 // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Untraceable(nn.Module):
    """Residual sums under control flow that depends on data."""

    def __init__(self, width: int = 8, classes: int = 5, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if bool(x.sum() > 0):
                x = x + F.relu(block(x))
        return self.head(x)


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU, and batch norm before it if asked."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def transformer(width: int, heads: int, depth: int) -> nn.Module:
    """torch's own encoder between two linear layers."""
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, width), encoder, nn.Linear(width, 5))


def randomized(model: nn.Module) -> nn.Module:
    """The model with all tensors random, statistics and counters included."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if name.endswith("var") else torch.randn(tensor.shape) / 3)
            else:
                tensor.fill_(int(torch.randint(1, 9, ())))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
