"""The configuration of a run: one source for the YAML file, the key=value overrides and their help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectune.errors import SpectuneError, nearest

if TYPE_CHECKING:
    from spectune.methods import Method

_OF_TASK = {
    "dpo": ("beta", "dpo_loss", "label_smoothing"),
    "reinforce": (
        *("environment", "environment_options", "problems", "raw", "reward", "samples", "max_new_tokens"),
        *("temperature", "kl", "normalize_rewards"),
    ),
}
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """Every key of `spectune train`, with its default."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
    command: ClassVar[str] = "train"

    model: str = Field(description="embedded name (smollm2-135m), local folder or hub id")
    data: str | None = Field(
        None,
        description="JSONL, CSV or Parquet file, or a data set's folder or id, with what the task takes; needed unless "
        "there is an environment",
    )
    data_config: str | None = Field(None, description="configuration of a data set that has several (glue: sst2)")
    data_split: str | None = Field(None, description="split of a data set to train on; train if not given")
    output: str = Field(description="folder for the adapter, its checkpoints and its log")
    task: Literal["sft", "classify", "dpo", "reinforce"] = Field(
        "sft",
        description="sft: messages, prompt and completion, or text; classify: text and label; dpo: prompt, chosen and "
        "rejected; reinforce: prompts and a reward",
    )
    method: str = Field("svf", description="name or name:field=value,... (see `spectune methods`)")
    targets: str | list[str] = Field("all-linear", description="all-linear, name suffixes, or a regex")
    exclude: str | list[str] = Field([], description="suffixes or a regex of layers to leave out")
    overrides: dict[str, str | None] = Field({}, description="suffix or regex: another method, or null for none")
    adapter: str | None = Field(None, description="folder of an adapter to go on from; its method and layers are kept")
    lr: _Rate | None = Field(None, description="learning rate; the method's own if not given")
    group_lr: dict[str, _Rate] = Field(
        {}, description="name of a trained tensor (magnitude, z, ...): its learning rate"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(8, ge=1, description="examples in a forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes in an optimizer step")
    max_length: int = Field(1024, ge=8, description="tokens of an example; the rest is cut off")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient's norm is clipped to this")
    completion_only: bool = Field(True, description="loss on completions and assistant turns only")
    beta: float = Field(0.1, gt=0, description="dpo: how much of a step away from the base a preference is worth")
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="dpo: of a pair's margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo, sigmoid: share of pairs that may be swapped")
    columns: dict[str, str] = Field(
        {}, description="the data's names for what the task takes: {text: sentence, label: spam}"
    )
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the data kept for evaluation")
    eval_data: str | None = Field(None, description="data for evaluation, instead of held_out")
    eval_split: str | None = Field(
        None, description="split of a data set for evaluation, of eval_data or else of data; instead of held_out"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; at the end only if not given")
    patience: int | None = Field(None, ge=1, description="evaluations without a better one before the run stops")
    best: bool = Field(False, description="end with the checkpoint that is best on what is held out; needs eval_steps")
    save_steps: int = Field(100, ge=1, description="steps between checkpoints; with best or patience eval_steps")
    log_steps: int = Field(1, ge=1, description="steps between lines of the log")
    environment: str | None = Field(None, description="reinforce: reasoning-gym environment, such as chain_sum")
    environment_options: dict[str, Any] = Field({}, description="reinforce: the environment's, as {max_terms: 2}")
    problems: int = Field(2000, ge=2, description="reinforce: the environment's problems, those held out included")
    raw: bool = Field(False, description="reinforce: put the environment's questions without a chat template")
    reward: str | None = Field(
        None, description="reinforce: module:function, from the working directory or installed; wins over the "
        "environment's own"
    )  # fmt: skip
    samples: int = Field(8, ge=2, description="reinforce: completions of each prompt, each other's baseline")
    max_new_tokens: int = Field(64, ge=1, description="reinforce: tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="reinforce: of the sampling; evaluations are greedy")
    kl: float = Field(0.0, ge=0, description="reinforce: coefficient of the KL divergence to the base, per completion")
    normalize_rewards: bool = Field(
        False, description="reinforce: divide advantages by the rewards' standard deviation among a prompt's samples"
    )
    dtype: str | None = Field(
        None, description="of the base: fp32, bf16, fp16; the faster of the first two if not given"
    )
    device: str | None = Field(None, description="cpu, cuda, mps, ...; the accelerator if there is one")
    fsdp: bool = Field(False, description="shard the frozen base over the processes that torchrun started (FSDP2)")
    factored: bool = Field(
        True,
        description="train svf and svft through the factors of W: faster, and equal up to rounding",
    )
    gradient_checkpointing: bool | Literal["light"] = Field(
        "light",
        description="compute activations again to save memory: light, all but the products of linear layers; true, "
        "everything; false, nothing",
    )
    report_to: str | list[str] = Field([], description="tensorboard, wandb, trackio, ...; log.jsonl is always written")
    seed: int = Field(0, ge=0, description="of the split, the order of the data and the adapter's start")
    resume: bool = Field(False, description="go on from the last checkpoint in output")
    overwrite: bool = Field(False, description="start anew in an output folder that holds an adapter")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    def parsed_method(self) -> Method:
        """Return the method."""
        from spectune.methods import parse

        return parse(self.method)

    def reports(self) -> list[str]:
        """Return where to report to."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    def check(self) -> None:
        """Raise for keys that do not go together.

        Raises:
            SpectuneError: no data, evaluation on what is trained on, a key of another task, an adapter and what it has
                already, patience or best without evaluations, or checkpoints at other steps than evaluations.
        """
        for task, keys in _OF_TASK.items():
            for key in keys if task != self.task else ():
                if self._given(key):
                    raise SpectuneError(f"{key} is a key of task: {task}, and this is task: {self.task}")
        self._check_data()
        for key in ("targets", "exclude", "overrides") if self.adapter is not None else ():
            if self._given(key):
                raise SpectuneError(f"{key} cannot change with adapter: the adapter in {self.adapter} has its layers")
        wanted = "patience" if self.patience is not None else "best" if self.best else None
        if wanted is None:
            return
        if self.eval_steps is None:
            raise SpectuneError(f"{wanted} needs evaluations: give eval_steps")
        if self.held_out == 0 and self.evaluation() is None:
            raise SpectuneError(f"{wanted} needs held-out data: give held_out, eval_data or eval_split")

    def _given(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default

    def _check_data(self) -> None:
        if self.environment is None:
            if self.data is None:
                raise SpectuneError(f"data is not given: {type(self).model_fields['data'].description}")
            if self.task == "reinforce" and self.reward is None:
                raise SpectuneError("task: reinforce needs a reward: give reward (module:function) or environment")
            other = self.evaluation()
            if other is not None and (other[0], other[2] or "train") == (self.data, self.data_split or "train"):
                raise SpectuneError(
                    "the evaluation would be on what is trained on: give another eval_data or eval_split, or leave "
                    "both out for a held_out share"
                )
            return
        for key in ("data", "data_config", "data_split", "eval_data", "eval_split"):
            if getattr(self, key) is not None:
                raise SpectuneError(f"{key} and environment are both given; the problems come from one of them")

    def evaluation(self) -> tuple[str, str | None, str | None] | None:
        """Return the data, configuration and split to evaluate on, or None where it is a share of the training data."""
        if self.data is None or (self.eval_data is None and self.eval_split is None):
            return None
        if self.eval_data is None or _place(self.eval_data) == _place(self.data):
            return self.data, self.data_config, self.eval_split
        return self.eval_data, None, self.eval_split

    def learning_rate(self) -> float:
        """Return lr, or the method's own."""
        return self.lr if self.lr is not None else self.parsed_method().learning_rate


C = TypeVar("C", bound=TrainConfig)


def load_config(path: str | Path | None, overrides: list[str], kind: type[C] = TrainConfig, **presets: Any) -> C:
    """Read a YAML file and apply key=value overrides.

    Args:
        path: the file.
        overrides: key=value pairs, which win over the file.
        kind: what to make of them.
        presets: values over which both win.

    Raises:
        SpectuneError: an unreadable file, an unknown key (the nearest is named), or a wrong value.
    """
    values: dict[str, Any] = presets
    if path is not None:
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise SpectuneError(f"cannot read {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpectuneError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if read is not None and not isinstance(read, dict):
            raise SpectuneError(f"{path} must hold key: value pairs")
        values |= read or {}
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals:
            raise SpectuneError(f"{pair!r} is not key=value")
        values[key.strip()] = _value(text)
    known = kind.model_fields
    for key in values:
        if key not in known:
            raise SpectuneError(f"unknown key {key!r}{nearest(str(key), known)} (see `spectune {kind.command} --help`)")
    if isinstance(values.get("lr"), str):  # YAML 1.1 reads 1e-4 as text
        values["lr"] = _number(values["lr"])
    try:
        config = kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:1]))
        if first["type"] == "missing":
            raise SpectuneError(f"{key} is not given: {known[key].description}") from None
        raise SpectuneError(f"{key}: {first['msg']} (given: {first['input']!r})") from None
    config.check()
    from spectune.methods import parse

    for text in (config.method, *config.overrides.values()):
        if text is not None:
            parse(text)
    return config


def _place(data: str) -> str:
    return os.path.abspath(data)  # an id, too, is then equal to itself only


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
