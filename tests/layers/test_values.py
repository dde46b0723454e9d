"""W is written to while adapters are on it: what answers, and what is saved, goes by the values that are there."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

import spectune
from spectune import SVF, SVFT, Adapter, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, SpectuneError
from spectune.layers.values import PLAIN, Watched

NEW = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))


def swap(weight: nn.Parameter) -> None:
    weight.data.copy_(NEW)


def one_element(weight: nn.Parameter) -> None:
    weight.data[3, 5] += 4


def numpy_view(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] = NEW.numpy()


def numpy_itself(weight: nn.Parameter) -> None:
    weight.numpy()[2:] += 1


def array_later(weight: nn.Parameter) -> None:
    np.asarray(weight)[3, 5] += 4


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def fused_optimizer(weight: nn.Parameter) -> None:
    before, weight.grad = weight.requires_grad, torch.ones_like(weight)
    torch.optim.AdamW([weight.requires_grad_()], lr=0.5, fused=True).step()
    weight.grad = None
    weight.requires_grad_(before)


def another_tensor(weight: nn.Parameter) -> None:
    weight.data = NEW.clone()


WAYS = [swap, one_element, in_place, fused_optimizer, another_tensor, numpy_view, numpy_itself, array_later]
METHODS = [DoRA(LoRA(4)), DoRA(SVF()), DoRA(PiSSA(4)), SVF(), SVFT(pattern="banded", width=2), PiSSA(4), LoRAXS(4)]
METHODS += [MiLoRA(4, dropout=0.0), LoRA(4)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def trained(method: spectune.Method, factored: bool = False) -> nn.Sequential:
    adapted = spectune.adapt(model(), method, factored=factored)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return adapted


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def dense(adapted: nn.Sequential, x: Tensor) -> Tensor:
    """Return the answer of plain layers with W' of what is there, in float64."""
    adapter, total = spectune.extract(adapted), x.double()
    for i in (0, 2):
        layer = adapted[i]
        weight = layer.weight.double() + adapter.delta(str(i)).double()
        total = total @ weight.mT + layer.bias.double()
        total = total.tanh() if i == 0 else total
    return total.float()


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_way_of_answering_and_saving_goes_by_the_weight_that_is_there(
    method: spectune.Method, change: Callable[[nn.Parameter], None], x: Tensor, tmp_path: Path
) -> None:
    adapted = trained(method, factored=True)
    with torch.no_grad():
        before = adapted(x)  # what is kept from now on was made of the old weight
        with spectune.route(adapted, ["default"] * 5):
            adapted(x)
    adapted(x).sum().backward()
    change(adapted[0].weight)
    expected = dense(adapted, x)
    assert (expected - before).abs().max() > 0.01
    with torch.no_grad():
        answers = [adapted.eval()(x), adapted.train()(x)]
        with spectune.route(adapted, ["default", None, "default", "default", "default"]):
            answers.append(torch.cat([expected[:0], adapted.eval()(x)]))
            answers[-1][1] = expected[1]
    answers.append(adapted.train()(x).detach())
    base = model()
    base[0].weight.data.copy_(adapted[0].weight)
    spectune.extract(adapted).save(tmp_path / "a")
    again = spectune.attach(copy.deepcopy(base), Adapter.load(tmp_path / "a"), trainable=True, factored=True)
    answers.append(again(x).detach())
    spectune.extract(again).save(tmp_path / "b")
    answers.append(spectune.attach(base, Adapter.load(tmp_path / "b"))(x))
    answers.append(spectune.merge(adapted)(x).detach())
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=2e-6)


def test_another_adapter_is_not_put_on_the_singular_vectors_of_an_old_weight(x: Tensor) -> None:
    adapted = trained(SVF())
    swap(adapted[0].weight)
    with pytest.raises(SpectuneError, match="the weight of '0' is another one than when the adapters there"):
        spectune.adapt(adapted, SVF(), name="second")
    spectune.adapt(spectune.detach(adapted), SVF())
    torch.testing.assert_close(adapted(x), model_with(NEW)(x))


def test_a_second_dora_starts_at_the_norms_of_the_weight_that_is_there(x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4)))
    swap(adapted[0].weight)
    spectune.adapt(adapted, DoRA(LoRA(4)), name="second")
    torch.testing.assert_close(adapted(x), model_with(NEW)(x))


@pytest.mark.parametrize("change", WAYS)
@torch.no_grad()
def test_what_changes_within_fused_is_seen_by_every_pass(change: Callable[[nn.Parameter], None], x: Tensor) -> None:
    adapted = trained(LoRA(4)).eval()
    with spectune.fused(adapted):
        adapted(x)
        change(adapted[0].weight)
        for _ in range(6):
            torch.testing.assert_close(adapted(x), dense(adapted, x), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_what_was_written_between_two_watches_is_seen(x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4))).eval()
    for _ in range(2):
        with spectune.fused(adapted):
            torch.testing.assert_close(adapted(x), dense(adapted, x), rtol=1e-5, atol=2e-6)
        swap(adapted[0].weight)
        torch.testing.assert_close(adapted(x), dense(adapted, x), rtol=1e-5, atol=2e-6)


def test_a_step_counts_for_what_it_writes_alone(x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4)))
    adapted(x).sum().backward()
    parameters = list(adapted.parameters())
    versions = [parameter._version for parameter in parameters]
    watched = [type(parameter) is Watched for parameter in parameters]
    torch.optim.SGD(parameters, lr=0.1, fused=True).step()
    for parameter, version, is_watched in zip(parameters, versions, watched, strict=True):
        assert (parameter._version > version) == (is_watched and parameter.grad is not None)


def test_what_is_saved_while_it_is_watched_is_a_plain_parameter(x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4))).eval()
    with torch.no_grad():
        adapted(x)
    weight = adapted[0].weight
    assert type(weight) is Watched
    file = io.BytesIO()
    torch.save([weight, weight], file)
    file.seek(0)
    one, same = torch.load(file, weights_only=True)
    assert type(one) is nn.Parameter
    assert one is same
    assert not vars(one)
    assert torch.equal(one, weight)
    assert not weight.asked
    assert not weight.lent


@pytest.mark.parametrize("of", ["weight", "B"])
@torch.no_grad()
def test_what_was_lent_is_looked_at_as_long_as_it_is_there(of: str, x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4))).eval()
    layer = adapted[0]
    held = layer.weight if of == "weight" else layer.adapters["default"][0].B
    adapted(x)
    with spectune.fused(adapted):
        array = held.detach().numpy()
        for _ in range(6):
            array *= 1.2
            torch.testing.assert_close(adapted(x), dense(adapted, x), rtol=1e-5, atol=2e-6)
        del array
        adapted.state_dict()
        for _ in range(6):
            torch.testing.assert_close(adapted(x), dense(adapted, x), rtol=1e-5, atol=2e-6)
    seen = layer.weight_values.of(layer.weight, layer.weight)
    assert layer.weight_values.of(layer.weight, layer.weight) is seen  # nobody holds it: it is not looked at


@torch.no_grad()
def test_a_state_that_is_refused_where_weights_hold_the_sum_changes_nothing(x: Tensor) -> None:
    adapted = trained(LoRA(4)).eval()
    expected = adapted(x)
    with spectune.fused(adapted, where="inplace"):
        with pytest.raises(SpectuneError, match="leave the context"):
            adapted.state_dict()
        adapted[0].weight.detach()
        torch.testing.assert_close(adapted(x), expected)


def model_with(weight: Tensor) -> nn.Sequential:
    plain = model()
    plain[0].weight.data.copy_(weight)
    return plain


def test_a_weight_that_comes_back_has_its_singular_vectors_again() -> None:
    adapted = trained(SVF())
    own = adapted[0].weight.detach().clone()
    swap(adapted[0].weight)
    assert not adapted[0].owns("svf")
    adapted[0].weight.data.copy_(own)
    assert adapted[0].owns("svf")
    assert not spectune.extract(adapted).layers["0"].terms[0].stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_is_only_rounded_is_the_same(dtype: torch.dtype) -> None:
    assert trained(SVF()).to(dtype)[0].owns("svf")


def test_parameters_are_watched_as_long_as_adapters_are_there(x: Tensor) -> None:
    adapted = trained(DoRA(LoRA(4)))
    with torch.no_grad():
        adapted(x)
    assert type(adapted[0].weight) is Watched
    copied = copy.deepcopy(adapted)
    assert type(copied[0].weight) in PLAIN
    torch.testing.assert_close(copied(x), adapted(x))
    spectune.detach(adapted)
    assert type(adapted[0].weight) is nn.Parameter


def taking_all_of_a_row(eps: float) -> nn.Sequential:
    """Return a model whose adapter leaves `eps` of the third row of W."""
    adapted = trained(DoRA(LoRA(4)))
    layer = adapted[0]
    (update,) = layer.adapters["default"]
    with torch.no_grad():
        update.A[0] = layer.weight[3]
        update.B[3] = torch.tensor([-(1 - eps) / update.method.inner.scale, 0, 0, 0])
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_compiled_dora_is_right_where_it_takes_nearly_all_of_a_row(eps: float, x: Tensor) -> None:
    adapted = taking_all_of_a_row(eps)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    answer, expected = compiled(x), adapted(x)
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (answer, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_compiled_dora_goes_by_the_weight_that_is_there(x: Tensor) -> None:
    adapted = trained(DoRA(SVF()))
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapted(x))
    swap(adapted[0].weight)
    torch.testing.assert_close(compiled(x), adapted(x))
