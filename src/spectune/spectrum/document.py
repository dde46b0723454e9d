"""The spectrum of a checkpoint as one document: of each matrix, each kind and the whole, in words and in numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spectune.spectrum.checkpoint import Checkpoint, Matrix
from spectune.spectrum.measures import Measures, measure, recommended_ranks
from spectune.spectrum.model import (
    Advice,
    Compared,
    Document,
    KindRow,
    MatrixRow,
    Moved,
    MovedRow,
    MovedSummary,
    Pair,
    Row,
    Summary,
    Window,
)

NOISE = 0.025  # a bulk's distance up to which it is called noise
GAP = 2.0  # a ratio of neighbours from which a "big" group is said to stand apart from a "small" one
RULE = (
    "in proportion to the number of singular values above the Marchenko-Pastur bulk (or, without a bulk, that hold 90% "
    "of the energy), {mean} on average, at least {low} and at most {high}"
)


class Spectra(NamedTuple):
    """A checkpoint and what was found in it.

    Args:
        checkpoint: the checkpoint.
        values: singular values by the matrix's name, descending.
        problems: why there are none, by name.
    """

    checkpoint: Checkpoint
    values: Mapping[str, np.ndarray]
    problems: Mapping[str, str]

    def measured(self) -> list[Matrix]:
        """Return the matrices that have values, by kind and layer."""
        known = [matrix for matrix in self.checkpoint.matrices if matrix.name in self.values]
        kinds = list(dict.fromkeys(matrix.place.kind for matrix in known))
        return sorted(known, key=lambda m: (kinds.index(m.place.kind), m.place.layer or 0, m.place.expert or 0))


def describe(
    spectra: Spectra, low: float = 0.1, high: float = 1.1, rank: int = 16, ranks: tuple[int, int] = (4, 64)
) -> Document:
    """Return the document.

    Args:
        spectra: what was measured.
        low: lower end of the range whose share is counted.
        high: upper end.
        rank: the mean of the ranks to recommend.
        ranks: the least and the greatest of them.
    """
    rows = []
    matrices = spectra.measured()
    found = [measure(spectra.values[matrix.name], matrix.shape, low, high) for matrix in matrices]
    advised = recommended_ranks(found, [matrix.shape for matrix in matrices], rank, *ranks)
    for matrix, measures, own_rank in zip(matrices, found, advised, strict=True):
        place = {key: value for key, value in matrix.place._asdict().items() if key != "stacked"}
        rows.append(
            MatrixRow(
                name=matrix.name,
                **place,
                shape=matrix.shape,
                dtype=matrix.dtype,
                **measures.model_dump(),
                recommended_rank=own_rank,
            )
        )
    checkpoint = spectra.checkpoint
    document = Document(
        model=checkpoint.model,
        label=Path(checkpoint.model).name if Path(checkpoint.model).exists() else checkpoint.model,
        format=checkpoint.format,
        fingerprint=checkpoint.fingerprint,
        range=(low, high),
        summary=_summary(rows, spectra.values, low, high),
        kinds=_kinds(rows, spectra.values),
        matrices=rows,
        skipped={**checkpoint.skipped, **spectra.problems},
        recommendation=_recommendation(spectra, rows, RULE.format(mean=rank, low=ranks[0], high=ranks[1])),
    )
    document.answer = _answer(document)
    return document


def _summary(rows: Sequence[MatrixRow], values: Mapping[str, np.ndarray], low: float, high: float) -> Summary:
    pooled = np.sort(np.concatenate([values[row.name] for row in rows]))
    bottom, median, top = np.quantile(pooled, [0.005, 0.5, 0.995])
    start, share = _best_window(pooled, high / low)
    fitted = [row for row in rows if row.outliers is not None]
    energy = [float((values[row.name] ** 2).sum()) for row in fitted]
    return Summary(
        matrices=len(rows),
        values=len(pooled),
        share=float(((low <= pooled) & (pooled <= high)).mean()),
        below=float((pooled < low).mean()),
        above=float((pooled > high).mean()),
        median=float(median),
        middle_99=(float(bottom), float(top)),
        best_window=Window(low=start, high=start * high / low, share=share),
        gaps=sum(row.gap >= GAP for row in rows),
        gaps_after_the_first=sum(row.gap >= GAP and row.gap_after == 1 for row in rows),
        fitted=len(fitted),
        outliers=sum(row.outliers or 0 for row in fitted) / max(1, sum(row.count for row in fitted)),
        outlier_energy=float(np.average([row.outlier_energy or 0.0 for row in fitted], weights=energy))
        if fitted
        else None,
        bulk_distance=_median(fitted, "bulk_distance"),
    )


def _best_window(ordered: np.ndarray, ratio: float) -> tuple[float, float]:
    """Return where a window [a, ratio a] holds most of the values, and their share."""
    positive = ordered[ordered > 0]
    if not len(positive):
        return 0.0, 0.0
    ends = np.searchsorted(positive, positive * ratio * (1 + 1e-12), side="right")
    counts = ends - np.arange(len(positive))
    best = int(counts.argmax())
    return float(positive[best]), float(counts[best] / len(ordered))


def _kinds(rows: Sequence[MatrixRow], values: Mapping[str, np.ndarray]) -> list[KindRow]:
    groups: defaultdict[str, list[MatrixRow]] = defaultdict(list)
    for row in rows:
        groups[row.kind].append(row)
    kinds = []
    for kind, members in groups.items():
        pooled = np.concatenate([values[row.name] for row in members])
        counts = [row.count for row in members]
        means = ("stable_rank", "effective_rank", "rank_90", "rank_95", "rank_99", "condition", "gap", "outliers")
        kinds.append(
            KindRow(
                kind=kind,
                matrices=len(members),
                values=len(pooled),
                share=float(np.average([row.share for row in members], weights=counts)),
                quantiles=tuple(np.quantile(pooled, [0.005, 0.25, 0.5, 0.75, 0.995]).tolist()),
                **{key: _median(members, key) for key in (*means, "outlier_energy", "bulk_distance")},
                ranks=(min(r.recommended_rank for r in members), max(r.recommended_rank for r in members)),
            )
        )
    return kinds


def _median(rows: Sequence[Row], key: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, key)) is not None]
    return float(np.median(known)) if known else None


def _recommendation(spectra: Spectra, rows: Sequence[MatrixRow], rule: str) -> Advice:
    layers = {m.name: m.shape for m in spectra.measured() if not m.place.stacked}
    chosen = {row.module: row.recommended_rank for row in rows if row.name in layers}
    parameters = sum(row.recommended_rank * sum(row.shape) for row in rows if row.name in layers)
    one = sum(sum(shape) for shape in layers.values())
    return Advice(rule=rule, ranks=chosen, lora_parameters=parameters, uniform_rank=parameters / one if one else None)


def _answer(document: Document) -> list[str]:
    """Return the article's question, answered for this checkpoint, in sentences."""
    s, (low, high) = document.summary, document.range
    there = " In Gemma-2 9B it was 99%, says the article that asked." if (low, high) == (0.1, 1.1) else ""
    window, (bottom, top) = s.best_window, s.middle_99
    sentences = [
        f"{s.share:.1%} of the {s.values:,} singular values of {document.label} lie between {low:g} and "
        f"{high:g}; {s.below:.1%} are smaller and {s.above:.1%} larger.{there}",
        f"The middle 99% span {bottom:.3g} to {top:.3g}, a factor of {top / bottom:,.0f}. "
        f"Wherever a range as wide in proportion is put (a factor of {high / low:.3g}), it holds at most "
        f"{window.share:.1%}: from {window.low:.3g} to {window.high:.3g}."
        if bottom > 0
        else f"The middle 99% reach from 0 to {top:.3g}.",
    ]
    gaps, first, count = s.gaps, s.gaps_after_the_first, s.matrices
    groups = gaps - first
    apart = (
        f"No matrix of {count} has" if not gaps else f"{gaps} of {count} matrices have"
    ) + f" two neighbours in the upper half of the spectrum that differ by a factor of {GAP:g}"
    which = "always" if groups == 0 else f"{first} of them only"
    where = f" ({which} between the first value and the second)" if first else ""
    verdict = (
        "so there is no big and small group here: any split cuts through a continuum."
        if groups == 0
        else "so a big group stands apart in those only."
    )
    sentences.append(f"{apart}{where}, {verdict}")
    if s.bulk_distance is not None:
        fit = (
            "of the shape of noise"
            if s.bulk_distance < NOISE
            else "whose shape is not quite that of noise, so its edge is a convention"
        )
        sentences.append(
            f"{s.outliers:.1%} of the values lie above a Marchenko-Pastur bulk and hold {s.outlier_energy:.0%} "
            f"of the energy. The rest is a bulk {fit} (median distance {s.bulk_distance:.3f})."
        )
    return sentences


def compared(document: Document, spectra: Spectra, other: Spectra, **options: Any) -> Compared:
    """Return another checkpoint's document and how far matching matrices are apart.

    By Mirsky's inequality ||S - S'|| <= ||W - W'||_F: the distance is the least by which the weights must differ.

    Args:
        document: of the first.
        spectra: the first.
        other: the second.
        options: for `describe`.
    """
    theirs = describe(other, **options)
    at = {(row.layer, row.kind, row.expert): row for row in theirs.matrices}
    pairs = []
    for row in document.matrices:
        match = at.get((row.layer, row.kind, row.expert))
        if match is None or match.shape != row.shape:
            continue
        S, T = spectra.values[row.name], other.values[match.name]
        norm = float(np.linalg.norm(S))
        pairs.append(
            Pair(
                name=row.name,
                other=match.name,
                kind=row.kind,
                layer=row.layer,
                distance=float(np.linalg.norm(S - T)) / norm if norm else 0.0,
                share=(row.share, match.share),
                effective_rank=(row.effective_rank, match.effective_rank),
            )
        )
    kept = ("model", "label", "summary", "kinds", "answer", "skipped")
    return Compared(**{key: getattr(theirs, key) for key in kept}, pairs=pairs)


def moved(spectra: Spectra, found: Mapping[str, Mapping[str, Any]], **about: Any) -> Moved:
    """Return what an adapter did, by matrix and in all.

    Args:
        spectra: its base.
        found: what `collect_movement` found.
        about: folder, top, epsilon and skipped, kept in the document.
    """
    rows = []
    for matrix in spectra.checkpoint.matrices:
        if matrix.name in found:
            entry = {key: value for key, value in found[matrix.name].items() if key != "after"}
            place = matrix.place
            rows.append(MovedRow(**entry, kind=place.kind, layer=place.layer, shape=matrix.shape))
    with_update = [row for row in rows if row.chance is not None]
    summary = MovedSummary(
        matrices=len(rows),
        relative_norm=float(np.median([row.relative_norm for row in rows])),
        intruders=sum(row.intruders for row in rows),
        matrices_with_intruders=sum(row.intruders > 0 for row in rows),
        **{key: _median(with_update, key) for key in ("update_rank", "top_overlap", "bottom_overlap", "chance")},
    )
    return Moved(**about, matrices=rows, summary=summary)


def measures_note(name: str) -> str:
    """Return what a figure means, from the docstring of `Measures`."""
    lines = (line.strip() for line in (Measures.__doc__ or "").splitlines())
    return next((line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")), "")
