"""What each task adds to the configuration of a run: its keys, what a comparison may measure, and what must hold.

Light on purpose: the command line reads these for its help, and imports no model for it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from spectune.errors import SpectuneError


class RunConfig(Protocol):
    """A run's whole configuration, as far as what a task adds is checked against it."""

    @property
    def data(self) -> object: ...


class TaskOptions(BaseModel):
    """The keys of one task, which a run's configuration has beside its own.

    A key means the same in a resumed run as in the first one, so a resumed run refuses another value; a key that may
    change says `json_schema_extra={"resume": "told"}`, and one that does not matter `"ignored"`.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    measures: ClassVar[tuple[str, ...]] = ()  # what `spectune compare` can compare by, the usual one first

    @property
    def makes_records(self) -> bool:
        """Whether the records come from the task itself, and not from `data`."""
        return False

    @property
    def streams(self) -> bool:
        """Whether records are looked at one by one, so that they need not be in memory."""
        return True

    def check_task(self, config: RunConfig) -> None:
        """Raise for keys of a configuration that do not go together.

        Raises:
            SpectuneError: they do not.
        """

    def measured(self) -> tuple[str, ...]:
        """Return what `spectune compare` can compare these runs by, the usual one first."""
        return self.measures


class SftOptions(TaskOptions):
    """The keys of task: sft."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "exact_match")

    replies: int = Field(
        2,
        ge=0,
        description="sft: held-out prompts that the model replies to in sight whenever it is evaluated",
        json_schema_extra={"resume": "ignored"},
    )


class ClassifyOptions(TaskOptions):
    """The keys of task: classify."""

    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")
    _of_problems: ClassVar[dict[str, tuple[str, ...]]] = {
        "multi_label_classification": ("micro_f1", "macro_f1", "subset_accuracy", "loss"),
        "regression": ("pearson", "spearman", "mse", "mae", "loss"),
    }

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = Field(
        None,
        description="classify: one label of several, any number of them (lists), or a number; by the labels if not "
        "given",
    )
    new_head: bool = Field(
        False, description="classify: a new head where the model has one for as many labels by other names"
    )

    @property
    def streams(self) -> bool:
        return False

    def measured(self) -> tuple[str, ...]:
        return self._of_problems.get(self.problem_type or "", self.measures)


class _PreferenceOptions(TaskOptions):
    """The keys of tasks that learn from preferences."""

    beta: float = Field(0.1, gt=0, description="dpo, kto: how much of a step away from the base a preference is worth")


class KtoOptions(_PreferenceOptions):
    """The keys of task: kto."""

    measures: ClassVar[tuple[str, ...]] = ("reward_accuracy", "loss")

    desirable_weight: float = Field(1.0, gt=0, description="kto: what an answer with label true counts")
    undesirable_weight: float = Field(1.0, gt=0, description="kto: what an answer with label false counts")


class DpoOptions(_PreferenceOptions):
    """The keys of task: dpo."""

    measures: ClassVar[tuple[str, ...]] = ("reward_accuracy", "loss")

    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="dpo: of a pair's margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo, sigmoid: share of pairs that may be swapped")


class ReinforceOptions(TaskOptions):
    """The keys of task: reinforce."""

    environment: str | None = Field(None, description="reinforce: reasoning-gym environment, such as chain_sum")
    environment_options: dict[str, object] = Field({}, description="reinforce: the environment's, as {max_terms: 2}")
    problems: int = Field(2000, ge=2, description="reinforce: the environment's problems, those held out included")
    raw: bool = Field(False, description="reinforce: put the environment's questions without a chat template")
    reward: str | list[str] | None = Field(
        None, description="reinforce: module:function, from the working directory or installed, or several that are "
        "added; wins over the environment's own"
    )  # fmt: skip
    reward_weights: list[float] | None = Field(
        None, description="reinforce: what each of several rewards counts; 1 if not given"
    )
    samples: int = Field(8, ge=1, description="reinforce: completions of each prompt, each other's baseline")
    max_new_tokens: int = Field(64, ge=1, description="reinforce: tokens of a completion")
    temperature: float = Field(1.0, ge=0, description="reinforce: of the sampling, 0 is greedy; evaluations are greedy")
    reward_baseline: Literal["leave_one_out", "none"] = Field(
        "leave_one_out", description="reinforce: what a reward is measured against: the others of its prompt, or zero"
    )
    kl: float = Field(0.0, ge=0, description="reinforce: coefficient of the KL divergence to the base, per completion")
    log_kl: bool = Field(
        False, description="reinforce: log the KL divergence though kl is 0, which takes a pass of the base each step"
    )
    normalize_rewards: bool = Field(
        False, description="reinforce: divide advantages by the rewards' standard deviation among a prompt's samples"
    )

    @property
    def makes_records(self) -> bool:
        return self.environment is not None

    @property
    def streams(self) -> bool:
        return False

    def check_task(self, config: RunConfig) -> None:
        count = len([self.reward] if isinstance(self.reward, str) else self.reward or ())
        if self.reward_weights is not None and len(self.reward_weights) != count:
            raise SpectuneError(f"reward_weights has {len(self.reward_weights)} numbers for {count} rewards")
        if self.reward_baseline == "none" and self.normalize_rewards:
            raise SpectuneError(
                "normalize_rewards divides what is measured against a baseline: leave out reward_baseline: none"
            )
        if self.reward_baseline != "none" and self.samples < 2:
            raise SpectuneError("samples: 1 has no others to be measured against: give more, or reward_baseline: none")
        if self.temperature == 0 and self.samples > 1:
            raise SpectuneError("temperature: 0 draws the same completion each time: give samples: 1")
        if self.environment is None:
            if config.data is not None and self.reward is None:
                raise SpectuneError("task: reinforce needs a reward: give reward (module:function) or environment")
            return
        for key in ("data", "data_config", "data_split", "eval_data", "eval_split"):
            if getattr(config, key) is not None:
                raise SpectuneError(f"{key} and environment are both given; the problems come from one of them")


def resumes(field: FieldInfo) -> str:
    """Return what another value of a task's key makes of a resumed run: "same" (refused), "told" or "ignored"."""
    extra = field.json_schema_extra
    return str(extra.get("resume", "same")) if isinstance(extra, dict) else "same"
