"""A training step without numbers: what it computes, moves and holds, from the real code on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch
import torch.nn as nn

from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import effective_weight, find_module
from spectune.methods import Method
from spectune.model.adapting import adapt
from spectune.model.install import frozen_basis
from spectune.model.lifecycle import detach
from spectune.planning.batch import Batch, loss_of, make_inputs, training_attention
from spectune.planning.machine import Machine
from spectune.planning.tally import Tally
from spectune.spectral._types import empty_decomposition
from spectune.speed.checkpointing import checkpoint_activations, keep_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAM = 7  # times that a fused AdamW reads or writes the size of a tensor
_SCORES = 24  # and AdaLoRA's scores more


@dataclass(frozen=True)
class Cost:
    """A training step's cost; all of it is additive over the blocks of a model.

    Args:
        seconds: forward, backward and the optimizer's step.
        flops: of its matrix products.
        activations: bytes held at most at once, without parameters, bases and gradients.
        saved: bytes held for the backward pass when it begins.
        with_gradients: bytes that activations and gradients take together at most.
    """

    seconds: float
    flops: float
    activations: float
    saved: float
    with_gradients: float

    def extended(self, more: Cost, times: float) -> Cost:
        """Return self + times * (more - self)."""
        return Cost(*(a + times * (b - a) for a, b in zip(_values(self), _values(more), strict=True)))


def _values(cost: Cost) -> list[float]:
    return [getattr(cost, field.name) for field in fields(cost)]


def measure(
    model: PreTrainedModel, methods: Mapping[str, Method] | str, batch: Batch, dtype: torch.dtype, machine: Machine
) -> Cost:
    """Return what a training step costs, from one pass of a model on the meta device.

    Of a model whose blocks are alike, two short versions are passed and the whole one is extrapolated.  AdamW is
    counted by its operations.

    Args:
        model: on the meta device; it comes back as it was.
        methods: the method of each layer, "full" for all parameters, or "floor" for the frozen model's forward and
            gradient with respect to the embeddings.
        batch: what goes through.
        dtype: of the weights.
        machine: how long things take.

    Raises:
        SpectuneError: the model's code needs numbers and cannot run without them.
    """
    found = _stack(model, methods)
    if found is None:
        return _pass(model, methods, batch, dtype, machine)
    stack, few = found
    blocks = list(stack)

    def passed(count: int) -> Cost:
        _keep(stack, blocks[:count])
        try:
            return _pass(model, methods, batch, dtype, machine)
        finally:
            _keep(stack, blocks)

    # two lengths and a straight line: costs add up over blocks that are alike, and a deep model takes long even without
    # numbers
    while True:
        first, second = passed(few), passed(few + 1)
        grown, saved = second.activations - first.activations, second.saved - first.saved
        # a short model may hold most elsewhere than a deep one, which does where the backward pass begins
        whole = first.extended(second, len(blocks) - few)
        elsewhere = grown == 0 and whole.activations > 2 * whole.saved  # at the logits, say, however deep it is
        if elsewhere or abs(grown - saved) <= 0.02 * saved or few + 1 >= len(blocks):
            return whole
        few = min(3 * few, len(blocks) - 1)


def _keep(stack: nn.ModuleList, blocks: list[nn.Module]) -> None:
    stack._modules.clear()
    stack._modules.update({str(i): block for i, block in enumerate(blocks)})


def _stack(model: PreTrainedModel, methods: Mapping[str, Method] | str) -> tuple[nn.ModuleList, int] | None:
    """Return the longest list of blocks where they are alike, and how many to begin with: two if the first differs."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if not outer:
        return None
    name, stack = max(outer.items(), key=lambda item: len(item[1]))

    def described(i: int) -> tuple[object, ...]:
        prefix = f"{name}.{i}."
        chosen = {} if isinstance(methods, str) else methods
        mine = [(n.removeprefix(prefix), m) for n, m in chosen.items() if n.startswith(prefix)]
        return (*mine, *((n, p.shape) for n, p in stack[i].named_parameters()))

    if len(stack) < 4 or len({described(i) for i in range(1, len(stack))}) > 1:
        return None
    return stack, 1 if described(0) == described(1) else 2


def _pass(
    model: PreTrainedModel, methods: Mapping[str, Method] | str, batch: Batch, dtype: torch.dtype, machine: Machine
) -> Cost:
    before = next(model.parameters()).dtype
    cast(nn.Module, model).to(dtype).train()
    hooks = []
    recomputes = methods != "floor" and model.supports_gradient_checkpointing
    try:
        if not isinstance(methods, str):
            _adapt(model, methods)
        else:
            model.requires_grad_(methods == "full")
        if methods == "floor":
            hooks = [
                e.register_forward_hook(lambda module, inputs, out: out.requires_grad_()) for e in _inputs_of(model)
            ]
        if recomputes:
            checkpoint_activations(model, batch.gradient_checkpointing)
        with training_attention(model):
            return _step(model, batch, machine)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, SpectuneError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpectuneError(f"{type(model).__name__} cannot run without weights: {first}") from error
    finally:
        for hook in hooks:
            hook.remove()
        if recomputes:
            keep_activations(model)
        if adapted_layers(model):
            detach(model)
        cast(nn.Module, model).to(before).requires_grad_(True)
        model.zero_grad()


def _inputs_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the input embedding, and those of the same tokens: the stacks of an encoder-decoder have one each."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return [embedding]
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == embedding.num_embeddings]


def _adapt(model: PreTrainedModel, methods: Mapping[str, Method]) -> None:
    """Adapt the layers that a shortened model has left, with bases on the meta device too."""
    there = {n: m for n, m in methods.items() if _has(model, n)}
    first = next(iter(there.values()))
    adapt(model, first, list(there), overrides={n: m for n, m in there.items() if m != first}, factored=True)
    for name, layer in adapted_layers(model).items():
        weight, method = effective_weight(layer), there[name]
        frozen = method.basis(weight, empty_decomposition(method.request(), *weight.shape))
        if frozen:
            layer.bases[method.basis_key] = frozen_basis(layer, method, frozen)


def _has(model: PreTrainedModel, name: str) -> bool:
    try:
        find_module(model, name)
    except AttributeError:
        return False
    return True


def _step(model: PreTrainedModel, batch: Batch, machine: Machine) -> Cost:
    """Pass a batch forward and backward, and add what AdamW's step takes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    tally = Tally(machine)
    # gradients are told apart from activations: a plan names them by themselves, and they stay when these are gone
    hooks = [p.register_post_accumulate_grad_hook(lambda p: tally.forget(p.grad)) for p in trained]
    try:
        with tally:
            loss = loss_of(model, make_inputs(model, batch, "meta"))
            saved = tally.held
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    scored = any("sensitivity" in name for name, _ in model.named_buffers())
    seconds = sum(machine.passing(p.numel() * p.element_size()) for p in trained)
    return Cost(tally.seconds + (_ADAM + _SCORES * scored) * seconds, tally.flops, tally.peak, saved, tally.most)
