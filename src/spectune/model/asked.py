"""A forward pass to learn from, on tiny inputs made from the model's configuration."""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from spectune.layers.adapted import Adapted
from spectune.layers.attention import reads_children
from spectune.layers.kinds import kind_of
from spectune.layers.modules import named_modules, stored_weight, tied_parameters
from spectune.layers.packed import kept_layout
from spectune.layers.reads import called, reader_of, takes_values
from spectune.layers.shards import is_part
from spectune.model.routing import base_alone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")

_TOKENS = 4
_SAMPLES = 8000  # half a second of sound
_SMALL = 1 << 28  # parameters of a model that is passed through sooner with its weights than on the meta device
_LARGEST = 1 << 31  # and of one that is at all
_READ = "the model reads its weight itself instead of calling the layer"
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # models, and what a trial of each has found


def trial_inputs(model: PreTrainedModel, rows: int = 1) -> Iterator[dict[str, Tensor]]:
    """Yield inputs that a transformers model may take, the likelier first: text, pictures, sound, or features.

    Args:
        model: the model.
        rows: of the batch, equal ones.
    """
    wanted = inspect.signature(model.forward).parameters
    config: PreTrainedConfig = model.config
    vocabulary = _of(config, "vocab_size") or _TOKENS + 2
    ids = torch.arange(_TOKENS).add(1).clamp(max=vocabulary - 1)[None].expand(rows, -1)
    size = _of(config, "image_size") or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    bands = _of(config, "num_mel_bins") or _of(config, "feature_size") or 80
    frames = 2 * (_of(config, "max_source_positions") or 50)
    made = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "bbox": torch.zeros(rows, _TOKENS, 4, dtype=torch.int64),
        "pixel_values": torch.zeros(rows, _of(config, "num_channels") or 3, height, width),
        "input_values": torch.zeros(rows, _SAMPLES),
        "input_features": torch.zeros(rows, bands, frames),
    }
    inputs = [name for name in made if name in wanted and name != "decoder_input_ids"]
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in wanted else {}
    main = [name for name in inputs if name == model.main_input_name]
    chosen = [main, [*main, *(n for n in inputs if n == "bbox")], inputs, *([name] for name in inputs)]
    tried: list[list[str]] = []
    for names in chosen:
        if names and names not in tried:
            tried.append(names)
            yield {name: made[name] for name in names} | decoder
    if "input_features" in inputs:  # the axes are the other way round in some
        yield {"input_features": made["input_features"].mT.contiguous()} | decoder


def past_layers(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Return the layers that a model goes past, by name, with what it does instead.

    It takes their weights for its own products, or calls another module that has the weight of an embedding as well.

    Each transformers model in it is passed through once, and a large one on the meta device, where nothing is
    computed.  What no inputs can be made for is not tried: there `first_pass` tells in the first forward pass.

    Args:
        model: the model.
        layers: its layers by name.
    """
    key = tuple(layers)
    known = _found.get(model)
    if known is None:
        known = _found[model] = {}  # a model that is shortened for a time is known in each of its lengths
    if key not in known:
        watch = Watch(layers)
        for part in _transformers_models(model):
            _try(part, watch)
        names = {id(module): name for name, module in named_modules(model)}
        known[key] = {
            n: f"the model calls {names.get(id(module), 'another module')!r}, which has the same weight, in its place"
            for n, module in watch.instead.items()
            if n not in watch.asked
        }
        known[key] |= dict.fromkeys(watch.read_past(tied_parameters(model)), _READ)
        for name in watch.asked - known[key].keys():
            called.add(layers[name])
            if isinstance(layers[name], Adapted):  # as in `take_over`: compiled code sees attributes, and no sets
                vars(layers[name])["is_called"] = True
    return dict(known[key])


class Watch(TorchFunctionMode):
    """Sees of which layers' weights something is made, and by whom.

    Args:
        layers: the layers by name.
        told_by: what tells a tensor that stands for a weight.
    """

    def __init__(self, layers: Mapping[str, nn.Module], told_by: Callable[[object], int] = id) -> None:
        super().__init__()
        self.layers, self.told_by = layers, told_by
        self.stand_ins: dict[int, list[str]] = {}  # names by what tells the tensor that stands for a weight
        self.asked: set[str] = set()
        self.hooks: list[RemovableHandle] = []  # that go with it
        self.past: set[str] = set()
        self.instead: dict[str, nn.Module] = {}  # who answered with an embedding's weight

    def stand_for(self, weights: dict[int, Tensor]) -> None:
        """Take tensors for weights, by the ids of the weights."""
        self.stand_ins = {}
        for name, layer in self.layers.items():
            weight = stored_weight(layer)
            if weight is not None and id(weight) in weights:
                self.stand_ins.setdefault(self.told_by(weights[id(weight)]), []).append(name)

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T:
        result = func(*args, **(kwargs or {}))
        values = [*args, *(kwargs or {}).values()]
        values += [v for value in values if isinstance(value, (list, tuple)) for v in value]
        told = self.told_by
        weights = [value for value in values if told(value) in self.stand_ins]
        if weights and takes_values(func, [told(value) in self.stand_ins for value in args], result):
            frame = sys._getframe(1)
            for weight in weights:
                for name in self.stand_ins[told(weight)]:
                    layer = self.layers[name]
                    reader = reader_of(layer, frame, getattr(type(layer).forward, "__code__", None))
                    if reader is None:
                        self.asked.add(name)
                    elif any(held is weight for held in reader._parameters.values()):
                        if kind_of(layer) is not None:  # a linear layer may wait for other inputs
                            self.instead.setdefault(name, reader)
                    elif not reads_children(reader):
                        self.past.add(name)
        return result

    def read_past(self, tied: set[int]) -> set[str]:
        """Return the names of the layers that were read; a tied weight is another's as long as its layer is asked."""
        return {n for n in self.past if n not in self.asked or id(self.layers[n]._parameters.get("weight")) not in tied}


def _transformers_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _transformers_models(child)


def _try(model: PreTrainedModel, watch: Watch) -> None:
    """Pass through a model, or where that fails through the models in it."""
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if any(is_part(t) for t in tensors) or any("_hf_hook" in vars(m) for m in model.modules()):
        return
    size = sum(t.numel() for t in tensors)
    ways = [_with_weights, _without_weights] if size <= _SMALL else [_without_weights, _with_weights]
    if size > _LARGEST or any(t.is_meta for t in tensors):
        ways = [_without_weights]
    with _as_it_was(model):
        if any(_passes(model, inputs, watch, way) for way in ways for inputs in trial_inputs(model)):
            return
    for child in model.children():
        for part in _transformers_models(child):
            _try(part, watch)


def _passes(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    watch: Watch,
    run: Callable[[nn.Module, dict[str, Tensor], Watch], None],
) -> bool:
    try:
        run(model, inputs, watch)
    except Exception:  # whatever a model does not like of inputs that were made for it unseen
        return False
    return True


def _without_weights(model: nn.Module, inputs: dict[str, Tensor], watch: Watch) -> None:
    stand_ins: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        named[name] = stand_ins[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
    watch.stand_for(stand_ins)
    with watch:
        functional_call(model, named, (), {k: v.to("meta") for k, v in inputs.items()})


def _with_weights(model: nn.Module, inputs: dict[str, Tensor], watch: Watch) -> None:
    first = next(model.parameters())
    watch.stand_for({id(p): p for p in model.parameters()})
    with watch:
        model(**{k: v.to(first.device, first.dtype if v.is_floating_point() else None) for k, v in inputs.items()})


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the context a model is in evaluation mode; afterwards it has what it had, random numbers included."""
    kept = [(m, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_devices(model)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(base_alone(model))
        stack.enter_context(kept_layout(model))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module, *_ in kept:
            module.training = False
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # somebody's, who counts real passes
                vars(module)[hooks] = OrderedDict()
        try:
            yield
        finally:
            for module, own, buffers, parameters in kept:
                vars(module).clear()
                vars(module).update(own)
                held: Any  # both are dictionaries of what their module has
                for held, before in ((module._buffers, buffers), (module._parameters, parameters)):
                    held.clear()
                    held.update(before)


def _devices(model: nn.Module) -> Sequence[int]:
    return list({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _of(config: PreTrainedConfig, field: str) -> int | None:
    """Return a field of a configuration, or of one within it."""
    value = getattr(config, field, None)
    if value is not None:
        return value
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None and (value := _of(inner, field)) is not None:
            return value
    return None
