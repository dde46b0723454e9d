"""What answers in threads, tasks and generators, and in backward passes that run layers again."""

import asyncio
import copy
import threading
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import spectune
import tiny
from spectune import SpectuneError
from spectune.model.routing import base_alone

NAMES = ("a", "b", "c")


def network(method="lora:rank=2") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    for name in NAMES:
        spectune.adapt(model, method, name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def answers(model, x):
    """Return what each adapter, and None the base, answers to one row."""
    found = {}
    for name in (*NAMES, None):
        found[name] = spectune.activate(model, name)(x)
    return found


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2", "svf"])
def test_threads_with_a_route_each(method):
    model, x = network(method), torch.randn(1, 8)
    expected = answers(model, x)
    barrier, wrong = threading.Barrier(3), []

    def serve(name):
        barrier.wait()
        for _ in range(30):
            with torch.no_grad(), spectune.route(model, [name]):
                first = model(x)
                with base_alone(model):
                    base = model(x)
                again = model(x)
            close = [torch.allclose(y, expected[n], atol=1e-5) for y, n in ((first, name), (base, None), (again, name))]
            wrong.extend(c for c in close if not c)

    threads = [threading.Thread(target=serve, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.no_grad():
        assert torch.equal(model(x), expected[None])


def test_tasks_that_take_turns():
    model, x = network(), torch.randn(1, 8)
    expected = answers(model, x)

    async def serve(name):
        found = []
        with spectune.route(model, [name]):
            for _ in range(4):
                await asyncio.sleep(0)
                with torch.no_grad():
                    found.append(model(x))
        return found

    async def together():
        return await asyncio.gather(*(serve(name) for name in NAMES))

    for name, found in zip(NAMES, asyncio.run(together()), strict=True):
        for y in found:
            torch.testing.assert_close(y, expected[name])


def test_contexts_may_be_left_in_any_order():
    model, x = network(), torch.randn(1, 8)
    expected = answers(model, x)
    spectune.activate(model, "c")
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        contexts = [spectune.route(model, ["a"]), base_alone(model), spectune.route(model, ["b"])]
        left = {0: "a", 1: None, 2: "b"}
        for context in contexts:
            context.__enter__()
        for i in order:
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected[left[max(left)]])
            contexts[i].__exit__(None, None, None)
            del left[i]
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected["c"])


def test_a_context_that_another_thread_leaves_is_over():
    model, x = network(), torch.randn(1, 8)
    expected = answers(model, x)
    context = spectune.route(model, ["a"])
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[None])


def test_what_is_activated_is_every_threads():
    model, x = network(), torch.randn(1, 8)
    expected = answers(model, x)
    found = []

    def serve():
        with torch.no_grad():
            found.append(model(x))

    spectune.activate(model, "b")
    with spectune.route(model, ["a"]):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected["b"])


def test_a_copy_is_in_no_context():
    model, x = network(), torch.randn(1, 8)
    expected = answers(model, x)
    spectune.activate(model, "b")
    with torch.no_grad(), spectune.route(model, ["a"]):
        torch.testing.assert_close(copy.deepcopy(model)(x), expected["b"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_layers_run_again_as_they_ran_first(inside):
    model, x = network(), torch.randn(2, 8)
    model.requires_grad_(True)
    spectune.activate(model, "c")
    with spectune.route(model, ["a", "b"]):
        expected = gradients(model, model(x).square().sum())
    with ExitStack() as stack:
        stack.enter_context(spectune.route(model, ["a", "b"]))
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        if not inside:
            stack.close()
        found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    spectune.activate(model, "a")
    expected = gradients(model, model(x).square().sum())
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    spectune.activate(model, "c")  # between the two passes
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name])


def test_passes_of_several_contexts_that_are_run_again_outside_of_them_are_told():
    model, x = network().requires_grad_(True), torch.randn(2, 8)
    losses = []
    for rows in (["a", "b"], ["b", "a"]):
        with spectune.route(model, rows):
            losses.append(checkpoint(model, x, use_reentrant=False).square().sum())
    with pytest.raises(SpectuneError, match="inside of its own `route`"):
        sum(losses).backward()


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "dora:rank=2", "pissa:rank=2"])
def test_switching_adapters_does_not_compile_again(method):
    torch._dynamo.reset()
    model, x = network(method).eval().requires_grad_(False), torch.randn(2, 8)
    with torch.no_grad():
        expected = {name: spectune.activate(model, name)(x) for name in NAMES}
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        spectune.activate(model, "a")
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("b", "c", "a", "b"):
                spectune.activate(model, name)
                torch.testing.assert_close(compiled(x), expected[name])
        free = torch.compile(model, backend="eager")
        with spectune.route(model, ["c", "a"]), torch._dynamo.config.patch(error_on_recompile=False):
            torch.testing.assert_close(free(x), torch.stack([expected["c"][0], expected["a"][1]]))
        torch.testing.assert_close(free(x), expected["b"])
    torch._dynamo.reset()


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2", "svf", "pissa:rank=2", "svft:pattern=banded,width=1"])
def test_what_is_written_past_the_counter_of_writes_is_seen(around, method):
    model, x = network(method), torch.randn(3, 8)
    spectune.activate(model, "a")
    trained = [p for n, p in model.named_parameters() if ".adapters.a." in n]

    def fresh():
        return copy.deepcopy(model)(x)

    with around():
        model(x)
        for parameter in trained:
            for write in (
                lambda p: p.data.mul_(1.5),
                lambda p: p.data.view(-1)[-1].add_(0.5),
                lambda p: p.data.copy_(p.data.flip(0)),
                lambda p: p.detach().numpy().__imul__(-1.25),
            ):
                write(parameter)
                torch.testing.assert_close(model(x), fresh())
        routed = spectune.route(model, ["a", "b", {"a": 0.5, "c": 1.0}])
        with routed:
            before = model(x)
            for parameter in trained:
                parameter.data.mul_(0.25)
            after = model(x)
            with spectune.route(model, ["a", "b", {"a": 0.5, "c": 1.0}]):
                torch.testing.assert_close(after, model(x))
        torch.testing.assert_close(before[1], after[1])
        torch.testing.assert_close(after[:1], spectune.activate(model, "a")(x[:1]))


def test_threads_whose_first_passes_are_at_once_find_where_rows_lie():
    ids = torch.arange(3, 19).reshape(2, 8)
    for attempt in range(4):
        model = tiny.llama().eval()
        expected = {None: model(ids).logits}
        for name in "abc":
            spectune.adapt(model, "lora:rank=2", name=name)
            torch.manual_seed(ord(name))
            for key, parameter in model.named_parameters():
                parameter.data += 0.1 * torch.randn_like(parameter) if f".adapters.{name}." in key else 0
            expected[name] = model(ids).logits
        start, found = threading.Barrier(4), {}

        def work(place, name, model=model, start=start, found=found):
            start.wait()
            for i in range(3):
                with torch.no_grad(), spectune.route(model, [name, None]):
                    found[place, i] = name, model(ids).logits

        threads = [threading.Thread(target=work, args=(i, name)) for i, name in enumerate("abca")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 12, attempt
        for name, answer in found.values():
            torch.testing.assert_close(answer[0], expected[name][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(answer[1], expected[None][1], atol=1e-5, rtol=1e-4)


def test_threads_whose_first_passes_are_at_once_leave_nothing_watched():
    modes = len(torch.overrides._get_current_function_mode_stack())
    for _ in range(5):
        model = spectune.adapt(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()), "lora:rank=2")
        start, left = threading.Barrier(4), []

        def work(model=model, start=start, left=left):
            start.wait()
            for _ in range(3):
                model(torch.randn(2, 6))
            left.append(len(torch.overrides._get_current_function_mode_stack()))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert left == [modes] * 4
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert not model[0]._forward_pre_hooks
