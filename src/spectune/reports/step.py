"""A training step without numbers: what it computes, moves and holds, from the real code on the meta device."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spectune.errors import SpectuneError
from spectune.install import frozen_basis
from spectune.layers.adapted import adapted_layers, effective_weight
from spectune.methods import Method
from spectune.model import adapt, detach
from spectune.reports.machine import Machine
from spectune.spectral import SVD, OneSided, Request

ATTENTION = "spectune_plan"
_ADAM = 14  # elementwise operations of AdamW on a tensor, each on three tensors of its size
_SCORES = 8  # the same of AdaLoRA's


@dataclass(frozen=True)
class Batch:
    """What goes through the model in a step, on each device.

    Args:
        rows: sequences.
        length: tokens of each; for an image model it has no meaning.
        supervised: share of the positions that a causal model computes logits and the loss at.
    """

    rows: int = 8
    length: int = 512
    supervised: float = 1.0


@dataclass(frozen=True)
class Cost:
    """A training step's cost; all of it is additive over the blocks of a model.

    Args:
        seconds: forward, backward and the optimizer's step.
        flops: of its matrix products.
        activations: bytes held at most at once, without parameters, bases and gradients.
        saved: bytes held for the backward pass when it begins.
    """

    seconds: float
    flops: float
    activations: float
    saved: float

    def extended(self, more: Cost, times: float) -> Cost:
        """Return self + times * (more - self)."""
        return Cost(*(a + times * (b - a) for a, b in zip(_values(self), _values(more), strict=True)))


def _values(cost: Cost) -> list[float]:
    return [getattr(cost, field.name) for field in fields(cost)]


def measure(
    model: Any, methods: Mapping[str, Method] | str, batch: Batch, dtype: torch.dtype, machine: Machine
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

    while True:
        first, second = passed(few), passed(few + 1)
        grown, saved = second.activations - first.activations, second.saved - first.saved
        # a short model may hold most elsewhere than a deep one, which does where the backward pass begins
        if abs(grown - saved) <= 0.02 * saved or few + 1 >= len(blocks):
            return first.extended(second, len(blocks) - few)
        few = min(3 * few, len(blocks) - 1)


def _keep(stack: nn.ModuleList, blocks: list[nn.Module]) -> None:
    stack._modules.clear()
    stack._modules.update({str(i): block for i, block in enumerate(blocks)})


def _stack(model: nn.Module, methods: Mapping[str, Method] | str) -> tuple[nn.ModuleList, int] | None:
    """Return the longest list of blocks where they are alike, and how many to begin with: two if the first differs."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if not outer:
        return None
    name, stack = max(outer.items(), key=lambda item: len(item[1]))

    def described(i: int) -> tuple[Any, ...]:
        prefix = f"{name}.{i}."
        chosen = {} if isinstance(methods, str) else methods
        mine = [(n.removeprefix(prefix), m) for n, m in chosen.items() if n.startswith(prefix)]
        return (*mine, *((n, p.shape) for n, p in stack[i].named_parameters()))

    if len(stack) < 4 or len({described(i) for i in range(1, len(stack))}) > 1:
        return None
    return stack, 1 if described(0) == described(1) else 2


def _pass(model: Any, methods: Mapping[str, Method] | str, batch: Batch, dtype: torch.dtype, machine: Machine) -> Cost:
    before = next(model.parameters()).dtype
    model.to(dtype).train()
    hooks = []
    try:
        if not isinstance(methods, str):
            _adapt(model, methods)
        else:
            model.requires_grad_(methods == "full")
        if methods == "floor":
            hooks = [
                e.register_forward_hook(lambda module, inputs, out: out.requires_grad_()) for e in _inputs_of(model)
            ]
        with _attention(model):
            return _step(model, batch, machine)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, SpectuneError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpectuneError(f"{type(model).__name__} cannot run without weights: {first}") from error
    finally:
        for hook in hooks:
            hook.remove()
        if adapted_layers(model):
            detach(model)
        model.to(before).requires_grad_(True)
        model.zero_grad()


def _inputs_of(model: Any) -> list[nn.Module]:
    """Return the input embedding, and those of the same tokens: the stacks of an encoder-decoder have one each."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return [embedding]
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == embedding.num_embeddings]


def _adapt(model: Any, methods: Mapping[str, Method]) -> None:
    """Adapt the layers that a shortened model has left, with bases on the meta device too."""
    there = {n: m for n, m in methods.items() if _has(model, n)}
    first = next(iter(there.values()))
    adapt(model, first, list(there), overrides={n: m for n, m in there.items() if m != first})
    for name, layer in adapted_layers(model).items():
        weight, method = effective_weight(layer), there[name]
        frozen = method.basis(weight, empty_decomposition(method.request(), *weight.shape))
        if frozen:
            layer.bases[method.basis_key] = frozen_basis(layer, method, frozen)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def empty_decomposition(request: Request | None, out: int, into: int) -> SVD | OneSided | None:
    """Return what a request for a weight (out x into) is answered with, on the meta device."""
    if request is None:
        return None
    k = request.rank or min(out, into)
    left, values, right = (torch.empty(shape, device="meta") for shape in ((out, k), (k,), (k, into)))
    return OneSided(left, right, values) if request.kind == "one_sided" else SVD(left, values, right)


def _step(model: Any, batch: Batch, machine: Machine) -> Cost:
    """Pass a batch forward and backward, and add what AdamW's step takes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    inputs = make_inputs(model, batch, "meta")
    ledger = Ledger(machine)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.forget(p.grad)) for p in trained]
    try:
        with ledger:
            loss = loss_of(model, inputs)
            saved = ledger.held
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    scored = any("sensitivity" in name for name, _ in model.named_buffers())
    seconds = sum(machine.seconds(0, 3 * p.numel() * p.element_size(), p.dtype) for p in trained)
    return Cost(ledger.seconds + (_ADAM + _SCORES * scored) * seconds, ledger.flops, ledger.peak, saved)


def make_inputs(model: Any, batch: Batch, device: str = "cpu") -> dict[str, Any]:
    """Return a training batch of tokens, or of images, without padding."""
    config = model.config
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
        return {"pixel_values": torch.zeros(batch.rows, getattr(vision, "num_channels", 3), *size, device=device)}
    tokens = torch.ones(batch.rows, batch.length, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    decodes = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if decodes and device == "meta" and config._attn_implementation == "eager":  # or its mask asks for positions
        inputs["attention_mask"] = tokens
    if decodes and batch.supervised < 1:
        inputs["logits_to_keep"] = torch.arange(max(1, round(batch.supervised * batch.length)), device=device)
    return inputs


def loss_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return a cross-entropy over the logits, or the mean square of what a model without a head returns."""
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    output = model(**inputs, **cached)
    logits = getattr(output, "logits", None)
    if logits is None:
        return output[0].float().square().mean()
    logits = logits.float().flatten(0, -2)
    return F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.int64, device=logits.device), reduction="sum")


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Give a model on the meta device the attention that it would have with weights; it does not look for padding."""
    from transformers import AttentionInterface

    fused, looks = model.config._attn_implementation == "sdpa", "warn_if_padding_and_no_attention_mask"
    looking = [m for m in model.modules() if hasattr(type(m), looks)]
    for module in looking:
        module.__dict__[looks] = lambda *_: None
    if fused:
        AttentionInterface.register(ATTENTION, _fused)
        model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for module in looking:
            del module.__dict__[looks]
        if fused:
            model.set_attn_implementation("sdpa")


def _fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and position_bias is None
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _lse = attend(query, key, value, dropout, bool(causal), attn_mask=position_bias, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class Ledger(TorchDispatchMode):
    """Count what operations on the meta device compute, move and hold.

    An operation takes the longer of its arithmetic and its traffic, and something for itself.

    Args:
        machine: rates.

    Attributes:
        seconds, flops: so far.
        held, peak: bytes of results that are alive, now and at most.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.seconds = self.flops = 0.0
        self.held = self.peak = 0
        self._seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = list(_on_meta((*args, *kwargs.values())))
        known = {t.untyped_storage()._cdata for t in given}
        made = list(_on_meta((out,)))
        new = [t for t in made if t.untyped_storage()._cdata not in known]
        for tensor in new:
            self._hold(tensor.untyped_storage())
        if new or func._schema.is_mutable:  # the rest are views
            self._charge(func, args, kwargs, given, made, out)
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = (weakref.ref(storage, lambda _: self._release(key)), size)
            self.held += size
            self.peak = max(self.peak, self.held)

    def _release(self, key: int) -> None:
        if key in self._seen:
            self.held -= self._seen.pop(key)[1]

    def forget(self, tensor: Tensor | None) -> None:
        """Hold a tensor, such as a gradient, against the step no more."""
        if tensor is not None:
            self._release(tensor.untyped_storage()._cdata)

    def _charge(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], out: Any) -> None:
        moved = sum(_bytes(t) for t in given) + sum(_bytes(t) for t in made)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count is not None else 0
        self.flops += flops
        dtype = made[0].dtype if made else torch.float32
        smallest = min((side for t in given if t.dim() > 1 for side in t.shape[-2:]), default=0) if flops else 0
        self.seconds += self.machine.seconds(flops, moved, dtype, smallest)


def _on_meta(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _on_meta(value)


def _bytes(tensor: Tensor) -> int:
    """Return what reading a tensor moves: what it holds, however often an expanded one repeats it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
