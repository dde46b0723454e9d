"""The configuration of a comparison: the keys of a run, and what is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from spectune.errors import SpectuneError, nearest
from spectune.reading import read_json
from spectune.training.config import TrainConfig
from spectune.training.registry import options_of, task_names
from spectune.training.values import written_out

_CHOSEN = {  # what a comparison sets itself, and how to say it instead
    "method": "give methods",
    "lr": "a learning rate is searched for each method: give lrs, their number",
    "held_out": "give validation and test",
    "eval_data": "give test_data",
    "eval_split": "give validation and test",
    "max_eval_samples": "give validation and test",
    "adapter": "every method starts from the base",
    "resume": "the same command goes on where it stopped",
    "best": "the last step counts",
    "patience": "the last step counts",
    "eval_steps": "evaluations are at the quarters of a run",
    "save_steps": "trials keep no checkpoints",
    "log_steps": "every step is logged",
    "report_to": "results are in output",
    "fsdp": "give workers",
    "streaming": "trials share data in memory",
}
# keys that say how much is compared or how it is run, and not what a trial is
_EXTENT = ("output", "methods", "seeds", "lrs", "search", "workers", "launcher", "address", "baseline")
ONCE = ("overwrite", "retry")  # keys that say what becomes of the results there are
RECORDS = "records"  # of settings.json: the digest of the data
LESS = ("loss", "mse", "mae")  # measures of which less is better
SHARES = ("accuracy", "macro_f1", "exact_match", "reward_accuracy")  # of which a point is a hundredth
OF_RECORDS = ("accuracy", "exact_match")  # the share of records that are answered right
METHODS = [
    *("base", "full", "lora", "svf", "svft", "svft:pattern=banded,width=8", "pissa", "milora", "lora_xs"),
    *("dora", "dora:inner=pissa", "dora:inner=svf", "adalora"),
]


class CompareConfig(TrainConfig):
    """Every key of `spectune compare`, with its default: those of `spectune train`, and these."""

    command: ClassVar[str] = "compare"

    output: str = Field("runs/compare", description="folder for the report, and for what a stopped run goes on from")
    methods: list[str] = Field(
        METHODS,
        description="what is compared: methods as for train, full (every weight trains) and base (the model as it is; "
        "where a new head must be learned, that alone)",
    )
    baseline: str = Field("lora", description="the method that differences are taken against")
    metric: str | None = Field(
        None,
        description="accuracy, macro_f1 or loss (classify; of several labels micro_f1, macro_f1, subset_accuracy or "
        "loss, of a number pearson, spearman, mse, mae or loss); loss or exact_match (sft); reward_accuracy or loss "
        "(dpo, kto)",
    )
    seeds: int = Field(3, ge=1, description="runs of each method at its best learning rate, each in its own data order")
    detect: float | None = Field(
        None,
        gt=0,
        description="a difference to find, in points (of a loss, in its own unit): more seeds by what the baseline's "
        "runs show, and a larger test",
    )
    lrs: int = Field(
        5,
        ge=1,
        description="learning rates tried first at most, a factor of lr_factor apart; 1: each method's own, unsearched",
    )
    lr_factor: float = Field(10**0.5, gt=1, description="between learning rates that are tried first")
    start: Literal["own", "auto"] = Field(
        "own",
        description="the learning rate that a search begins at, or that is taken where lrs is 1: each method's own, or "
        "auto, measured by short runs as `spectune lr` does",
    )
    search: float = Field(8.0, ge=1, description="whole runs that the search for a method's learning rate may take")
    until: Literal["steps", "plateau"] = Field(
        "steps",
        description="plateau: a run ends once its held-out loss, over a quarter of them, falls by less than 1% of what "
        "it has fallen so far",
    )
    equal: Literal["steps", "time"] = Field(
        "steps", description="what every method has as much of; time: as the baseline takes for its steps"
    )
    validation: float = Field(
        0.15, gt=0, lt=1, description="share of the data on which a run is looked at; up to 5 such parts take turns"
    )
    test: float = Field(0.25, gt=0, lt=1, description="share of the data for the result, which chooses nothing")
    test_data: str | None = Field(None, description="data for the result, instead of a share")
    budget: str | None = Field(None, description="trained parameters, as 100k: sets each method's rank or width")
    general: str | None = Field(
        "python-docs",
        description="texts to see what was forgotten: data with text, python-docs (the documentation that comes with "
        "Python), or null",
    )
    retry: bool = Field(False, description="run trials that failed again")
    workers: int = Field(1, ge=1, description="processes that share the trials")
    launcher: Literal["local", "ray"] = Field("local", description="where the workers run")
    address: str | None = Field(None, description="ray: of the cluster; one on this machine if not given")

    @field_validator("test_data", "general", mode="before")
    @classmethod
    def _also_written_out(cls, value: object) -> object:
        """Return a path with the home folder and variables in full."""
        return written_out(value)

    def check(self) -> None:
        """Raise for keys that do not go together.

        Raises:
            SpectuneError: a key that a comparison sets itself, a task or metric that it does not know, two rules for
                the end of a run, or what `spectune train` would refuse.
        """
        for key, instead in _CHOSEN.items():
            if key in self.model_fields_set:
                raise SpectuneError(f"{key} is not a key of compare: {instead}")
        if isinstance(self.targets, dict):
            raise SpectuneError("targets: every method is compared on the same layers: give names, and no methods")
        known = self.of_task().measured()
        if not known:
            comparable = [name for name in task_names() if options_of(name).measures]
            raise SpectuneError(f"task: {self.task} cannot be compared; known: {', '.join(comparable)}")
        if self.metric is not None and self.metric not in known:
            raise SpectuneError(
                f"metric: {self.metric} does not fit task: {self.task}{nearest(self.metric, known)} "
                f"(known: {', '.join(known)})"
            )
        if self.until == "plateau" and self.equal == "time":
            raise SpectuneError("equal: time says how long a run is, and until: plateau lets its loss say: give one")
        if self.test_data is None and self.test + self.validation >= 1:
            raise SpectuneError(f"validation={self.validation} and test={self.test} leave nothing to train on")
        super().check()

    @property
    def measure(self) -> str:
        """The metric, given or the task's own."""
        return self.metric or self.of_task().measured()[0]

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.measure not in LESS

    @property
    def difference(self) -> float | None:
        """The difference to detect, in the metric's own unit."""
        return self.detect if self.detect is None or self.measure not in SHARES else self.detect / 100

    @property
    def searched_by(self) -> str:
        """The measure of validation data that learning rates are chosen by: the metric, but replies take too long."""
        return "loss" if self.measure == "exact_match" else self.measure

    def for_trial(self, method: str, lr: float | None, seed: int, steps: int, eval_steps: int) -> TrainConfig:
        """Return the configuration of one run."""
        keys = [*TrainConfig.model_fields, *options_of(self.task).model_fields]
        own: dict[str, Any] = {key: getattr(self, key) for key in keys if key not in _CHOSEN}
        own |= {"seed": seed, "max_steps": steps, "eval_steps": eval_steps, "lr": lr}
        if self.until == "plateau" and "schedule" not in self.model_fields_set:
            own["schedule"] = "constant"  # one that falls towards the last step would end where it is still high
        own |= {} if method in ("base", "full") else {"method": method}
        return TrainConfig(**own)

    def settings(self) -> dict[str, object]:
        """Return what the trials depend on, but for defaults; only equals can be compared."""
        fields = type(self).model_fields
        given = {k: v for k, v in self.model_dump().items() if v != fields[k].default}
        return {k: v for k, v in given.items() if k not in (*_EXTENT, *ONCE, *_CHOSEN)}


def digest(values: Mapping[str, object]) -> str:
    """Return a short name of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_folder(config: CompareConfig, records: str | None = None) -> None:
    """Raise if the output folder holds trials of other settings, or on other data.

    Args:
        config: the comparison.
        records: their digest, once they are read.

    Raises:
        SpectuneError: it does; what differs is named.
    """
    from spectune.adapters.destination import check_run_folder  # brings PyTorch, which help goes without

    path = Path(config.output) / "settings.json"
    check_run_folder(path.parent, [config.model], path.name, ("report.html", "report.json", "runs.csv"))
    if config.overwrite or not path.is_file():
        return
    try:
        before = read_json(path)
    except SpectuneError:
        before = {}
    before = before if isinstance(before, dict) else {}
    now = json.loads(json.dumps(config.settings()))
    was = before.pop(RECORDS, None)  # folders of earlier versions do not say
    keys = sorted({*before, *now})
    differing = [f"{k}: {before.get(k)!r}, not {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]
    if None not in (was, records) and was != records:
        differing.append("the data changed")
    if differing:
        raise SpectuneError(
            f"{config.output} holds trials of other settings ({'; '.join(differing[:3])}): give another output, or "
            "overwrite=true"
        )
