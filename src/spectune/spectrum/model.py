"""The document of a spectrum: what spectrum.json holds, typed."""

from __future__ import annotations

from pydantic import BaseModel

from spectune.spectrum.measures import Measures


class Row(BaseModel):
    """A matrix and where it stands: its kind, and its layer, None outside the blocks."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]


class MatrixRow(Row, Measures):
    """A matrix and its figures."""

    module: str
    expert: int | None
    dtype: str
    recommended_rank: int


class KindRow(BaseModel):
    """What the matrices of one kind have in common.

    Args:
        matrices, values: how many.
        share: of the values within the range.
        quantiles: of the values: 0.5%, 25%, 50%, 75% and 99.5%.
        stable_rank, ..., bulk_distance: medians over the matrices that have one.
        ranks: the least and the greatest that are recommended.
    """

    kind: str
    matrices: int
    values: int
    share: float
    quantiles: tuple[float, float, float, float, float]
    stable_rank: float | None
    effective_rank: float | None
    rank_90: float | None
    rank_95: float | None
    rank_99: float | None
    condition: float | None
    gap: float | None
    outliers: float | None
    outlier_energy: float | None
    bulk_distance: float | None
    ranks: tuple[int, int]


class Window(BaseModel):
    """A range of values, and the share of all that lies in it."""

    low: float
    high: float
    share: float


class Summary(BaseModel):
    """What all matrices come to.

    Args:
        share, below, above: of the values within the range, under and over it.
        middle_99: between which 99% of the values lie.
        best_window: where a range as wide in proportion holds most of them.
        gaps, gaps_after_the_first: matrices with a gap, and those where it follows the first value.
        fitted: matrices with a bulk; what follows is of these.
    """

    matrices: int
    values: int
    share: float
    below: float
    above: float
    median: float
    middle_99: tuple[float, float]
    best_window: Window
    gaps: int
    gaps_after_the_first: int
    fitted: int
    outliers: float
    outlier_energy: float | None
    bulk_distance: float | None


class Advice(BaseModel):
    """A rank for each layer.

    Args:
        rule: in words.
        ranks: by layer.
        lora_parameters: of a LoRA with these ranks.
        uniform_rank: the one rank with as many.
        without_override: layers that the model has under another name.
        command: trains with the ranks, where there is a file of them.
    """

    rule: str
    ranks: dict[str, int]
    lora_parameters: int
    uniform_rank: float | None
    without_override: int = 0
    command: str | None = None


class Pair(BaseModel):
    """Two matrices of the same place and shape: ||S - S'|| / ||S||, and figures of the one and the other."""

    name: str
    other: str
    kind: str
    layer: int | None
    distance: float
    share: tuple[float, float]
    effective_rank: tuple[float, float]


class Compared(BaseModel):
    """Another checkpoint, and its matrices beside those of the document."""

    model: str
    label: str
    summary: Summary
    kinds: list[KindRow]
    answer: list[str]
    skipped: dict[str, str]
    pairs: list[Pair]


class MovedRow(Row):
    """What an adapter did to one matrix, which `Movement` explains."""

    relative_norm: float
    update_rank: int
    shift: list[float]
    intruders: int
    intruder_places: list[int]
    top_overlap: float | None
    bottom_overlap: float | None
    chance: float | None
    overlap_rank: int


class MovedSummary(BaseModel):
    """Medians over the changed matrices, and the new directions in all of them."""

    matrices: int
    relative_norm: float
    intruders: int
    matrices_with_intruders: int
    update_rank: float | None
    top_overlap: float | None
    bottom_overlap: float | None
    chance: float | None


class Moved(BaseModel):
    """What an adapter did to its base: its folder, how it was looked for, and the layers that could not be measured."""

    folder: str
    skipped: dict[str, str]
    top: int
    epsilon: float
    matrices: list[MovedRow]
    summary: MovedSummary


class Document(BaseModel):
    """What was measured, and what that says in words.

    Args:
        range: whose share of the values is counted.
        skipped: why tensors were not measured.
        answer: sentences.
        compare, adapter: where such are asked for.
        files: that were written, by what they are.
    """

    model: str
    label: str
    format: str
    fingerprint: str
    range: tuple[float, float]
    summary: Summary
    kinds: list[KindRow]
    matrices: list[MatrixRow]
    skipped: dict[str, str]
    recommendation: Advice
    answer: list[str] = []
    compare: Compared | None = None
    adapter: Moved | None = None
    files: dict[str, str] = {}
