"""The `peft_config` of each method: PEFT's names where PEFT has one, the method's own otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner

from spectune.adapters.formats.bilingual import VERSION as FORMAT_VERSION
from spectune.adapters.formats.dialect import fields_of, option_of, type_for
from spectune.errors import SpectuneError, nearest
from spectune.layers.kinds import LINEAR
from spectune.methods import Method, find, from_fields
from spectune.patterns import matches_end

_SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")  # of methods that are not PEFT's own

C = TypeVar("C", bound="type[SpectuneConfig]")

_NO_RANK = "{name} trains along all singular values and has no rank; LoRAXSConfig and MiLoRAConfig have one"
_NO_SCALE = "{name} has no scale beside its singular values"
_NO_BRANCH = "{name} has no branch whose input could be dropped"
_WHY = {  # options of LoraConfig that a method does not have, and why
    "r": _NO_RANK,
    "rank_pattern": _NO_RANK,
    "lora_alpha": _NO_SCALE,
    "alpha_pattern": _NO_SCALE,
    "lora_dropout": _NO_BRANCH,
    "use_rslora": "the scale of {name} is lora_alpha / r; give lora_alpha = sqrt(r) * the alpha of rsLoRA",
    "init_lora_weights": "{name} has one start, and init_weights=False for a random one",
    "fan_in_fan_out": "how a layer holds its weight is seen from the layer",
    "lora_bias": '{name} has no bias of its own; bias="all" trains those of the model',
    "layer_replication": "replicate the layers of the model before adapting it",
    "ensure_weight_tying": "untie the weights, or leave one of the two layers out of target_modules",
    "loftq_config": "the base is not quantized anew; load it quantized or not",
    "megatron_config": "Megatron's layers are not adapted",
}


_HOW = """## How to open it

PEFT knows this kind of adapter after `import spectune.peft` (`pip install "spectune[peft]"`):

```python
import spectune.peft
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder")
```

Without PEFT: `spectune.attach(model, spectune.Adapter.load("this folder"))`.
"""


class Described(NamedTuple):
    """An adapted layer: (out, in) of W, whether W is held (in x out), its method, of how many experts, and its kind."""

    shape: tuple[int, int]
    transposed: bool
    method: Method
    experts: int = 0
    kind: tuple[str | int, ...] = (LINEAR,)  # with the axes of its kernel


class UnknownOption(SpectuneError, TypeError):
    """An option that a config does not have; a TypeError too, as PEFT expects where it reads a newer file."""


@dataclass
class SpectuneConfig(PeftConfig):
    """What the configs of all methods have in common.

    Args:
        target_modules: names or suffixes of layers, one regex for whole names, or "all-linear", which is the default.
        target_parameters: names or suffixes of the tensors of experts, such as "experts.down_proj", each of whose
            experts is adapted as a layer of its own.
        exclude_modules: names, suffixes or a regex of layers to leave out.
        modules_to_save: modules to train and save whole.
        bias: "none"; "all" trains every bias of the model, "<method>_only" those of the adapted layers.
        layers_to_transform: indices of the blocks to adapt; None is all.
        layers_pattern: what the list of blocks is called, if not as usual.
        trainable_token_indices: rows of the embedding to train, or these by the embedding's name.
        init_weights: start as the method does, where the model answers as before; False starts at random.
        use_dora: train a magnitude for each output row around the method.
        factored: in training answer W' x as L C' R x alone where the basis holds all of W (SVF, SVFT).
    """

    method: ClassVar[str] = ""

    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    use_dora: bool = False
    factored: bool = False
    # what makes the folder one of Spectune's: filled in when a model is adapted
    library_name: str = field(default="spectune", repr=False)
    format_version: int = field(default=FORMAT_VERSION, repr=False)
    error: float = field(default=0.0, repr=False)
    methods: list[dict[str, Any]] = field(default_factory=list, repr=False)
    layers: dict[str, Any] = field(default_factory=dict, repr=False)
    modules: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(type_for(find(self.method)))
        if self.format_version != FORMAT_VERSION:
            raise SpectuneError(
                f"the adapter has format version {self.format_version}, and spectune.peft reads {FORMAT_VERSION}: "
                "open it with spectune.Adapter.load and save it again, or update spectune"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.bias not in ("none", "all", f"{self.peft_type.value.lower()}_only"):
            raise SpectuneError(
                f'bias must be "none", "all" or "{self.peft_type.value.lower()}_only", not {self.bias!r}'
            )
        if self.bias != "none" and not _SAVES_BIASES:
            raise SpectuneError(
                f"bias={self.bias!r}: this PEFT ({peft.__version__}) would leave trained biases out of what it saves; "
                'pip install "peft>=0.21", or bias="none"'
            )
        try:
            self.method_for("", None)
        except SpectuneError as error:  # which names the method's field first
            field, _, rest = str(error).partition(" ")
            raise SpectuneError(f"{option_of(field)} {rest}") from None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, and into the folder's README how it is opened."""
        super().save_pretrained(save_directory, **kwargs)
        readme = Path(save_directory) / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if _HOW not in text:
            readme.write_text(f"{text.rstrip()}\n\n{_HOW}".lstrip(), encoding="utf-8")

    def options(self) -> dict[str, Any]:
        """Return the options that make up the method."""
        common = {f.name for f in dataclasses.fields(SpectuneConfig)} - {"use_dora"}
        patterns = {"rank_pattern", "alpha_pattern"}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common | patterns}

    def method_for(self, layer: str, shape: tuple[int, int] | None) -> Method:
        """Return the method of a layer.

        Args:
            layer: its name.
            shape: (out, in) of its weight, to which the rank is fitted; None leaves it.

        Raises:
            SpectuneError: an option out of its range, named.
        """
        known = self.layers.get(layer)
        if known is not None and shape is not None and tuple(known["shape"]) == shape:
            (term,) = known["terms"]
            return from_fields(self.methods[term["method"]])
        options = self.options()
        for pattern, option in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            matching = (v for key, v in (getattr(self, pattern, None) or {}).items() if matches_end(key, layer))
            options[option] = next(matching, options.get(option)) if option in options else None
        method = from_fields(fields_of(self.method, {k: v for k, v in options.items() if hasattr(self, k)}))
        return method if shape is None else method.fit(*shape)

    def note(self, chosen: Mapping[str, Described]) -> None:
        """Write down what was adapted."""
        self.methods, self.layers, self.modules = [], {}, {}
        for name, (shape, transposed, method, experts, kind) in chosen.items():
            fields = method.fields()
            if fields not in self.methods:
                self.methods.append(fields)
            terms = [{"method": self.methods.index(fields), "weight": 1.0}]
            self.layers[name] = {"shape": list(shape), "conv1d": transposed, "terms": terms}
            self.layers[name] |= {"experts": experts} if experts else {}
            self.layers[name] |= {} if kind == (LINEAR,) else {"kind": list(kind)}


def named(method: str) -> Callable[[C], C]:
    """Finish a config class: its method, and one sentence for an option that it does not have."""

    def finish(cls: C) -> C:
        cls.method = method
        begin = cls.__init__
        known = [f.name for f in dataclasses.fields(cls)]

        @wraps(begin)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in known:
                    told = f"{cls.__name__} got an unexpected keyword argument '{key}'"
                    why = _WHY.get(key, "").format(name=cls.__name__.removesuffix("Config"))
                    raise UnknownOption(f"{told}: {why}" if why else f"{told}{nearest(key, known)}")
            begin(self, *args, **kwargs)

        cls.__init__ = checked
        return cls

    return finish


@named("svf")
@dataclass
class SVFConfig(SpectuneConfig):
    """Scale every singular value: W' = U diag(S z) V^T, of which z trains (`spectune.SVF`).

    Args:
        parametrization: "plain" or "sigmoid".
        max_mult: the sigmoid parametrization's largest multiple.
    """

    parametrization: str = "plain"
    max_mult: float = 1.0


@named("svft")
@dataclass
class SVFTConfig(SpectuneConfig):
    """Train a sparse matrix between the singular vectors: W' = U (S + M) V^T (`spectune.SVFT`).

    Args:
        pattern: "plain", "banded", "random" or "top_k".
        width: the band's reach on either side of the diagonal.
        gate: the authors' code, with a trained gate.
        seed: of the random pattern.
    """

    pattern: str = "plain"
    width: int = 8
    gate: bool = False
    seed: int = 0


@named("lora_xs")
@dataclass
class LoRAXSConfig(SpectuneConfig):
    """Train a matrix between the top singular vectors: W' = W + s U R (S V^T) (`spectune.LoRAXS`).

    Args:
        r: singular triplets of the basis; r^2 parameters train in each layer.
        lora_alpha: numerator of the scale s = lora_alpha / r; None is r.
        rank_pattern: names or regexes of layers, and their r.
        alpha_pattern: names or regexes of layers, and their lora_alpha.
    """

    r: int = 64
    lora_alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


@named("pissa")
@dataclass
class PiSSAConfig(SpectuneConfig):
    """Train the top of the spectrum: W' = W + s (B A - B0 A0), of which A, B train (`spectune.PiSSA`).

    Unlike `LoraConfig(init_lora_weights="pissa")` this leaves W as it is.

    Args:
        r: singular triplets taken.
        lora_alpha: numerator of the scale s = lora_alpha / r; None is r.
        lora_dropout: probability of dropping an input of the branch in training.
        rank_pattern: names or regexes of layers, and their r.
        alpha_pattern: names or regexes of layers, and their lora_alpha.
    """

    r: int = 128
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


@named("milora")
@dataclass
class MiLoRAConfig(PiSSAConfig):
    """Train the bottom of the spectrum: W' = W + s (B A - B0 A0), of which A, B train (`spectune.MiLoRA`).

    Args:
        r: singular triplets taken.
        lora_alpha: numerator of the scale s = lora_alpha / r; None is r.
        lora_dropout: probability of dropping an input of the branch in training.
        rank_pattern: names or regexes of layers, and their r.
        alpha_pattern: names or regexes of layers, and their lora_alpha.
    """

    r: int = 64
    lora_dropout: float = 0.05


CONFIGS: tuple[type[SpectuneConfig], ...] = (SVFConfig, SVFTConfig, LoRAXSConfig, PiSSAConfig, MiLoRAConfig)
