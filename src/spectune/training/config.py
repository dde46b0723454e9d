"""The configuration of a run: one source for the YAML file, the key=value overrides and their help."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo

from spectune.bases.embedded import EMBEDDED
from spectune.errors import SpectuneError, nearest
from spectune.reading import read_yaml
from spectune.training.aliases import aliased, hint
from spectune.training.options import TaskOptions
from spectune.training.registry import options_of, owner_of, task_keys
from spectune.training.values import in_full, number_of, place_of, value_of, written_out

if TYPE_CHECKING:
    from spectune.methods import Method

PLACES = ("model", "data", "adapter", "eval_data")
_NARROWED = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "split")
# the data, unless `train` is given them
FOLLOWING = ("batch_size", "epochs", "held_out", "eval_steps", "max_eval_samples", "max_length")
_OF_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz")  # no settings
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _checkpointing(value: object) -> object:
    return "selective" if value == "light" else value  # as it was called once


class Source(BaseModel):
    """One of several sources of data."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="file, pattern, or data set's folder or id")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="how often each record is taken; 2 is twice")
    config: str | None = Field(None, description="configuration of a data set")
    split: str | None = Field(None, description="split of a data set")


class TrainConfig(BaseModel):
    """Every key of `spectune train`, with its default."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    command: ClassVar[str] = "train"
    options_type: ClassVar[type[TaskOptions] | None] = None  # of the task whose keys the class has beside these

    model: str = Field(description="embedded name (smollm2-135m), local folder or hub id")
    data: str | list[str | Source] | None = Field(
        None,
        description="JSON, JSONL, CSV, TSV or Parquet file, a pattern such as data/*.jsonl, or a data set's folder or "
        "id, with what the task takes; several as [a.jsonl, {path: b.jsonl, weight: 2}]; needed unless there is an "
        "environment",
    )
    data_config: str | None = Field(None, description="configuration of a data set that has several (glue: sst2)")
    data_split: str | None = Field(None, description="split of a data set to train on; train if not given")
    streaming: bool = Field(
        False,
        description="keep records in a file and not in memory: for data that memory cannot hold (sft, dpo, kto)",
    )
    output: str = Field(description="folder for the adapter, its checkpoints and its log")
    task: str = Field(
        "sft",
        description="sft: messages, prompt and completion, or text; classify: text and label; dpo: prompt, chosen and "
        "rejected; kto: prompt, completion and label (true or false); reinforce: prompts and a reward; or what an "
        "installed package offers, or module:Class",
    )
    method: str = Field("svf", description="name or name:field=value,... (see `spectune methods`)")
    targets: str | list[str] | dict[str, str | None] = Field(
        "all-linear",
        description="all-linear, suffixes of names or names of modules around layers, or a regex; or, without method, "
        "{q_proj|v_proj: svf, mlp: 'lora:rank=8'}",
    )
    exclude: str | list[str] = Field([], description="suffixes or a regex of layers to leave out")
    overrides: dict[str, str | None] = Field({}, description="suffix or regex: another method, or null for none")
    layers_to_transform: int | list[int] | None = Field(
        None, description="numbers of the blocks whose targets are taken"
    )
    layers_pattern: str | list[str] | None = Field(
        None, description="the list that holds these blocks (layers, h); the first that is numbered if not given"
    )
    rank_pattern: dict[str, int] = Field({}, description="regex of a name's end: the method's rank there")
    alpha_pattern: dict[str, float] = Field({}, description="regex of a name's end: the method's alpha there")
    split: Literal["auto"] | None = Field(
        None,
        description="auto: each projection of a fused layer (c_attn, qkv_proj, query_key_value, gate_up_proj) has a "
        "decomposition and an adapter of its own, c_attn.q_proj",
    )
    modules_to_save: list[str] | dict[str, list[int] | None] = Field(
        [],
        description="modules of any kind (heads, norms, embeddings) to train and save whole; {embed_tokens: [7, 8]} is "
        "these rows alone; what the checkpoint lacked is trained in any case",
    )
    adapter: str | None = Field(None, description="folder of an adapter to go on from; its method and layers are kept")
    lr: _Rate | Literal["auto"] | None = Field(
        None, description="learning rate; the method's own if not given; auto measures one, by runs of 24 steps"
    )
    group_lr: dict[str, _Rate] = Field(
        {}, description="name of a trained tensor (magnitude, z, ...): its learning rate"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(8, ge=1, description="examples in a forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes in an optimizer step")
    max_length: int = Field(1024, ge=8, description="tokens of an example; the rest is cut off")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="the gradient's norm is clipped to this; 0 does not clip")
    completion_only: bool = Field(True, description="loss on completions and assistant turns only")
    columns: dict[str, str | list[str]] = Field(
        {},
        description="the data's names for what the task takes: {text: sentence, label: spam}; or {label: [toxic, "
        "insult]}, columns that say yes or no",
    )
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the data kept for evaluation")
    eval_data: str | None = Field(None, description="data for evaluation, instead of held_out")
    eval_split: str | None = Field(
        None, description="split of a data set for evaluation, of eval_data or else of data; instead of held_out"
    )
    max_eval_samples: int | None = Field(
        None, ge=1, description="records that evaluations measure at most, always the same ones; null is all"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations, beside those before and after")
    patience: int | None = Field(None, ge=1, description="evaluations without a better one before the run stops")
    best: bool = Field(False, description="end with the checkpoint that is best on what is held out; needs eval_steps")
    save_steps: int = Field(100, ge=1, description="steps between checkpoints; with best or patience eval_steps")
    log_steps: int = Field(1, ge=1, description="steps between lines of the log")
    dtype: str | None = Field(
        None, description="of the base: fp32, bf16, fp16; the faster of the first two if not given"
    )
    quantize: str | None = Field(
        None,
        description="pack the base in 4 or 8 bits (nf4, int8) by bitsandbytes; adapters train over it. nf4:rank=16 "
        "holds a part of each weight of that rank beside",
    )
    device: str | None = Field(None, description="cpu, cuda, mps, ...; the accelerator if there is one")
    fsdp: bool = Field(False, description="shard the frozen base over the processes that torchrun started (FSDP2)")
    factored: bool = Field(
        True,
        description="train svf and svft through the factors of W: faster, and equal up to rounding",
    )
    fused: bool = Field(
        True,
        description="sample and evaluate from merged weights, kept beside the base's meanwhile, where that is faster, "
        "memory allows, and they hold the whole update",
    )
    gradient_checkpointing: Annotated[bool | Literal["selective"], BeforeValidator(_checkpointing)] = Field(
        "selective",
        description="compute activations again to save memory: selective, all but the products of linear layers; true, "
        "everything; false, nothing",
    )
    report_to: str | list[str] = Field([], description="tensorboard, wandb, trackio, ...; log.jsonl is always written")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the order of the data and the adapter's start")
    resume: bool = Field(False, description="go on from the last checkpoint in output")
    overwrite: bool = Field(False, description="start anew in an output folder that holds an adapter")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    def __new__(cls, **values: object) -> TrainConfig:
        # a configuration is of a class that has the keys of its task as well
        if cls.options_type is None:
            cls = with_task(cls, str(values.get("task", cls.model_fields["task"].default)))
        return super().__new__(cls)

    def __reduce__(self) -> object:  # the class is made at run time
        base = next(c for c in type(self).__mro__ if issubclass(c, TrainConfig) and c.options_type is None)
        return _made, (base, self.model_dump(exclude_unset=True))

    @field_validator("model", "data", "output", "adapter", "eval_data", mode="before")
    @classmethod
    def _written_out(cls, value: object) -> object:
        """Return a path with the home folder and variables in full, which a shell writes out and a file does not."""
        return written_out(value)

    def in_full(self) -> dict[str, object]:
        """Return all settings, with the paths of files and folders that are there in full: true in every folder."""
        found = {**self.model_dump(), "output": os.path.abspath(self.output)}
        kept = ("model",) if self.model in EMBEDDED else ()
        return {key: in_full(value) if key in PLACES and key not in kept else value for key, value in found.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would take for 1 or 0: the yes of `lr: yes`."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and not _takes(field.annotation, bool):
            raise ValueError(
                "YAML reads yes, no, on and off as true and false: quote a name, and write a number for one"
            )
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _one_source(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value

    @field_validator("data")
    @classmethod
    def _some_data(cls, value: object) -> object:
        if isinstance(value, list) and not value:
            raise ValueError("the list of data is empty")
        return value

    def parsed_method(self) -> Method:
        """Return the method; of several that targets name, the first."""
        return self.parsed_methods()[0]

    def parsed_methods(self) -> list[Method]:
        """Return the method, or the different ones that targets name."""
        from spectune.methods import parse  # with torch, which the command line's help does without

        texts = self.targets.values() if isinstance(self.targets, dict) else [self.method]
        return list(dict.fromkeys(parse(text) for text in texts if text is not None))

    def where(self) -> dict[str, Any]:
        """Return what `spectune.adapt` is to be told of layers and their methods, by its own names."""
        keys = ("targets", "exclude", "overrides", *_NARROWED)
        mapped = isinstance(self.targets, dict)
        return {"method": None if mapped else self.parsed_method(), **{key: getattr(self, key) for key in keys}}

    def reports(self) -> list[str]:
        """Return where to report to."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    def check(self) -> None:
        """Raise for keys that do not go together.

        Raises:
            SpectuneError: no data, evaluation on what is trained on, an adapter and what it has already, patience or
                best without evaluations, checkpoints at other steps than evaluations, or what the task refuses.
        """
        options = self.of_task()
        if not options.makes_records:
            self._check_data()
        options.check_task(self)
        if self.streaming and not options.streams:
            raise SpectuneError(f"task: {self.task} looks at all records at once: leave streaming out")
        self._check_targets()
        for key in ("targets", "exclude", "overrides", *_NARROWED, "modules_to_save") if self.adapter else ():
            if self._given(key):
                raise SpectuneError(f"{key} cannot change with adapter: the adapter in {self.adapter} has its layers")
        wanted = "patience" if self.patience is not None else "best" if self.best else None
        if wanted is None:
            return
        if self.eval_steps is None:
            raise SpectuneError(f"{wanted} needs evaluations: give eval_steps")
        if self.held_out == 0 and self.evaluation() is None:
            raise SpectuneError(f"{wanted} needs held-out data: give held_out, eval_data or eval_split")

    def _check_targets(self) -> None:
        """Take the methods that targets name for the method, in texts.

        Raises:
            SpectuneError: another method is given beside them, none is left, or their learning rates differ.
        """
        if not isinstance(self.targets, dict):
            return
        methods = " + ".join(dict.fromkeys(text for text in self.targets.values() if text is not None))
        if not methods:
            raise SpectuneError("targets: no pattern has a method")
        if "method" in self.model_fields_set and self.method != methods:
            raise SpectuneError("targets that map patterns to methods say each layer's: leave the method out")
        rates = {method.name: method.learning_rate for method in self.parsed_methods()}
        if self.lr is None and len(set(rates.values())) > 1:
            told = ", ".join(f"{name}: {rate:g}" for name, rate in rates.items())
            raise SpectuneError(
                f"targets name methods that have different learning rates by default ({told}): give lr, and group_lr "
                "for single tensors"
            )
        self.method = methods
        self.model_fields_set.discard("method")

    def _given(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default

    def of_task(self) -> TaskOptions:
        """Return the same configuration, as the task's own part of it."""
        assert isinstance(self, TaskOptions)  # by __new__
        return self

    def _check_data(self) -> None:
        if self.data is None:
            raise SpectuneError(f"data is not given: {type(self).model_fields['data'].description}")
        other = self.evaluation()
        if other is not None and (other[0], other[2] or "train") == (self.data, self.data_split or "train"):
            raise SpectuneError(
                "the evaluation would be on what is trained on: give another eval_data or eval_split, or leave "
                "both out for a held_out share"
            )

    def evaluation(self) -> tuple[str | list[str | Source], str | None, str | None] | None:
        """Return the data, configuration and split to evaluate on, or None where it is a share of the training data."""
        if self.data is None or (self.eval_data is None and self.eval_split is None):
            return None
        if self.eval_data is None or (isinstance(self.data, str) and place_of(self.eval_data) == place_of(self.data)):
            return self.data, self.data_config, self.eval_split
        return self.eval_data, None, self.eval_split

    def learning_rate(self) -> float:
        """Return lr, or the method's own, also where one is yet to be measured."""
        return self.lr if isinstance(self.lr, (int, float)) else self.parsed_method().learning_rate


def _takes(annotation: object, kind: type) -> bool:
    return annotation is kind or any(_takes(each, kind) for each in get_args(annotation))


C = TypeVar("C", bound=TrainConfig)


@cache
def with_task(kind: type[C], task: str) -> type[C]:
    """Return a kind of configuration that has the keys of a task beside its own.

    Raises:
        SpectuneError: there is no such task, or a key of its has the name of one of a run's.
    """
    options = options_of(task)
    for key in options.model_fields.keys() & kind.model_fields.keys():
        raise SpectuneError(f"task: {task} has the key {key!r}, which every run has; its class must name it otherwise")
    made: Any = create_model(kind.__name__, __base__=(kind, options), __module__=kind.__module__)
    made.options_type = options
    return made


def _made(kind: type[C], values: dict[str, Any]) -> C:
    return kind(**values)


def _told(error: ValidationError, known: dict[str, FieldInfo]) -> str:
    """Return the first wrong value of a configuration in a sentence."""
    key = str(error.errors()[0]["loc"][0])
    # of a key that may be of several types each says what it is not: the one that comes farthest is what was meant
    found = max((each for each in error.errors() if each["loc"][0] == key), key=lambda each: len(each["loc"]))
    item = next((f", item {part + 1}" for part in found["loc"] if isinstance(part, int)), "")
    description = known[key].description
    if found["type"] == "missing":
        inner = "" if len(found["loc"]) == 1 else f": {found['loc'][-1]}"
        return f"{key}{item}{inner} is not given: {description}"
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])
        return f"{key}{item}: unknown key {name!r}{nearest(name, Source.model_fields)}"
    said = f"{key}{item}: {found['msg'].removeprefix('Value error, ')} (given: {found['input']!r:.200})"
    return f"{said}; {key} is: {description}" if found["type"].endswith("_type") else said


def load_config(path: str | Path | None, overrides: list[str], kind: type[C] = TrainConfig, **presets: object) -> C:
    """Read a YAML file and apply key=value overrides.

    Args:
        path: the file.
        overrides: key=value pairs, which win over the file.
        kind: what to make of them.
        presets: values over which both win.

    Raises:
        SpectuneError: an unreadable file, an unknown key (the nearest is named), or a wrong value.
    """
    values: dict[str, Any] = dict(presets)
    if path is not None:
        if Path(path).suffix.lower() in _OF_DATA:
            raise SpectuneError(
                f"{path} is data, and settings are needed: give model=..., data={path} and output=..., or a file of "
                f"them, which `spectune init {path} -m MODEL` writes"
            )
        read = read_yaml(Path(path))
        if read is not None and not isinstance(read, dict):
            raise SpectuneError(f"{path} must hold key: value pairs")
        values |= read or {}
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals:
            raise SpectuneError(f"{pair!r} is not key=value")
        values[(key := key.strip())] = value_of(text, kind.model_fields.get(key))
    other = next((key for key in values if not isinstance(key, str)), "")
    if not isinstance(other, str):
        raise SpectuneError(f"{path}: {other!r} is no key: quote it, for YAML reads yes, no, on, off and ~ as values")
    values = aliased(values, {*kind.model_fields, *task_keys()})
    for key in ("model", "output", "data", "eval_data", "adapter"):  # an empty path would be the working directory
        if values.get(key) == "" and presets.get(key) != "":
            raise SpectuneError(f"{key} is empty")
    kind = with_task(kind, str(values.get("task", kind.model_fields["task"].default)))
    known = kind.model_fields
    for key in list(values):
        if key in known:
            continue
        owner = owner_of(str(key))
        if owner is None:
            raise SpectuneError(
                f"unknown key {key!r}{hint(str(key)) or nearest(str(key), [*known, *task_keys()])} "
                f"(see `spectune {kind.command} --help`)"
            )
        if values.pop(key) != task_keys()[key].default:  # folders of earlier runs hold the keys of every task
            raise SpectuneError(f"{key} is a key of task: {owner}, and this is task: {values.get('task', 'sft')}")
    if isinstance(values.get("lr"), str) and values["lr"] != "auto":  # YAML 1.1 reads 1e-4 as text
        values["lr"] = number_of(values["lr"])
    try:
        config = kind(**values)
    except ValidationError as error:
        raise SpectuneError(_told(error, known)) from None
    config.check()
    from spectune.methods import parse  # with torch, which the command line's help does without

    config.parsed_methods()
    for text in config.overrides.values():
        if text is not None:
            parse(text)
    return config
