"""Which upstream tensor belongs to which, and the report of it."""

from __future__ import annotations

import io

import pytest
import torch
from families import VGG, ResNet, Untraceable, mlp, shapes_of
from torch import nn

from transferops.adapt import inherit, load_matching
from transferops.adapt.channel_graph import structure_of
from transferops.adapt.matching import match_names


class TestMatching:
    def test_same_numbers_go_by_name(self) -> None:
        shapes = {"blocks.0.w": (2, 2), "blocks.1.w": (2, 3)}
        assert match_names(shapes, shapes) == {name: name for name in shapes}

    @pytest.mark.parametrize(
        ("here", "there", "expected"), [(3, 6, [0, 3, 5]), (6, 3, [0, 0, 1, 1, 2, 2]), (1, 4, [0]), (4, 1, [0] * 4)]
    )
    def test_blocks_are_rescaled(self, here: int, there: int, expected: list[int]) -> None:
        target = {f"blocks.{i}.fc.weight": (4, 8) for i in range(here)}
        upstream = {f"blocks.{i}.fc.weight": (4, 8) for i in range(there)}
        pairs = match_names(target, upstream)
        # round(i (m-1)/(n-1)), halves up
        assert [int(pairs[name].split(".")[1]) for name in target] == expected

    def test_blocks_of_another_kind_are_anchors(self) -> None:
        pairs = match_names(shapes_of(ResNet([1, 3])), shapes_of(ResNet([1, 2])))
        matched = {
            name.split(".conv1")[0]: source.split(".conv1")[0] for name, source in pairs.items() if "conv1" in name
        }
        assert matched["layer2.0"] == "layer2.0"
        assert matched["layer2.1"] == matched["layer2.2"] == "layer2.1"

    def test_convolutions_keep_their_norms(self) -> None:
        pairs = match_names(shapes_of(VGG([1, 2])), shapes_of(VGG([2, 3])))
        for name, source in pairs.items():
            if name.startswith("features") and name.endswith("running_mean"):
                number, other = int(name.split(".")[1]) - 1, int(source.split(".")[1]) - 1
                assert pairs[f"features.{number}.weight"] == f"features.{other}.weight"

    def test_first_and_last_layers(self) -> None:
        pairs = match_names(shapes_of(mlp(6, 16, 5)), shapes_of(mlp(6, 16, 16, 16, 5)))
        assert pairs["0.weight"] == "0.weight"
        assert pairs["2.weight"] == "6.weight"

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_wrappers(self, prefix: str) -> None:
        upstream = {f"{prefix}{name}": tensor for name, tensor in ResNet([1]).state_dict().items()}
        report = load_matching(ResNet([1]), upstream)
        assert report.copied == report.total


class TestReport:
    def test_text_and_dictionary(self) -> None:
        import json

        report = load_matching(ResNet([1, 1], 8, classes=3), ResNet([2, 1], 12).state_dict())
        text = str(report)
        assert "conv1.weight" in text
        assert "8x3x3x3 <- 12x3x3x3" in text
        assert "3 outputs here, 5 upstream" in text
        assert "not used upstream: layer1.1.conv1.weight" in text
        document = json.loads(json.dumps(report.to_dict()))
        assert document["copied"] == report.copied < document["total"] == report.total
        assert len(document["tensors"]) == len(report.tensors)

    def test_masks_survive_a_file(self) -> None:
        report = inherit(mlp(3, 4, 2), mlp(3, 4, 2), 0.5)
        buffer = io.BytesIO()
        torch.save(report.masks, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert all(torch.equal(loaded[name], mask) for name, mask in report.masks.items())

    def test_shared_tensors_count_once(self) -> None:
        def tied() -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].weight = model[0].weight
            return model

        target, upstream = tied(), tied()
        report = inherit(target, upstream, 1.0)
        assert report.total == 16 + 4 + 4
        assert report.copied == report.total
        assert next(t for t in report.tensors if t.name == "1.weight").note == "the same tensor as 0.weight"

    def test_graph_that_cannot_be_followed(self) -> None:
        structure = structure_of(Untraceable())
        assert not structure.traced
        report = inherit(Untraceable(), Untraceable(), 0.5)
        assert "could not be followed" in str(report)
        assert torch.equal(report.masks["stem.bias"], report.masks["blocks.1.bias"])
