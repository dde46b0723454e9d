"""What an adapter's documents say: its config, in Spectune's words and in PEFT's, and what is stored with the weights.

Whoever reads an adapter imports this, and pydantic with it; adapters on a model go without.
"""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.layers.attention import IN
from spectune.layers.kinds import KINDS, LINEAR
from spectune.layers.projections import Rows
from spectune.patterns import MOST_PATTERNS
from spectune.reading import SIDE


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError("should be a finite number")
    return value  # type: ignore[no-any-return]


def _sketch(code: object) -> Tensor:
    data = np.frombuffer(base64.b64decode(code if isinstance(code, str) else "?", validate=True), dtype="<f4")
    if data.size != math.prod(fingerprint.WEIGHT_SHAPE):
        raise ValueError("should be the sketch of a weight")
    return torch.from_numpy(data.astype(np.float32)).reshape(fingerprint.WEIGHT_SHAPE)


Number = Annotated[float, PlainValidator(_number)]  # as it stands: 16 stays 16
Row = Annotated[int, Field(ge=0, lt=1 << 31)]
Side = Annotated[int, Field(gt=0, le=SIDE)]
Few = Field(max_length=MOST_PATTERNS)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class TermEntry(_Document):
    """A term of a layer: the number of its method, and whether its basis was made of another weight than the base's."""

    method: Annotated[int, Field(ge=0)]
    weight: Number
    basis_stays: bool = False


class LayerEntry(_Document):
    """A layer: [out, in], and what else it is where it is no linear layer of its own.

    `experts` is how many have their weights in the tensor that this one's is a part of, `rows` what `Rows` says of a
    fused layer's weight, and `kind` a kind of layer and the axes of its kernel.
    """

    shape: Annotated[list[Side], Field(min_length=2, max_length=2)]
    conv1d: bool
    terms: Annotated[list[TermEntry], Field(min_length=1)]
    experts: int = 0
    rows: Annotated[list[Row], Field(min_length=4, max_length=4)] = []
    kind: Annotated[list[Any], Field(min_length=1, max_length=4)] = [LINEAR]

    @field_validator("rows")
    @classmethod
    def _fit(cls, rows: list[int], info: ValidationInfo) -> list[int]:
        cut, shape = Rows(*rows), info.data.get("shape")
        if shape and (cut.start + cut.size > cut.period or cut.size * cut.groups != shape[0]):
            raise ValueError("should be rows of a fused layer that there are so many of")
        return rows

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: list[Any], info: ValidationInfo) -> list[Any]:
        name, *kernel = kind
        known = name in (LINEAR, IN, *(each.name for each in KINDS))
        sizes = known and all(type(n) is int and 0 < n <= SIDE for n in kernel)
        if not sizes or info.data.get("shape", [0, 0])[1] % math.prod(kernel):
            raise ValueError("should be a kind of layer that is known, with a kernel that fits")
        return kind


class WholeEntry(_Document):
    """A term of a module that the adapter brings whole; see `WholeTerm`."""

    weight: Number
    tensors: Annotated[list[str], Field(min_length=1)]
    rows: list[Row] | None
    complete: bool


class AdapterConfig(_Document):
    """An adapter_config.json in Spectune's words."""

    library_name: Literal["spectune"]
    format_version: int
    base_model_name_or_path: str | None
    error: Number
    methods: list[dict[str, Any]]
    layers: Annotated[dict[str, LayerEntry], Field(min_length=1)]
    modules: dict[str, Annotated[list[WholeEntry], Field(min_length=1)]] | None = None


class TokenRows(BaseModel):
    """What PEFT's configs say of the rows of embeddings that trained: of one, or by the ends of modules' names."""

    trainable_token_indices: list[Row] | dict[str, list[Row]] | None = None

    def of(self, module: str) -> list[int] | None:
        """Return the rows of a module, where each is named once; else None."""
        given = self.trainable_token_indices
        if isinstance(given, dict):
            given = next((rows for target, rows in given.items() if module.endswith(target)), None)
        return given if given is not None and len(set(given)) == len(given) else None


class PeftConfig(TokenRows):
    """An adapter_config.json of PEFT's LoRA or AdaLoRA, as far as it says what a layer answers."""

    base_model_name_or_path: str | None = None
    auto_mapping: dict[str, Any] | None = None
    r: Number = 0
    init_r: Number = 0
    lora_alpha: Number
    lora_dropout: Number = 0.0
    rank_pattern: Annotated[dict[str, Number | list[bool]], Few] | None = None  # AdaLoRA's say which ranks are left
    alpha_pattern: Annotated[dict[str, Number], Few] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    peft_version: Any = None

    def model_class(self) -> list[Any]:
        """Return the class of the base and the module that it is in."""
        mapping = self.auto_mapping or {}
        return [mapping.get("base_model_class"), mapping.get("parent_library")]


class Stored(_Document):
    """What is stored with the weights besides the tensors, each as JSON: PEFT's config has no place for it.

    Labels of a classifier's head and how they are read, the model's class and its module, the sketches of the base's
    weights by layer, and how the base was packed.
    """

    labels: list[str] | None = None
    problem_type: list[str] = []
    architecture: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    base: dict[str, Annotated[Tensor, PlainValidator(_sketch)]] = {}
    quantize: list[str] = []
