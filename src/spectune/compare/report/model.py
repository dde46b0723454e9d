"""The document of a comparison: what report.json holds, typed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """A mean, and the ends of its 95% interval, None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def holds(self, value: float) -> bool:
        """Whether there is an interval, and a value lies in it."""
        return self.ends is not None and self.ends[0] <= value <= self.ends[1]


class Mean(Estimate):
    """A mean over seeds, and the values; its interval is over seeds alone, or over seeds and records both."""

    values: list[float]
    over: Literal["seeds", "both"] = "seeds"


class Paired(Estimate):
    """A mean of paired differences, and its two-sided p-value, None where there is none."""

    p: float | None = None


class Difference(Paired):
    """A difference between two methods.

    Args:
        over: what it is judged over; both is seeds and records together.
        seeds: at which both ran.
        corrected_p: p by Holm's procedure over all methods.
        beyond_chance: whether that is below 0.05.
    """

    over: Literal["seeds", "records", "both"]
    seeds: int
    corrected_p: float | None = None
    beyond_chance: bool | None = None


class SearchPoint(BaseModel):
    """A learning rate that was tried, and what it came to on validation data."""

    lr: float | None
    seed: int | None = None
    steps: int | None
    pruned: bool | None
    error: str | None
    value: float | None


class Sensitivity(BaseModel):
    """How wide the range of good learning rates is: octaves within 1 point of the best, or more where it is open."""

    octaves: float
    open: bool


class MethodRow(BaseModel):
    """What a method came to: numbers over its runs, its search, and how it differs from others.

    Args:
        method, label: as it was given, and for people.
        seeds: of the runs that count; none where each failed, and `ran` is False.
        metric, loss, gap, forgetting: means with intervals.
        trainable_parameters, adapter_bytes, setup_seconds, step_seconds, peak_bytes, tokens_per_second: medians.
        step_over_floor: a step over the frozen model's forward and gradient to its input.
        curves: held-out measure -> (step, mean) pairs.
        search, edge: the learning rates, and at which end of them the chosen one lies, if at one.
        sensitivity: of the metric to the learning rate, where two rates ran or more.
        fell_apart: seeds at which it ended further below its best seed than half of what the best method learns;
            where there are any, its mean is of two kinds of runs, and counts for no verdict.
        difference, over_records: from the baseline, over seeds and records, and over records alone.
        to_best: from the best.
    """

    method: str
    label: str
    seeds: list[int]
    ran: bool
    lr: float | None
    steps: int | None
    metric: Mean | None
    loss: Mean | None
    gap: Mean | None
    forgetting: Mean | None
    trainable_parameters: int | float | None
    adapter_bytes: int | float | None
    setup_seconds: float | None
    step_seconds: float | None
    peak_bytes: float | None
    tokens_per_second: float | None
    step_over_floor: float | None
    curves: dict[str, list[list[int | float]]]
    search: list[SearchPoint]
    edge: Literal["lowest", "highest"] | None
    cost_seconds: float
    sensitivity: Sensitivity | None = None
    fell_apart: list[int] = []
    difference: Difference | None = None
    over_records: Paired | None = None
    to_best: Difference | None = None
    train_command: str | None = None

    @property
    def value(self) -> Mean:
        """The metric of a method that ran."""
        assert self.metric is not None
        return self.metric

    @property
    def parameters(self) -> float:
        """The trained parameters; none where they are not known."""
        return self.trainable_parameters or 0.0


class Failure(BaseModel):
    """A run without a result, and why."""

    kind: str
    method: str
    lr: float | None
    seed: int | None
    error: str


class Trial(BaseModel):
    """What one run came to, and what it cost; which test records were answered right as ones and zeros, in order."""

    kind: str
    method: str
    lr: float | None = None
    seed: int | None = None
    steps: int | None = None
    pruned: bool | None = None
    error: str | None = None
    validation: float | None = None
    test: float | None = None
    right: str | None = None
    seconds: float


class Document(BaseModel):
    """What was compared, on what and how, what each method came to, and in words what that says.

    Args:
        answer: sentences, of which the first is the verdict.
        best, recommended: the best mean; and the best that is ahead of the baseline, or else the cheapest within the
            best one's interval.
        train_command: of the recommended.
        tested: differences that the p-values are corrected for.
        start: the metric before any step, on validation data.
        uncounted: why the task tells methods apart as little as it does, where it is so: floor (nothing was learned to
            speak of) or ceiling (all there is).
        gap_of, searched_by, forgetting_of: the measures behind gap, search and forgetting.
    """

    model_config = ConfigDict(extra="allow")  # a header may say more than is read here

    format: int = 1
    label: str = ""
    model: str = ""
    data: str = ""
    task: str = ""
    metric: str
    greater_is_better: bool
    baseline: str | None = None
    seeds: list[int] = []
    steps: int | None = None
    until: Literal["steps", "plateau"] = "steps"
    equal: Literal["steps", "time"] = "steps"
    batch_size: int | None = None
    split: dict[str, int] = {}
    budget: str | None = None
    general: str | None = None
    versions: dict[str, object] = {}
    date: str = ""
    machine: dict[str, object] = {}
    config: str = ""
    command: str = ""
    notes: list[str] = []
    percent: bool
    gap_of: str
    searched_by: str
    forgetting_of: str | None
    methods: list[MethodRow]
    failures: list[Failure]
    trials: list[Trial]
    seconds: float
    baseline_ran: bool = False
    tested: int = 0
    start: float | None = None
    uncounted: Literal["floor", "ceiling"] | None = None
    best: str | None = None
    recommended: str | None = None
    train_command: str | None = None
    answer: list[str] = []

    @property
    def ran(self) -> list[MethodRow]:
        """The methods that ran, the best first."""
        return [row for row in self.methods if row.ran]
