"""What is kept of adapters for batches to come: copied as seldom as may be, and never out of date."""

from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import spectune
from layers.three_adapters import NAMES, alone, choice, layer, routed
from spectune.layers import stacks
from spectune.layers.values import Watched
from spectune.private import copy_all

MODELS: dict[str, Any] = {}


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_what_changes_meanwhile_is_seen(method):
    model, x, choices = layer(method), torch.randn(3, 12), ["a", {"a": 0.5, "b": 0.5}, "c"]
    stacks: Any = {}
    with spectune.route(model, choices, stacks=stacks):
        before = model(x)
        for parameter in model[0].adapters["a"].parameters():
            parameter.mul_(1.5)
        after = model(x)
        spectune.detach(model, "c")
        without = model(x)
    assert not torch.equal(before[:2], after[:2])
    torch.testing.assert_close(after[:2], alone(model, x[:2], choices[:2]))
    torch.testing.assert_close(without[2:], nn.functional.linear(x, model[0].weight, model[0].bias)[2:])
    torch.testing.assert_close(routed(model, x, ["b", "a", None], stacks=stacks), alone(model, x, ["b", "a", None]))


def by_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def by_another_tensor(parameter: nn.Parameter) -> None:
    parameter.data = parameter * 1.5


def by_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[...] *= 1.5


def by_swap(parameter: nn.Parameter) -> None:
    torch.utils.swap_tensors(parameter, nn.Parameter(parameter * 1.5, requires_grad=False))


def by_optimizer(parameter: nn.Parameter, fused: bool = False) -> None:
    before, parameter.grad = parameter.requires_grad, torch.ones_like(parameter)
    torch.optim.SGD([parameter.requires_grad_()], lr=0.1, fused=fused).step()
    parameter.grad = None
    parameter.requires_grad_(before)


def by_fused_optimizer(parameter: nn.Parameter) -> None:
    by_optimizer(parameter, fused=True)


WAYS = [by_data, by_another_tensor, by_numpy, by_swap, by_optimizer, by_fused_optimizer]


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2", "pissa:rank=2"])
@torch.no_grad()
def test_every_way_of_writing_is_seen(method, change):
    model, x, choices = layer(method), torch.randn(3, 12), ["c", "a", "b"]
    held, answers = model[0].adapters["a"], []
    with spectune.route(model, choices):
        before = model(x)
        for _ in range(3):
            for parameter in list(held.parameters()):
                change(parameter)
            answers.append((model(x), [parameter.clone() for parameter in held.parameters()]))
            assert torch.equal(model(x), answers[-1][0])
            assert not torch.equal(answers[-1][0][1], before[1])
    for answer, values in answers:
        copy_all(list(held.parameters()), values)
        torch.testing.assert_close(answer, alone(model, x, choices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_an_alias_that_is_older_than_the_context_is_looked_at(method):
    model, x, choices = layer(method), torch.randn(3, 12), ["c", "a", "b"]
    aliases = [parameter.detach() for parameter in model[0].adapters["a"].parameters()]
    with spectune.route(model, choices):
        before = model(x)
        for alias in aliases:
            alias.mul_(1.5)
        now = model(x)
    assert not torch.equal(now[1], before[1])
    torch.testing.assert_close(now, alone(model, x, choices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_parameters_are_watched_no_longer_than_they_are_kept(method):
    model, x = layer(method), torch.randn(2, 12)
    with spectune.route(model, ["a", "b"]):
        model(x)
        trained = [p for name in "ab" for p in model[0].adapters[name].parameters()]
        assert all(type(p) is Watched for p in trained)
    assert all(type(p) is nn.Parameter for p in trained)


@torch.no_grad()
def test_what_was_written_while_nobody_watched_is_seen():
    model, x, choices = layer("lora:rank=2"), torch.randn(2, 12), ["a", "b"]
    kept = [{}, {}, {}]
    for stacks_of in kept[:2]:
        routed(model, x, choices, stacks=stacks_of)
    kept[0].clear()  # the parameters are plain ones again, though the second holds copies of them
    by_data(model[0].adapters["a"][0].B)
    expected = alone(model, x, choices)
    torch.testing.assert_close(routed(model, x, choices, stacks=kept[2]), expected)
    torch.testing.assert_close(routed(model, x, choices, stacks=kept[1]), expected)


@torch.no_grad()
def test_a_rank_that_is_cut_meanwhile():
    model, x, choices = layer("lora:rank=2"), torch.randn(3, 12), ["c", "a", "b"]
    with spectune.route(model, choices):
        model(x)
        update = model[0].adapters["a"][0]
        update.A, update.B = nn.Parameter(update.A[:1]), nn.Parameter(update.B[:, :1])
        answers = [model(x), model(x)]
    for answer in answers:
        torch.testing.assert_close(answer, alone(model, x, choices))


@torch.no_grad()
def test_other_bases_than_those_of_the_batch_before():
    model, x, kept = layer("svf"), torch.randn(2, 12), {}
    routed(model, x, ["a", "b"], stacks=kept)
    spectune.detach(model)
    model[0].weight.mul_(-0.5).add_(0.3)
    for adapter in NAMES:
        spectune.adapt(model, "svf", name=adapter)
    model[0].adapters["a"][0].z.mul_(1.5)
    torch.testing.assert_close(routed(model, x, ["a", "b"], stacks=kept), alone(model, x, ["a", "b"]))


@torch.no_grad()
def test_threads_that_share_what_is_kept():
    model, kept, wrong = layer("lora:rank=2"), {}, []
    x = torch.randn(2, 12)
    expected = {choices: alone(model, x, choices) for choices in (("a", "b"), ("c", "a"))}

    def ask(choices):
        for _ in range(60):
            answer = routed(model, x, choices, stacks=kept)
            wrong.extend([choices] if not torch.allclose(answer, expected[choices], atol=1e-5) else [])

    threads = [Thread(target=ask, args=(choices,)) for choices in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_parameter_that_another_took_the_place_of_is_let_go():
    model, x = layer("lora:rank=2"), torch.randn(2, 12)
    with spectune.route(model, ["a", "b"]):
        model(x)
        update = model[0].adapters["a"][0]
        before, update.B = update.B, nn.Parameter(update.B * 2)
        model(x)
        assert type(before) is nn.Parameter
        assert type(update.B) is Watched


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(["svf", "lora:rank=2", "dora:rank=2", "pissa:rank=2"]),
    batches=st.lists(st.lists(choice, min_size=1, max_size=6), min_size=2, max_size=5),
    room=st.sampled_from([True, True, False]),
)
@torch.no_grad()
def test_batches_grow_and_shrink_and_take_turns(method, batches, room):
    """What is kept of one batch's rows serves the next one's, whoever came and went, and memory may be short."""
    if method not in MODELS:
        MODELS[method] = layer(method)
    model, kept = MODELS[method], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "has_room", lambda *_: room)
        patch.setattr(stacks, "_SPARE", 1)
        for choices in batches:
            x = torch.randn(len(choices), 12, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(
                routed(model, x, choices, stacks=kept), alone(model, x, choices), rtol=1e-4, atol=1e-4
            )


@torch.no_grad()
def test_whoever_stays_in_a_batch_is_not_copied_again(monkeypatch):
    model, kept = layer("lora:rank=2"), {}
    x = torch.randn(3, 12)
    routed(model, x, ["a", "b", None], stacks=kept)
    copied = []
    monkeypatch.setattr(stacks, "copy_all", lambda to, of: (copied.append(len(to)), copy_all(to, of)))
    expected = alone(model, x, ["c", "b", None])
    torch.testing.assert_close(routed(model, x, ["c", "b", None], stacks=kept), expected)
    assert copied == [1, 1]  # A and B of "c", in the place of those of "a"


@pytest.mark.parametrize("method", ["svf", "lora:rank=2"])
@torch.no_grad()
def test_contexts_that_share_what_is_kept_do_not_disturb_each_other(method):
    model, x, stacks = layer(method), torch.randn(2, 12), {}
    with spectune.route(model, ["a", "b"], stacks=stacks):
        outer = model(x)
        with spectune.route(model, ["c", "b"], stacks=stacks):
            inner = model(x)
        assert torch.equal(model(x), outer)
    torch.testing.assert_close(inner, alone(model, x, ["c", "b"]))


@torch.no_grad()
def test_what_is_kept_is_copied_once(monkeypatch):
    model, x, stacks = layer("lora:rank=2"), torch.randn(3, 12), {}
    first = routed(model, x, ["a", "b", "c"], stacks=stacks)
    monkeypatch.setattr(spectune.LoRA, "factors", lambda *_: pytest.fail("copied again"))
    torch.testing.assert_close(routed(model, x[[2, 0, 1]], ["c", "a", "b"], stacks=stacks), first[[2, 0, 1]])


def test_inference_mode_and_then_not(monkeypatch):
    monkeypatch.setattr(stacks, "_SPARE", 1)
    model, x, kept = layer("lora:rank=2"), torch.randn(12, 12), {}
    for rows in (12, 1, 2):
        choices = ["a", "b", "c", *[{"a": 0.5, "b": 0.5}] * 9][:rows]
        with torch.inference_mode():
            routed(model, x[:rows], choices, stacks=kept)
        with torch.no_grad():
            torch.testing.assert_close(
                routed(model, x[:rows], choices[::-1], stacks=kept), alone(model, x[:rows], choices[::-1])
            )
    model, x, kept = layer("lora:rank=2"), torch.randn(2, 12), {}
    with torch.inference_mode():
        expected = routed(model, x, ["a", "b"], stacks=kept)
    with torch.no_grad():
        model[0].adapters["a"][0].B.mul_(1.0)  # written to, so that it is copied again
        torch.testing.assert_close(routed(model, x, ["a", "b"], stacks=kept), expected)
    with torch.inference_mode():
        made_there = layer("lora:rank=2")
        torch.testing.assert_close(routed(made_there, x, ["a", "b"]), alone(made_there, x, ["a", "b"]))
