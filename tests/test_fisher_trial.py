"""What a model does behind the routes' back is seen on one or two samples, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_models import Coupled, Recurrent, dense, directions, flatten
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from transferops.fisher import FisherInformation, LowRank
from transferops.fisher.estimation import Estimation

CLASSES, SAMPLES = 3, 5  # as in fisher_models


class Hidden(nn.Module):
    """Two layers, of which the first has its weight in a list, too, where ``torch.func`` does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.also = [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.body(x)), self.also[0]))


class Faint(nn.Module):
    """A layer whose weight is read a second time, with an effect far below the tolerance of a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        return self.head(x + 1e-6 * F.linear(x, self.body.weight))


class Sorting(nn.Module):
    """Runs its batch in the order of the samples' first feature, and puts the outputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.body(x[order]))[order.argsort()])


class Padded(nn.Module):
    """An embedding called by keyword, or by its function, of which forward mode forgets the padding."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, CLASSES)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.table.weight, padding_idx=0) if self.functional else self.table(input=x)
        return self.head(rows.mean(1).tanh())


class Square(torch.autograd.Function):
    """A function of the user's own with nothing but a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Square.apply(self.body(x)))


class Unpadded(nn.Module):
    """Layers over the rows of all tokens but padding: 3 of the first and of the last sample, and on average."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = self.second(torch.tanh(self.body(x[mask])))
        return self.head(x.new_zeros(x.shape).index_put((mask,), rows.tanh()).sum(1))


class Packed(Unpadded):
    """The same over a packed sequence, in which the samples take turns."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False)
        rows = packed._replace(data=self.second(torch.tanh(self.body(packed.data))).tanh())
        return self.head(rnn.pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])[0].sum(1))


class Routed(nn.Module):
    """Two experts, each for the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        positive = tokens[:, 0] > 0
        outputs = torch.zeros_like(tokens).index_put((positive,), self.first(tokens[positive]))
        outputs = outputs.index_put((~positive,), self.second(tokens[~positive]))
        return self.head(outputs.view_as(x).tanh().mean(1))


def vectors() -> Tensor:
    x = torch.randn(SAMPLES, 4).double()
    x[0, 0], x[-1, 0] = -9, 9  # in the order in which they are sorted
    return x


def tokens() -> Tensor:
    return torch.randint(5, (SAMPLES, 3))


def masked() -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, 4, 4).double(), "mask": torch.arange(4) < torch.tensor([[3], [2], [4], [3], [3]])}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "hidden": (Hidden, vectors),
    "faint": (Faint, vectors),
    "sorting": (Sorting, vectors),
    "padded by keyword": (lambda: Padded(False), tokens),
    "padded by function": (lambda: Padded(True), tokens),
    "backward only": (Squared, vectors),
    "unpadded": (Unpadded, masked),
    "packed": (Packed, masked),
    "routed": (Routed, lambda: torch.randn(SAMPLES, 3, 4).double()),
    "data parallel": (lambda: nn.DataParallel(Squared()), vectors),
    "bags": (lambda: nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean"), nn.Tanh(), nn.Linear(4, CLASSES)), tokens),
}


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_what_formulas_and_forward_mode_do_not_see(name: str, estimator: str) -> None:
    torch.manual_seed(0)
    make, inputs_of = MODELS[name]
    model, inputs, targets = make().double(), inputs_of(), torch.randint(CLASSES, (SAMPLES,))
    expected, batches = dense(model, inputs, targets, estimator, "cross_entropy"), [(inputs, targets)]
    steps = directions(model, 2)
    theta = torch.stack([flatten(step, model) for step in steps])
    fisher = FisherInformation(model, estimator)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(flatten(fisher.diagonal(batches), model), expected.diag(), **close)
    torch.testing.assert_close(fisher.gram(steps, batches), theta @ expected @ theta.T, **close)
    torch.testing.assert_close(flatten(fisher.matvec(steps[0], batches), model), expected @ theta[0], **close)


def test_hooks_on_gradients_of_parameters_do_not_count() -> None:
    """They are given sums of gradients, and what they make of them is not the model's derivative."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double(), vectors()
    (step,), fisher = directions(model, 1), FisherInformation(model)
    expected = fisher.diagonal([inputs]), fisher.matvec(step, [inputs])
    seen: list[Tensor] = []
    for p in model.parameters():
        p.register_hook(lambda g: seen.append(g) or 2 * g)
    for before, after in zip(expected, (fisher.diagonal([inputs]), fisher.matvec(step, [inputs]))):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not seen
    assert "per sample" not in fisher.explain(inputs)
    model(inputs).sum().backward()
    assert len(seen) == 4


def test_products_without_a_forward_mode() -> None:
    torch.manual_seed(0)
    model, inputs = Squared().double(), vectors()
    product = LowRank(torch.randn(4, 2).double(), torch.randn(2, 4).double())
    fisher = FisherInformation(model)
    whole = fisher.gram([{"body.weight": product.left @ product.right}], [inputs])
    torch.testing.assert_close(fisher.gram([{"body.weight": product}], [inputs]), whole)


def test_fused_recurrent_layers_have_forward_mode_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's LSTM, which float32 takes on a CPU, has none; the plain one has."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("expected no backward pass for each output")

    monkeypatch.setattr(Estimation, "_outputs_one_by_one", refuse)
    torch.manual_seed(0)
    model, inputs = Recurrent(nn.LSTM), torch.randn(SAMPLES, 3, 3)
    steps = directions(model.double(), 2)
    expected = FisherInformation(model).gram(steps, [inputs.double()])
    found = FisherInformation(model.float()).gram(steps, [inputs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert torch.backends.mkldnn.enabled


def test_effective_dimension_of_samples_with_and_without_positions() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).mean(1))

    torch.manual_seed(0)
    model = Pooled().double()
    batches = [(torch.randn(2, t, 4).double(), torch.randint(CLASSES, (2,))) for t in (1, 4, 1)]
    for some in (batches, batches[1:]):
        fisher = FisherInformation(model, "empirical")
        eigenvalues = torch.linalg.eigvalsh(fisher.gram(torch.eye(35).double(), some)).clamp_min(0)
        found = fisher.effective_dimension(0.1, some)
        assert found.method == "samples"
        assert found.value == pytest.approx(float((eigenvalues / (eigenvalues + 0.1)).sum()), rel=1e-9)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 200), (torch.uint8, 300), (torch.int8, 150)])
def test_labels_of_few_bits(dtype: torch.dtype, classes: int) -> None:
    """-100 is class 156 in 8 unsigned bits, and 300 classes are 44."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, classes).double(), torch.randn(4, 4).double()
    few = torch.tensor([156, 3, 120, 0] if dtype is torch.uint8 else [-100, 3, 120, 0], dtype=dtype)
    fisher = FisherInformation(model, "empirical")
    found = fisher.diagonal([(inputs, few)])["weight"]
    torch.testing.assert_close(found, fisher.diagonal([(inputs, few.long())])["weight"], rtol=0, atol=0)
    assert (found[few.long()[0]].norm() > 0.01) == (dtype is torch.uint8)


class Random(nn.Linear):
    """Dropout that does not ask for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x))


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).long()


@pytest.mark.parametrize("make", [Coupled, lambda: Random(4, CLASSES)], ids=["coupled", "random"])
@pytest.mark.parametrize("method", ["gram", "quadratic", "matvec", "diagonal"])
def test_samples_that_depend_on_each_other_are_refused(method: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = make().double(), vectors()
    fisher, (step,) = FisherInformation(model), directions(model, 1)
    calls: dict[str, Callable[[], object]] = {
        "gram": lambda: fisher.gram([step, step], [inputs]),
        "quadratic": lambda: fisher.quadratic(step, [inputs]),
        "matvec": lambda: fisher.matvec(step, [inputs]),
        "diagonal": lambda: fisher.diagonal([inputs]),
    }
    with pytest.raises(ValueError, match=r"^model: expected outputs of a sample that do not depend on"):
        calls[method]()


def test_refuses_outputs_that_are_integers() -> None:
    message = r"^model: expected floating-point outputs, got a int64 tensor of shape \[2, 3\] on cpu$"
    for estimator in ("exact", "empirical"):
        with pytest.raises(TypeError, match=message):
            FisherInformation(Rounded(4, CLASSES), estimator).trace([(torch.randn(2, 4), torch.tensor([0, 1]))])
