"""Readers, domains and splits: what they give, and how they refuse what they cannot take."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import shared_data

from transferops.data import (
    Domain,
    DomainBundle,
    few_shot_split,
    load_bundle,
    load_digits_domains,
    load_folder,
    load_npz,
)

Image = pytest.importorskip("PIL.Image")


def make_domain(name: str = "a", per_class: int = 6, classes: int = 3) -> Domain:
    """Inputs that number the samples, so that parts can be told apart."""
    labels = torch.arange(per_class * classes) % classes
    inputs = torch.arange(len(labels), dtype=torch.float32)[:, None].repeat(1, 2)
    return Domain(name, inputs, labels)


def exactly(message: str) -> str:
    """The pattern of this message and no other."""
    return f"^{re.escape(message)}$"


def write_npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **{key: np.asarray(value) for key, value in arrays.items()})
    return path


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (9, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_tree(root: Path) -> Path:
    write_image(root / "photo" / "cat" / "1.png", (255, 0, 0))
    write_image(root / "photo" / "dog" / "1.png", (0, 255, 0))
    write_image(root / "sketch" / "cat" / "1.png", (0, 0, 255))
    return root


class TestNpz:
    def test_images_become_nchw_between_minus_one_and_one(self, tmp_path: Path) -> None:
        x = np.arange(2 * 8 * 9 * 3, dtype=np.uint8).reshape(2, 8, 9, 3)
        bundle = load_npz(write_npz(tmp_path / "b.npz", a_x=x, a_y=[0, 1], b_x=x[:1], b_y=[2]))
        assert list(bundle.domains) == ["a", "b"]
        assert bundle.classes == 3
        assert bundle.sample_shape == (3, 8, 9)
        inputs = bundle.domains["a"].inputs
        torch.testing.assert_close((inputs + 1) * 127.5, torch.tensor(x).permute(0, 3, 1, 2).float())
        assert bundle.domains["a"].labels.tolist() == [0, 1]

    def test_grey_images_have_one_channel(self, tmp_path: Path) -> None:
        x = np.array([[[0, 255]] * 2], dtype=np.uint8)
        bundle = load_npz(write_npz(tmp_path / "b.npz", a_x=x, a_y=[0]))
        torch.testing.assert_close(bundle.domains["a"].inputs, torch.tensor([[[[-1.0, 1.0]] * 2]]))

    def test_features_stay_as_they_are(self, tmp_path: Path) -> None:
        x = np.array([[0.5, -2.0], [3.0, 1.0]])
        bundle = load_npz(write_npz(tmp_path / "b.npz", a_x=x, a_y=[0, 1]))
        assert bundle.domains["a"].inputs.dtype == torch.float32
        torch.testing.assert_close(bundle.domains["a"].inputs, torch.tensor(x, dtype=torch.float32))

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_counts_become_roots_of_proportions(self, tmp_path: Path, dtype: type) -> None:
        x = np.array([[1, 3], [0, 0]], dtype=dtype)
        bundle = load_npz(write_npz(tmp_path / "b.npz", a_x=x, a_y=[0, 1]))
        expected = torch.tensor([[(2 * 0.25) ** 0.5, (2 * 0.75) ** 0.5], [0, 0]])
        torch.testing.assert_close(bundle.domains["a"].inputs, expected)

    def test_one_fractional_domain_makes_all_of_them_features(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "b.npz", a_x=[[1.0, 3.0]], a_y=[0], b_x=[[0.5, 1.0]], b_y=[0])
        torch.testing.assert_close(load_npz(path).domains["a"].inputs, torch.tensor([[1.0, 3.0]]))

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"a_x": [[1.0]]}, "keys: expected a_y beside a_x, got no such array"),
            ({"a_y": [0]}, "keys: expected a_x beside a_y, got no such array"),
            ({"a_x": [[1.0]], "a_z": [0]}, "keys: expected a_y beside a_x, got no such array"),
            ({"images": [[1.0]]}, "keys: expected <domain>_x and <domain>_y, got 'images'"),
            ({"_x": [[1.0]], "_y": [0]}, "keys: expected <domain>_x and <domain>_y, got '_x'"),
            ({}, "keys: expected <domain>_x and <domain>_y, got no arrays"),
            (
                {"a_x": [[1.0], [2.0]], "a_y": [0]},
                "a_y: expected shape [2], one label per row of a_x, got shape [1]",
            ),
            (
                {"a_x": [[1.0]], "a_y": [[0]]},
                "a_y: expected shape [1], one label per row of a_x, got shape [1, 1]",
            ),
            ({"a_x": [[1.0]], "a_y": [0.0]}, "a_y: expected integer labels, got dtype float64"),
            (
                {"a_x": [[1.0]], "a_y": [-1]},
                "a.labels: expected classes counted from 0, got -1 at position 0",
            ),
            (
                {"a_x": [[1.0, 2.0], [1.0, np.nan]], "a_y": [0, 0]},
                "a.inputs: expected finite numbers, got NaN or infinity in sample 1",
            ),
            (
                {"a_x": [[1e39]], "a_y": [0]},
                "a.inputs: expected finite numbers, got NaN or infinity in sample 0",
            ),
            (
                {"a_x": np.zeros((0, 2)), "a_y": np.zeros(0, int)},
                "a_x: expected at least one sample, got shape [0, 2]",
            ),
            ({"a_x": [["cat"]], "a_y": [0]}, "a_x: expected real numbers, got dtype <U3"),
            ({"a_x": [[1j]], "a_y": [0]}, "a_x: expected real numbers, got dtype complex128"),
            (
                {"a_x": np.zeros((1, 8, 8, 4), np.uint8), "a_y": [0]},
                "a_x: expected images [N, H, W, C] with C 1 or 3, got shape [1, 8, 8, 4]",
            ),
            (
                {"a_x": np.zeros((1, 8, 8, 3), np.float32), "a_y": [0]},
                "a_x: expected uint8 images [N, H, W, C] or features [N, D], got float32 of shape [1, 8, 8, 3]",
            ),
            (
                {"a_x": [[0.5]] * 3, "a_y": [0, 10**12, 1]},
                "a.labels: expected classes below 3, the number of samples in all, got 1000000000000",
            ),
            (
                {"a_x": [[1.0]], "a_y": [0], "b_x": [[1.0, 2.0]], "b_y": [0]},
                "b.inputs: expected samples of shape [1] as in a, got [2]",
            ),
        ],
    )
    def test_malformed_arrays(self, tmp_path: Path, arrays: dict[str, object], message: str) -> None:
        path = write_npz(tmp_path / "b.npz", **arrays)
        with pytest.raises((ValueError, TypeError), match=exactly(f"{path}: {message}")):
            load_npz(path)

    def test_pickled_objects_are_not_loaded(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "b.npz", a_x=np.array([[None]], dtype=object), a_y=[0])
        with pytest.raises(ValueError, match=r"b\.npz: a_x: expected a readable array without pickled objects"):
            load_npz(path)

    @pytest.mark.parametrize("kept", [0, 1, 10, 300, -30])
    def test_truncated_file(self, tmp_path: Path, kept: int) -> None:
        path = write_npz(tmp_path / "b.npz", a_x=np.random.default_rng(0).random((50, 4)), a_y=[0] * 50)
        path.write_bytes(path.read_bytes()[:kept])
        expected = "file: expected a complete .npz archive, got something unreadable as one"
        with pytest.raises(ValueError, match=exactly(f"{path}: {expected}")):
            load_npz(path)

    def test_damaged_member(self, tmp_path: Path) -> None:
        path = tmp_path / "b.npz"
        np.savez_compressed(path, a_x=np.random.default_rng(0).random((50, 4)), a_y=[0] * 50)
        content = bytearray(path.read_bytes())
        content[200:400] = bytes(200)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.npz: a_x: expected a readable array without pickled objects, got"):
            load_npz(path)

    def test_text_file_and_single_array(self, tmp_path: Path) -> None:
        text = tmp_path / "b.npz"
        text.write_text("a_x,a_y")
        with pytest.raises(ValueError, match=r"b\.npz: file: expected a complete \.npz archive"):
            load_npz(text)
        np.save(tmp_path / "b.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"expected an \.npz archive of several arrays, got a single \.npy"):
            load_npz(tmp_path / "b.npy")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError,
            match=exactly(f"data: expected an .npz file, got no file at {tmp_path / 'no.npz'}"),
        ):
            load_npz(tmp_path / "no.npz")


class TestFolder:
    def test_tree(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "tree")
        (root / "README.txt").write_text("not a domain")
        (root / ".cache").mkdir()
        (root / "photo" / "cat" / ".DS_Store").write_bytes(b"not an image")
        bundle = load_folder(root)
        assert list(bundle.domains) == ["photo", "sketch"]
        assert bundle.class_names == ("cat", "dog")
        assert bundle.domains["photo"].labels.tolist() == [0, 1]
        assert bundle.sample_shape == (3, 8, 9)
        red = torch.tensor([1.0, -1.0, -1.0])
        torch.testing.assert_close(bundle.domains["photo"].inputs[0].mean((1, 2)), red)
        assert bundle.missing_classes() == {"sketch": [1]}

    def test_grey_and_transparent_images_become_rgb(self, tmp_path: Path) -> None:
        for mode in ("L", "RGBA", "P"):
            path = tmp_path / "tree" / "d" / "c" / f"{mode}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (8, 8)).save(path)
        assert load_folder(tmp_path / "tree").domains["d"].inputs.shape == (3, 3, 8, 8)

    def test_sizes_must_agree_unless_resized(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "tree")
        odd = root / "sketch" / "cat" / "2.png"
        write_image(odd, (0, 0, 0), (5, 6))
        first = root / "photo" / "cat" / "1.png"
        expected = f"images of one size, 9x8 as {first} (or image_size)"
        with pytest.raises(ValueError, match=exactly(f"data: expected {expected}, got 5x6 in {odd}")):
            load_folder(root)
        assert load_folder(root, image_size=4).sample_shape == (3, 4, 4)

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
    def test_undecodable_image_is_named(self, tmp_path: Path, content: bytes) -> None:
        bad = make_tree(tmp_path / "tree") / "photo" / "cat" / "0.png"
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=exactly(f"data: expected an image, got {bad}, which cannot be decoded")):
            load_folder(tmp_path / "tree")

    def test_truncated_image_is_named(self, tmp_path: Path) -> None:
        bad = make_tree(tmp_path / "tree") / "photo" / "cat" / "1.png"
        noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(bad)
        bad.write_bytes(bad.read_bytes()[:-60])
        with pytest.raises(ValueError, match=r"1\.png, which cannot be decoded"):
            load_folder(tmp_path / "tree")

    def test_undecodable_images_are_left_out_on_request(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "tree")
        for name in ("photo/cat/0.png", "sketch/cat/1.jpg"):
            (root / name).write_bytes(b"not an image")
        names = "photo/cat/0.png, sketch/cat/1.jpg"
        message = exactly(f"data: left out 2 images that cannot be decoded: {names}")
        with pytest.warns(UserWarning, match=message):
            bundle = load_folder(root, skip_undecodable=True)
        assert bundle.undecodable == ("photo/cat/0.png", "sketch/cat/1.jpg")
        whole = load_folder(make_tree(tmp_path / "whole"), skip_undecodable=True)  # without a warning
        assert whole.undecodable == ()
        for name, domain in whole.domains.items():
            assert torch.equal(bundle.domains[name].inputs, domain.inputs)
            assert torch.equal(bundle.domains[name].labels, domain.labels)

    def test_a_warning_names_the_first_of_many(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "tree")
        for i in range(7):
            (root / "sketch" / "cat" / f"bad{i}.png").write_bytes(b"")
        with pytest.warns(UserWarning, match=r"left out 7 images .*: .*bad4\.png, \.\.\.$"):
            assert len(load_folder(root, skip_undecodable=True).undecodable) == 7

    def test_a_class_or_domain_that_is_left_out(self, tmp_path: Path) -> None:
        """A class is missing then; a domain cannot be."""
        root = make_tree(tmp_path / "tree")
        (root / "photo" / "dog" / "1.png").write_bytes(b"")
        with pytest.warns(UserWarning, match="left out 1 image"):
            bundle = load_folder(root, skip_undecodable=True)
        assert bundle.class_names == ("cat", "dog")
        assert bundle.missing_classes() == {"photo": [1], "sketch": [1]}
        (root / "photo" / "cat" / "1.png").write_bytes(b"")
        message = f"data: expected an image in {root / 'photo'} that can be decoded, got none among 2"
        with pytest.raises(ValueError, match=exactly(message)):
            load_folder(root, skip_undecodable=True)

    def test_other_sizes_are_not_left_out(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "tree")
        write_image(root / "sketch" / "cat" / "2.png", (0, 0, 0), (5, 6))
        with pytest.raises(ValueError, match="expected images of one size"):
            load_folder(root, skip_undecodable=True)

    def test_empty_levels(self, tmp_path: Path) -> None:
        message = f"data: expected domain folders in {tmp_path} (domain/class/image), got none"
        with pytest.raises(ValueError, match=exactly(message)):
            load_folder(tmp_path)
        (tmp_path / "photo").mkdir()
        with pytest.raises(ValueError, match="expected class folders in"):
            load_folder(tmp_path)
        (tmp_path / "photo" / "cat").mkdir()
        with pytest.raises(ValueError, match="expected images in"):
            load_folder(tmp_path)

    @pytest.mark.parametrize("where", ["alias", "photo/alias", "photo/cat/alias.png"])
    def test_symbolic_links_are_refused(self, tmp_path: Path, where: str) -> None:
        root = make_tree(tmp_path / "tree")
        link = root / where
        target = root / "photo" / "cat" / "1.png" if where.endswith(".png") else root / "sketch"
        link.symlink_to(target, target_is_directory=target.is_dir())
        with pytest.raises(
            ValueError, match=exactly(f"data: expected folders and files, got a symbolic link at {link}")
        ):
            load_folder(root)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="data: expected a folder, got no folder at"):
            load_folder(tmp_path / "no")


class TestBundle:
    def test_dispatch(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "b.npz", a_x=[[0.5]], a_y=[0])
        assert list(load_bundle(path).domains) == ["a"]
        assert list(load_bundle(make_tree(tmp_path / "tree")).domains) == ["photo", "sketch"]
        assert load_bundle(tmp_path / "tree", image_size=4).sample_shape == (3, 4, 4)
        expected = f"data: expected an .npz file or an image folder, got nothing at {tmp_path / 'no'}"
        with pytest.raises(FileNotFoundError, match=exactly(expected)):
            load_bundle(tmp_path / "no")
        with pytest.raises(ValueError, match=r"image_size: expected None for an \.npz file"):
            load_bundle(path, image_size=4)

    def test_choose(self) -> None:
        bundle = DomainBundle({name: make_domain(name) for name in "abc"})
        target, sources = bundle.choose("b")
        assert (target.name, [source.name for source in sources]) == ("b", ["a", "c"])
        assert [source.name for source in bundle.choose("b", ["c", "a"])[1]] == ["c", "a"]

    @pytest.mark.parametrize(
        ("target", "sources", "message"),
        [
            ("z", None, "target: expected one of a, b, c, got 'z'"),
            ("a", ["z"], "sources: expected names among a, b, c, got 'z'"),
            ("a", ["b", "a"], "sources: expected domains other than the target, got 'a'"),
            ("a", ["b", "b"], "sources: expected each domain once, got b, b"),
            ("a", [], "sources: expected at least one domain beside the target, got none"),
        ],
    )
    def test_choose_refuses(self, target: str, sources: list[str] | None, message: str) -> None:
        bundle = DomainBundle({name: make_domain(name) for name in "abc"})
        with pytest.raises(ValueError, match=exactly(message)):
            bundle.choose(target, sources)

    def test_one_domain_has_no_source(self) -> None:
        with pytest.raises(ValueError, match="sources: expected at least one domain beside the target, got none"):
            DomainBundle({"a": make_domain("a")}).choose("a")

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="domains: expected at least one domain, got none"):
            DomainBundle({})
        with pytest.raises(ValueError, match=r"a\.labels: expected classes below 2, the number of class names, got 2"):
            DomainBundle({"a": make_domain("a")}, ("x", "y"))

    def test_domain_refuses_other_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"a\.inputs: expected float32, got a float64 tensor of shape \[1, 1\]"):
            Domain("a", torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"a\.labels: expected int64, got a int32 tensor"):
            Domain("a", torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32))
        with pytest.raises(TypeError, match=r"a\.inputs: expected a torch\.Tensor, got list"):
            Domain("a", [[0.0]], torch.zeros(1, dtype=torch.int64))


class TestDigits:
    def test_domains(self) -> None:
        bundle = load_digits_domains()
        assert sum(len(domain) for domain in bundle.domains.values()) == 1797
        assert bundle.sample_shape == (1, 8, 8)
        assert bundle.classes == 10
        assert bundle.missing_classes() == {}
        again = load_digits_domains()
        for name, domain in bundle.domains.items():
            assert torch.equal(domain.inputs, again.domains[name].inputs)

    def test_no_image_is_in_two_domains(self) -> None:
        """Undo the shifts that can be undone and look for every image among the originals, once each."""
        datasets = pytest.importorskip("sklearn.datasets")
        original = torch.tensor(datasets.load_digits().images, dtype=torch.float32)
        domains = load_digits_domains().domains
        undo = {
            "plain": lambda x: x,
            "inverted": lambda x: -x,
            "mirrored": lambda x: x.flip(-1),
            "rotated-90": lambda x: torch.rot90(x, -1, (-2, -1)),
        }
        found = []
        for name, inverse in undo.items():
            images = (inverse(domains[name].inputs[:, 0]) + 1) * 8
            distance = torch.cdist(images.flatten(1), original.flatten(1))
            assert distance.min(1).values.max() < 0.2  # of 8-bit rounding
            found += distance.argmin(1).tolist()
        assert len(set(found)) == len(found)

    def test_rotations_agree_with_each_other(self) -> None:
        from transferops.data.digits import _rotated

        images = np.random.default_rng(0).random((3, 8, 8))
        np.testing.assert_allclose(_rotated(90)(images), np.rot90(images, axes=(1, 2)), atol=1e-12)
        np.testing.assert_allclose(_rotated(0)(images), images, atol=1e-12)


class TestSplit:
    def test_parts_are_disjoint_complete_and_stratified(self) -> None:
        domain = make_domain(per_class=30)
        split = few_shot_split(domain, shots=10, seed=3)
        assert split.validation is not None
        parts = [split.train, split.validation, split.test]
        assert [part.class_counts(3).tolist() for part in parts] == [[8] * 3, [2] * 3, [20] * 3]
        numbers = torch.cat([part.inputs[:, 0] for part in parts]).long()
        assert sorted(numbers.tolist()) == list(range(90))
        for part in parts:
            assert torch.equal(part.labels, domain.labels[part.inputs[:, 0].long()])

    def test_seed_decides(self) -> None:
        domain = make_domain(per_class=30)
        first, again, other = (few_shot_split(domain, 5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.train.inputs, again.train.inputs)
        assert torch.equal(first.test.inputs, again.test.inputs)
        assert not torch.equal(first.train.inputs, other.train.inputs)

    @pytest.mark.parametrize(
        ("shots", "fraction", "train", "validation"),
        [(1, 0.2, 1, 0), (2, 0.2, 1, 1), (5, 0.2, 4, 1), (10, 0.2, 8, 2), (2, 0.9, 1, 1), (5, 0.0, 5, 0)],
    )
    def test_validation_rule(self, shots: int, fraction: float, train: int, validation: int) -> None:
        split = few_shot_split(make_domain(per_class=12), shots, fraction)
        assert split.train.class_counts(3).tolist() == [train] * 3
        assert (0 if split.validation is None else len(split.validation)) == 3 * validation

    def test_absent_class_is_left_out(self) -> None:
        domain = make_domain(per_class=6)
        only = domain.subset((domain.labels != 1).nonzero()[:, 0])
        assert few_shot_split(only, 2).train.class_counts(3).tolist() == [1, 0, 1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"shots": 0}, "shots: expected an integer of at least 1, got 0"),
            ({"shots": 2.0}, "shots: expected an integer of at least 1, got 2.0"),
            (
                {"shots": 6},
                "shots: expected at most 5 for a (class 0 has 6 samples, one stays for the test), got 6",
            ),
            (
                {"shots": 2, "validation_fraction": 1.0},
                "validation_fraction: expected a number in [0, 1), got 1.0",
            ),
            ({"shots": 2, "seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ],
    )
    def test_refuses(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=exactly(message)):
            few_shot_split(make_domain(), **arguments)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "domains"),
    [
        ("digits_multi.npz", (3, 28, 28), 10, 7),
        ("office_caltech10_surf.npz", (800,), 10, 4),
        ("pacs_img64.npz", (3, 64, 64), 7, 4),
    ],
)
def test_shared_bundles(name: str, shape: tuple[int, ...], classes: int, domains: int) -> None:
    bundle = load_npz(shared_data(name))
    assert (bundle.sample_shape, bundle.classes, len(bundle.domains)) == (shape, classes, domains)
    assert bundle.missing_classes() == {}
    if len(shape) == 1:  # word counts
        mean_square = next(iter(bundle.domains.values())).inputs.square().mean(1)
        torch.testing.assert_close(mean_square, torch.ones_like(mean_square))
