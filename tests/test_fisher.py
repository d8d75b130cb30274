"""Theta^T J Theta against J^T H J formed explicitly in float64, on the layers that are easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transferops.fisher import (
    FisherInformation,
    LowRank,
    parameter_differences,
    softmax_fisher_gram,
    tangent_gram,
)

CLASSES = 4


class Attention(nn.Module):
    """One self-attention block over [N, 5, 6] through F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 3)).movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(self.norm(x + attended.transpose(-2, -3).flatten(-2)).mean(1))


class Tied(nn.Module):
    """The same weight going in and, transposed, coming out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CLASSES, CLASSES)
        self.second = nn.Linear(CLASSES, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(30, CLASSES)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, CLASSES)), (3,)),
    "conv_group_norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.GroupNorm(3, 6),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ),
        (2, 5, 4),
    ),
    "batch_norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(30, CLASSES)),
        (2, 5, 4),
    ),
    "attention": (Attention, (5, 6)),
    "transformer_encoder": (encoder, (5, 6)),
    "tied": (Tied, (CLASSES,)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The model, in training mode and with batch-norm statistics of its own, and nine inputs."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype)
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.copy_(1 + torch.rand_like(buffer))
    return model.train(), torch.randn(9, *shape, dtype=dtype)


def random_directions(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for name, p in model.named_parameters()
        }
        for _ in range(count)
    ]


def explicit_gram(model: nn.Module, directions: list[dict[str, Tensor]], inputs: Tensor, loss: str) -> Tensor:
    """J_n by reverse mode, H_n and the directions as matrices, in float64; evaluation mode is set here."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        jacobians = jacrev(lambda moving: functional_call(model, moving, (inputs,)))(parameters)
        outputs = functional_call(model, parameters, (inputs,))
    jacobian = torch.cat([jacobians[name].flatten(2) for name in parameters], -1)
    theta = torch.stack([torch.cat([d[name].flatten() for name in parameters]) for d in directions], -1)
    gram = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for jacobian_n, output in zip(jacobian, outputs):
        p = output.softmax(-1)
        curvature = torch.diag(p) - torch.outer(p, p) if loss == "cross_entropy" else torch.eye(CLASSES).double()
        gram += theta.T @ jacobian_n.T @ curvature @ jacobian_n @ theta
    for module, training in modes.items():
        module.training = training
    return gram / len(inputs)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_gram_is_the_explicit_one(name: str, loss: str) -> None:
    model, inputs = build(name)
    directions = random_directions(model, 5)
    expected = explicit_gram(model, directions, inputs, loss)
    for chunk_size in (None, 1, 2):
        fisher = FisherInformation(model, loss=loss, chunk_size=chunk_size)
        gram = fisher.gram(directions, [(inputs, None)])
        torch.testing.assert_close(gram, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(gram, gram.T)
        assert torch.linalg.eigvalsh(gram)[0] > -1e-12 * gram.trace()
        assert gram.dtype is torch.float64
        assert not gram.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", ["mlp", "conv_group_norm", "attention"])
def test_lower_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, inputs = build(name, dtype)
    directions = random_directions(model, 3)
    gram = FisherInformation(model).gram(directions, [inputs])
    exact = [{key: value.double() for key, value in direction.items()} for direction in directions]
    expected = explicit_gram(model.double(), exact, inputs.double(), "cross_entropy")
    assert (gram - expected).norm() <= tolerance * expected.norm()


def test_contraction_accumulates_in_float64() -> None:
    """2^20 samples of float16 tangents whose products would all be lost in a half or single precision sum."""
    samples = 1 << 20
    logits = torch.zeros(samples, 2, dtype=torch.float16)
    tangents = torch.tensor([0.1, -0.1], dtype=torch.float16).expand(1, samples, 2)
    value = float(torch.tensor(0.1, dtype=torch.float16)) ** 2
    assert softmax_fisher_gram(logits, tangents).item() == pytest.approx(samples * value, rel=1e-12)
    assert tangent_gram(tangents).item() == pytest.approx(2 * samples * value, rel=1e-12)


def test_contraction_slices_agree_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transferops.fisher.contraction._SLICE_ELEMENTS", 50)
    logits, tangents = torch.randn(23, 5).double(), torch.randn(4, 23, 5).double()
    p = logits.softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("knc,ncd,lnd->kl", tangents, curvature, tangents)
    untouched = tangents.clone()
    torch.testing.assert_close(softmax_fisher_gram(logits, tangents), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        tangent_gram(tangents), torch.einsum("knc,lnc->kl", tangents, tangents), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(tangents, untouched)


def test_contraction_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form, for devices that a build has no kernels for, against the op."""
    logits, tangents = torch.randn(23, 5).double(), torch.randn(4, 23, 5).double()
    by_kernel = softmax_fisher_gram(logits, tangents)
    monkeypatch.setattr("transferops.fisher.contraction.has_kernels", lambda device: False)
    monkeypatch.setattr("transferops.fisher.contraction.ops", None)
    torch.testing.assert_close(softmax_fisher_gram(logits, tangents), by_kernel, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contraction_on_the_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, as on the CPU."""
    monkeypatch.setattr("transferops.fisher.contraction._gram", None)
    logits, tangents = torch.randn(23, 1030).to(dtype), torch.randn(4, 23, 1030).to(dtype)
    found = softmax_fisher_gram(logits.cuda(), tangents.cuda())
    torch.testing.assert_close(found.cpu(), softmax_fisher_gram(logits, tangents), rtol=1e-4, atol=1e-4)


def test_a_common_shift_of_the_logits_carries_no_information() -> None:
    tangents = torch.full((1, 6, 5), 1e6)
    assert softmax_fisher_gram(torch.randn(6, 5), tangents).abs().item() < 1e-9


def test_batches_and_order_do_not_matter() -> None:
    model, inputs = build("conv_group_norm")
    directions = random_directions(model, 4)
    fisher = FisherInformation(model)
    whole = fisher.gram(directions, [inputs])
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(fisher.gram(directions, inputs.split(2)), whole, **close)
    torch.testing.assert_close(fisher.gram(directions, iter([inputs[5:], inputs[:5]])), whole, **close)
    torch.testing.assert_close(fisher.gram(directions, [inputs[torch.randperm(9)]]), whole, **close)
    first, rest = fisher.gram(directions, [inputs[:3]]), fisher.gram(directions, [inputs[3:]])
    torch.testing.assert_close((3 * first + 6 * rest) / 9, whole, **close)
    torch.testing.assert_close(fisher.gram(directions[2:3], [inputs]), whole[2:3, 2:3], **close)


def test_left_out_parameters_do_not_move() -> None:
    model, inputs = build("mlp")
    fisher = FisherInformation(model)
    full = random_directions(model, 2)
    partial = [{"0.weight": full[0]["0.weight"]}, {"3.bias": full[1]["3.bias"]}, {}]
    padded = [{n: d.get(n, torch.zeros_like(p)) for n, p in model.named_parameters()} for d in partial]
    gram = fisher.gram(partial, [inputs])
    torch.testing.assert_close(gram, fisher.gram(padded, [inputs]), rtol=1e-12, atol=1e-14)
    assert gram[:2, :2].abs().min() > 0
    assert gram[2].abs().max() == 0


def test_either_name_of_a_tied_parameter() -> None:
    model, inputs = build("tied")
    fisher = FisherInformation(model)
    step = torch.randn(CLASSES, CLASSES).double()
    gram = fisher.gram([{"first.weight": step}], [inputs])
    assert torch.equal(fisher.gram([{"second.weight": step}], [inputs]), gram)
    assert torch.equal(fisher.gram([{"second.weight": step, "first.weight": step.clone()}], [inputs]), gram)
    message = r"^directions\[0\]\['second.weight'\]: expected the values of 'first.weight', to which it is tied"
    with pytest.raises(ValueError, match=message):
        fisher.gram([{"first.weight": step, "second.weight": 2 * step}], [inputs])


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, CLASSES), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        assert not any(module.training for module in self.modules())
        raise ArithmeticError


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool) -> None:
    model, inputs = (Failing(), torch.randn(2, 3)) if fails else build("batch_norm")
    first = next(model.children())
    first.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    fisher, directions = FisherInformation(model), random_directions(model, 2)
    if fails:
        with pytest.raises(ArithmeticError):
            fisher.gram(directions, [inputs])
    else:
        fisher.gram(directions, [inputs])
    assert [module.training for module in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_surrounding_gradient_mode_does_not_matter(context: Callable[[], Any]) -> None:
    model, inputs = build("attention")
    directions = random_directions(model, 2)
    expected = FisherInformation(model).gram(directions, [inputs])
    with context():
        gram = FisherInformation(model).gram(directions, [inputs.clone()])
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=0)


class Cube(torch.autograd.Function):
    """A function of the user's own with a forward-mode derivative but no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def test_a_loop_serves_models_that_vmap_refuses() -> None:
    class Cubed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(super().forward(x))

    class Plain(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 3

    torch.manual_seed(0)
    model, inputs = Cubed(3, CLASSES).double(), torch.randn(5, 3).double()
    plain = Plain(3, CLASSES).double()
    plain.load_state_dict(model.state_dict())
    directions = random_directions(model, 3)
    expected = explicit_gram(plain, directions, inputs, "cross_entropy")
    for chunk_size in (None, 1):
        gram = FisherInformation(model, chunk_size=chunk_size).gram(directions, [inputs])
        torch.testing.assert_close(gram, expected)


def test_differences_are_over_trainable_parameters() -> None:
    reference, inputs = build("batch_norm", torch.float32)
    source, _ = build("batch_norm", torch.float32)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    reference[0].bias.requires_grad_(False)
    from_module, from_state = parameter_differences([source, source.state_dict()], reference)
    assert list(from_module) == ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]
    for name, value in from_module.items():
        assert torch.equal(value, source.get_parameter(name) - reference.get_parameter(name))
        assert torch.equal(value, from_state[name])
        assert not value.requires_grad
    gram = FisherInformation(reference).gram([from_module, from_state], [inputs])
    assert gram[0, 0] > 0
    torch.testing.assert_close(gram, gram[0, 0].expand(2, 2))


def test_differences_of_half_precision_models_are_formed_in_float32() -> None:
    reference, source = nn.Linear(50, 3).bfloat16(), nn.Linear(50, 3).bfloat16()
    (difference,) = parameter_differences([source], reference)
    assert torch.equal(difference["weight"], source.weight.detach().float() - reference.weight.detach().float())


def test_differences_of_selected_parameters() -> None:
    reference, _ = build("mlp")
    other = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, CLASSES + 2)).double()
    (by_predicate,) = parameter_differences([other], reference, lambda name: name.startswith("0."))
    (by_name,) = parameter_differences([other], reference, ["0.bias", "0.weight"])
    assert list(by_predicate) == list(by_name) == ["0.weight", "0.bias"]


def test_differences_of_tied_parameters_appear_once() -> None:
    (reference, _), source = build("tied"), Tied().double()
    (difference,) = parameter_differences([source.state_dict()], reference)
    assert list(difference) == ["first.weight", "first.bias", "second.bias"]


LINEAR = nn.Linear(3, CLASSES)
INPUTS = torch.ones(2, 3)
STEP = {"bias": torch.ones(CLASSES)}


def gram(directions: Any = (STEP,), batches: Any = (INPUTS,), model: nn.Module = LINEAR) -> Tensor:
    return FisherInformation(model).gram(directions, batches)


def no_batches() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FisherInformation(3), TypeError, "model: expected a torch.nn.Module, got 3"),
        (
            lambda: FisherInformation(LINEAR, "diagonal"),
            ValueError,
            "estimator: expected 'exact' or 'monte_carlo' or 'empirical', got 'diagonal'",
        ),
        (
            lambda: FisherInformation(LINEAR, loss="hinge"),
            ValueError,
            "loss: expected 'cross_entropy' or 'mse', got 'hinge'",
        ),
        (
            lambda: FisherInformation(LINEAR, chunk_size=0),
            ValueError,
            "chunk_size: expected an integer of at least 1, got 0",
        ),
        (
            lambda: gram(STEP),
            TypeError,
            "directions: expected a list of dictionaries from parameter name to tensor, of modules or of flat vectors, "
            "got dict",
        ),
        (lambda: gram([]), ValueError, "directions: expected at least one direction, got none"),
        (
            lambda: gram([{}]),
            ValueError,
            "directions: expected at least one parameter to move, got empty dictionaries",
        ),
        (
            lambda: gram([STEP, 3]),
            TypeError,
            "directions[1]: expected a dictionary from parameter name to tensor, a module or a flat vector, got 3",
        ),
        (
            lambda: gram([STEP, STEP["bias"]]),
            ValueError,
            "directions[1]: expected a flat vector over the 16 selected elements, "
            "got a float32 tensor of shape [4] on cpu",
        ),
        (
            lambda: gram([torch.ones(16, dtype=torch.int64)]),
            TypeError,
            "directions[0]: expected a floating-point tensor, got a int64 tensor of shape [16] on cpu",
        ),
        (
            lambda: gram([nn.Linear(3, 9)]),
            ValueError,
            "directions[0]: expected 'weight' of shape [4, 3], as in the reference, got shape [9, 3]",
        ),
        (
            lambda: gram([{"bias": LowRank(torch.ones(4, 1), torch.ones(1, 1))}]),
            ValueError,
            "directions[0]['bias']: expected factors of a parameter of shape [4], "
            "got factors of shapes [4, 1] and [1, 1]",
        ),
        (
            lambda: gram([{"weight": LowRank(torch.ones(4, 2), torch.ones(2, 4))}]),
            ValueError,
            "directions[0]['weight']: expected factors of a parameter of shape [4, 3], "
            "got factors of shapes [4, 2] and [2, 4]",
        ),
        (
            lambda: gram([{"weight": LowRank(torch.ones(4, 2), torch.ones(1, 3))}]),
            ValueError,
            "directions[0]['weight']: expected factors of one rank, at least 1, got ranks 2 and 1",
        ),
        (
            lambda: gram([{"weight": LowRank(torch.ones(4, 2), torch.full((2, 3), torch.nan))}]),
            ValueError,
            "directions[0]['weight']: expected finite values, got infinities or NaN among them",
        ),
        (
            lambda: gram([{"scale": STEP["bias"]}]),
            ValueError,
            "directions[0]: expected names of the model's parameters, got 'scale'",
        ),
        (
            lambda: gram([{"bias": torch.ones(CLASSES, dtype=torch.int64)}]),
            TypeError,
            "directions[0]['bias']: expected a floating-point tensor, got a int64 tensor of shape [4] on cpu",
        ),
        (
            lambda: gram([STEP, {"bias": torch.ones(3)}]),
            ValueError,
            "directions[1]['bias']: expected shape [4], as the parameter, got shape [3]",
        ),
        (
            lambda: gram([{"bias": torch.ones(CLASSES, device="meta")}]),
            ValueError,
            "directions[0]['bias']: expected a tensor on cpu, as the parameter, got one on meta",
        ),
        (
            lambda: gram([{"bias": torch.tensor([1.0, torch.inf, 0, 0])}]),
            ValueError,
            "directions[0]['bias']: expected finite values, got infinities or NaN among them",
        ),
        (
            lambda: gram(batches=INPUTS),
            TypeError,
            "batches: expected an iterable of batches, such as [inputs], got a float32 tensor of shape [2, 3] on cpu",
        ),
        (lambda: gram(batches=[]), ValueError, "batches: expected at least one sample, got none"),
        (lambda: gram(batches=no_batches()), ValueError, "batches: expected at least one sample, got none"),
        (
            lambda: gram(batches=[INPUTS, (INPUTS[:0], None)]),
            ValueError,
            "batches[1]: expected at least one sample, got inputs of shape [0, 3]",
        ),
        (
            lambda: gram(batches=[{"x": 3}]),
            TypeError,
            "batches[0]: expected a tensor of inputs, a mapping with tensors of inputs, or (inputs, targets), got dict",
        ),
        (
            lambda: gram(batches=[torch.ones(3)]),
            ValueError,
            "model: expected outputs of shape [3, C] or [3, T, C], got shape [4]",
        ),
        (
            lambda: gram(batches=[INPUTS * torch.inf]),
            ValueError,
            "model: expected finite outputs and derivatives, got infinities or NaN among them",
        ),
        (
            lambda: gram(model=nn.Identity()),
            ValueError,
            "model: expected a module with parameters, got one without",
        ),
        (
            lambda: softmax_fisher_gram(INPUTS, torch.ones(4, 3, 2)),
            ValueError,
            "tangents: expected shape [K, 2, 3] on cpu, as the logits, got a float32 tensor of shape [4, 3, 2] on cpu",
        ),
        (
            lambda: softmax_fisher_gram(INPUTS.int(), torch.ones(4, 2, 3)),
            TypeError,
            "logits: expected a floating-point tensor, got a int32 tensor of shape [2, 3] on cpu",
        ),
        (
            lambda: tangent_gram(INPUTS),
            ValueError,
            "tangents: expected 3 dimensions, got a float32 tensor of shape [2, 3] on cpu",
        ),
        (
            lambda: parameter_differences([LINEAR], {}),
            TypeError,
            "reference: expected a torch.nn.Module, got dict",
        ),
        (
            lambda: parameter_differences(LINEAR, LINEAR),
            TypeError,
            "models: expected a sequence of modules or state dictionaries, got one Linear",
        ),
        (
            lambda: parameter_differences([LINEAR, 3], LINEAR),
            TypeError,
            "models[1]: expected a torch.nn.Module or a state dictionary, got 3",
        ),
        (
            lambda: parameter_differences([{"weight": LINEAR.weight}], LINEAR),
            ValueError,
            "models[0]: expected a parameter named 'bias', as in the reference, got no such parameter",
        ),
        (
            lambda: parameter_differences([nn.Linear(3, 9)], LINEAR),
            ValueError,
            "models[0]: expected 'weight' of shape [4, 3], as in the reference, got shape [9, 3]",
        ),
        (
            lambda: parameter_differences([LINEAR], LINEAR, dtype=torch.int8),
            ValueError,
            "dtype: expected a floating-point type, got torch.int8",
        ),
        (
            lambda: parameter_differences([LINEAR], LINEAR, ["scale"]),
            ValueError,
            "parameters: expected names of trainable parameters of the reference, got 'scale'",
        ),
        (
            lambda: parameter_differences([LINEAR], LINEAR, "bias"),
            TypeError,
            "parameters: expected a predicate or a collection of names, got 'bias'",
        ),
        (
            lambda: parameter_differences([LINEAR], LINEAR, lambda name: False),
            ValueError,
            "parameters: expected at least one of 2 trainable parameters to be selected, got none",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_refuses_outputs_that_are_not_one_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return x, super().forward(x)

    with pytest.raises(TypeError, match=r"^model: expected one tensor of outputs \[N, C\] or \[N, T, C\], got tuple$"):
        gram(model=Pair(3, CLASSES))
