"""The tuner of each method: PEFT finds the layers, Spectune decomposes and adapts them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn as nn
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from spectune.adapters.formats.dialect import PREFIX
from spectune.adapters.terms import Term
from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.experts import ExpertLinear, called_for, expert_layer, keys_of
from spectune.layers.modules import described, is_linear, is_stored_transposed, named_modules
from spectune.layers.packed import keep_layout
from spectune.layers.parts import tensor_of
from spectune.layers.updates import Update
from spectune.methods import Method
from spectune.model.install import bases_for, dtype_of, master_dtype
from spectune.model.routing import route
from spectune.model.ties import are_one, transformers_models, untie
from spectune.peft.config import Described, SpectuneConfig
from spectune.peft.layer import PeftLayer

_BASE = "__base__"  # PEFT's word for the base alone, among `adapter_names`
# what PEFT trains whole by a task, and writes into `modules_to_save` when layers were adapted already
_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}


class SpectuneTuner(BaseTuner):
    """A model whose layers PEFT chose and Spectune adapted; see `spectune.peft` for what it is called with."""

    tuner_layer_cls: type[PeftLayer]
    other_layer_cls: type[PeftLayer]  # of what is no linear layer, whose name does not tell PEFT that it is one
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    # -- adding adapters

    def _prepare_adapter_config(self, peft_config: SpectuneConfig, model_config: dict[str, object]) -> SpectuneConfig:
        return self.prepared(self.model, peft_config, model_config)

    @classmethod
    def prepared(
        cls, model: nn.Module, peft_config: SpectuneConfig, model_config: Mapping[str, object]
    ) -> SpectuneConfig:
        """Return a config with its targets: all linear layers of a model where there are none."""
        if peft_config.target_modules is None:
            if model_config.get("model_type") in (None, "custom"):
                raise ValueError("Please specify `target_modules` in `peft_config`")
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            named = _maybe_include_all_linear_layers(copy.copy(peft_config), model).target_modules  # type: ignore[attr-defined]
            if peft_config.layers_to_transform is not None:  # which PEFT does not ask of layers by their whole names
                by_end = copy.copy(peft_config)
                by_end.target_modules = {name.rpartition(".")[2] for name in named}
                named = {name for name in named if check_target_module_exists(by_end, name) is True}
            heads = _HEADS.get(cast(TaskType, peft_config.task_type), ())
            named = {name for name in named if not any(name.endswith(head) for head in heads)}
            peft_config.target_modules = named
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.fill(model, adapter_name, cast(SpectuneConfig, self.peft_config[adapter_name]))

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        self.put(self, *args, **kwargs)

    @classmethod
    def put(
        cls,
        tuner: BaseTuner,
        peft_config: SpectuneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Put an adapter on a layer, which is replaced by ours around it if it is none yet."""
        current_key = current_key.removeprefix(PREFIX)  # which it has where the model is PEFT's own wrapper
        layer = target
        if not isinstance(layer, cls.tuner_layer_cls):
            inside = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            layer = (cls.tuner_layer_cls if is_linear(inside) else cls.other_layer_cls)(target, current_key)
        method = peft_config.method_for(current_key, (layer.out_features, layer.in_features))
        layer.add(adapter_name, method)
        if layer is not target:
            tuner._replace_module(parent, target_name, layer, target)
        if adapter_name not in tuner.active_adapters:  # an adapter that is added to others does not train yet
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def _inject_parameters(
        self, peft_config: SpectuneConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put an adapter on every expert of the tensors that `target_parameters` names, and return the tensors' names.

        Raises:
            SpectuneError: one of them is no tensor of experts, nor the weight of a linear layer.
        """
        targets, found = peft_config.target_parameters or (), []
        parameters = [
            (n, m, key) for n, m in named_modules(model) for key in m._parameters if m._parameters[key] is not None
        ]
        for name, module, key in parameters:
            full = f"{name}.{key}" if name else key
            if not any(full == target or full.endswith(f".{target}") for target in targets):
                continue
            found.append(full)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                if key in keys_of(module):
                    for index in range(len(tensor_of(module, key))):
                        self._add_expert(peft_config, adapter_name, f"{name}.{index}.{key}", module, key, index)
                else:
                    raise SpectuneError(
                        f"target_parameters: {full!r} is a parameter of {type(module).__name__}, and here they are the "
                        "tensors that hold a matrix for each of several experts; name linear layers in target_modules"
                    )
        # PEFT before 0.21 counts those that it finds here, and later ones once
        self.targeted_parameter_names.extend(name for name in found if name not in self.targeted_parameter_names)
        return found

    def _add_expert(
        self, peft_config: object, adapter: str, name: str, module: nn.Module, key: str, index: int
    ) -> None:
        there = called_for(module, key, index)
        target = expert_layer(module, key, index) if there is None else there
        layer = target if isinstance(target, self.tuner_layer_cls) else self.other_layer_cls(target, name)
        holder = module._modules[str(index)]
        self._create_and_replace(peft_config, adapter, layer, key, holder, current_key=name)
        holder._modules[key] = layer  # type: ignore[union-attr]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, ExpertLinear):  # unloaded, and out of its module again unless others adapt it still
            if isinstance(new_module, Adapted):
                parent._modules[child_name] = new_module
            return
        if isinstance(child, AuxiliaryTrainingWrapper):  # unloaded; its weight may be none, or made of rows that train
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def fill(cls, model: nn.Module, adapter: str, config: SpectuneConfig) -> None:
        """Decompose the weights of all layers that have a new adapter at once, and give it its first values."""
        keep_layout(model, True)
        layers = {m.adapted.adapted_as: m for m in cls._tuned(model) if m.method_of(adapter) is not None}
        methods = {name: cast(Method, layer.method_of(adapter)) for name, layer in layers.items()}
        inner = {name: layer.adapted for name, layer in layers.items()}
        plan = {name: [Term(method, {})] for name, method in methods.items()}
        for name, bases in bases_for(inner, plan, {}, None, dtype_of(model)).items():
            for key, basis in bases.items():
                inner[name].bases[key] = basis
        for layer in layers.values():
            layer.start(adapter, random=not config.init_weights)
            layer.adapted.selection.factored = config.factored
        config.note({name: _described(layer, methods[name]) for name, layer in layers.items()})
        beginning: defaultdict[Method, list[Update]] = defaultdict(list)
        for name, layer in layers.items():
            beginning[methods[name]].append(layer.own[adapter])
        for method, updates in beginning.items():
            method.start_schedule(updates)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> object:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        untie_merged(self.model)
        return unloaded

    @classmethod
    def _tuned(cls, model: nn.Module) -> list[PeftLayer]:
        """Return this tuner's layers."""
        return [m for m in model.modules() if isinstance(m, cls.tuner_layer_cls)]

    def _by_name(self) -> dict[str, PeftLayer]:
        return {layer.adapted.adapted_as: layer for layer in self._tuned(self.model)}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self._tuned(self.model):
            weight = layer.adapted.weight
            dtype = master_dtype(weight) if autocast_adapter_dtype else weight.dtype
            for attribute in layer.adapter_layer_names:
                held = cast(nn.ParameterDict, layer._modules[attribute])
                if adapter_name in held and held[adapter_name].dtype != dtype:
                    trains = held[adapter_name].requires_grad
                    held[adapter_name] = nn.Parameter(held[adapter_name].data.to(dtype), requires_grad=trains)

    # -- answering

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: Any) -> Iterator[None]:
        """Have each row of the batch answered by its adapter, where `adapter_names` names them."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = self._tuned(self.model)
        unknown = {n for n in names if n != _BASE and all(layer.method_of(n) is None for layer in layers)}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        if any(layer.merged for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        with route(self.model, [None if name == _BASE else name for name in names]):
            yield

    # -- sums

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose update is exactly the weighted sum of other adapters' updates.

        Args:
            adapters: names of adapters over one basis each layer: of one method and, where it has one, one rank.
            weights: factor of each.
            adapter_name: name of the sum.
            combination_type: "linear"; there is nothing to choose where the sum is exact.

        Raises:
            SpectuneError: no adapter of the method can hold the sum.
        """
        if adapter_name in self.peft_config:
            return
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        if combination_type != "linear":
            raise SpectuneError(
                f'combination_type={combination_type!r}: the sum is exact here, which is combination_type="linear"'
            )
        if len(adapters) != len(weights):
            raise SpectuneError(f"there are {len(adapters)} adapters and {len(weights)} weights; give one for each")
        sums = {}
        for name, layer in self._by_name().items():
            parts = [(a, w) for a, w in zip(adapters, weights, strict=True) if layer.method_of(a) is not None]
            if parts:
                sums[name] = _sum(name, layer, parts)
        config = copy.deepcopy(self.peft_config[adapters[0]])
        assert isinstance(config, SpectuneConfig)
        config.target_modules, config.exclude_modules, config.layers_to_transform = set(sums), None, None
        config.layers_pattern = None
        layers = self._by_name()
        config.note({name: _described(layers[name], method) for name, (method, _) in sums.items()})
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, (_, values) in sums.items():
            for key, held in layers[name].own[adapter_name].trained().items():
                held.copy_(values[key])


def untie_merged(model: nn.Module) -> None:
    """Have transformers models tie no more what merging has made two of, as an embedding and the output's."""
    untie([(m, m.get_expanded_tied_weights_keys(all_submodels=False)) for m in transformers_models(model)], are_one)


def _described(layer: PeftLayer, method: Method) -> Described:
    inner = layer.adapted
    experts = inner.count if isinstance(inner, ExpertLinear) else 0
    kind, kernel = described(inner)
    shape = layer.out_features, layer.in_features
    return Described(shape, is_stored_transposed(inner), method, experts, (kind, *kernel))


def _sum(name: str, layer: PeftLayer, parts: Sequence[tuple[str, float]]) -> tuple[Method, dict[str, Tensor]]:
    """Return the method and the trained tensors of a weighted sum of adapters on a layer."""
    found = []
    for adapter, weight in parts:
        update = layer.own[adapter]
        method = cast(Method, update.method)
        in_double = {key: tensor.double() for key, tensor in update.trained().items()}
        coefficients = method.coefficients({**layer.adapted.tensors(update), **in_double})
        if coefficients is None:
            raise SpectuneError(
                f"no {method.name} holds the sum of several: take their adapters off the model, add those, and export "
                "the sum as a LoRA (spectune.extract(model, name), a + b, .to_lora())"
            )
        found.append((update.basis_key, method.from_coefficients(coefficients)[0], weight, coefficients))
    if any((key, plain) != found[0][:2] for key, plain, _, _ in found):
        raise SpectuneError(f"the adapters have different bases in {name!r}: give all of them one method and one rank")
    total = {key: sum(weight * c[key] for _, _, weight, c in found) for key in found[0][3]}
    return found[0][1].from_coefficients(total)
