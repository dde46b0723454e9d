"""The spectrum of a checkpoint as an HTML page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from spectune.pages import html as page
from spectune.pages.html import Column
from spectune.pages.pictures import as_svg
from spectune.spectrum.document import measures_note
from spectune.spectrum.figures import (
    Bounds,
    Other,
    R,
    by_kind,
    common_limits,
    draw_distribution,
    draw_map,
    draw_shift,
    draw_spectra,
)
from spectune.spectrum.model import Compared, Document, KindRow, MatrixRow, Moved, MovedRow, Pair

_FIGURES = {
    "share": ("in range", ".1%"),
    "largest": ("largest", ".3g"),
    "median": ("median", ".3g"),
    "smallest": ("smallest", ".2g"),
    "stable_rank": ("stable rank", ".1f"),
    "effective_rank": ("effective rank", ".0f"),
    "rank_90": ("90%", ".0f"),
    "rank_95": ("95%", ".0f"),
    "rank_99": ("99%", ".0f"),
    "condition": ("condition", ",.0f"),
    "gap": ("largest gap", ".2f"),
    "gap_after": ("after", ".0f"),
    "sigma": ("sigma", ".3f"),
    "edge": ("edge", ".2f"),
    "outliers": ("outliers", ".0f"),
    "outlier_energy": ("their energy", ".0%"),
    "bulk_distance": ("bulk distance", ".3f"),
    "recommended_rank": ("rank", ".0f"),
}


def spectrum_page(document: Document, values: Mapping[str, np.ndarray], other: Other | None = None) -> str:
    """Return the page.

    Args:
        document: what `describe` returned, with "compare" and "adapter" where there are such.
        values: singular values by the matrix's name.
        other: the document and values of the model compared with.
    """
    sections = [
        ("Where the values lie", _distribution(document, values, other)),
        ("Spectra, kind by kind", _spectra(document, values)),
        ("Layer by layer", _maps(document)),
        ("By kind", _kinds(document.kinds)),
        *([("Beside " + document.compare.label, _compare(document.compare))] if document.compare is not None else []),
        *([("What the adapter moved", _adapter(document.adapter))] if document.adapter is not None else []),
        ("A rank for each layer", _ranks(document)),
        ("Every matrix", _matrices(document.matrices)),
        *([("Not measured", _skipped("tensor", document.skipped))] if document.skipped else []),
        ("How it was measured", _how(document)),
    ]
    first, *rest = document.answer
    lead = page.paragraphs([first]) + _tiles(document) + page.paragraphs(rest)
    if document.skipped:
        count = len(document.skipped)
        some = (
            "1 tensor could not be measured; it is"
            if count == 1
            else f"{count} tensors could not be measured; they are"
        )
        lead += page.paragraphs([f"{some} named below."])
    return page.page(f"Singular values of {document.label}", lead, sections)


def _tiles(document: Document) -> str:
    s, (low, high) = document.summary, document.range
    pairs = [
        (f"{s.share:.1%}", f"of values within {low:g} to {high:g}"),
        (f"{s.middle_99[0]:.2g} to {s.middle_99[1]:.3g}", "hold the middle 99%"),
        (f"{s.gaps - s.gaps_after_the_first} of {s.matrices}", "matrices with a big group apart"),
        (f"{s.matrices}", "matrices"),
    ]
    if s.fitted:
        pairs.insert(3, (f"{s.outliers:.1%}", "of values above the noise bulk"))
    return page.tiles(pairs)


def _distribution(document: Document, values: Mapping[str, np.ndarray], other: Other | None) -> str:
    height = 2.6 + 0.27 * len(document.kinds)
    svg = as_svg(lambda figure: draw_distribution(figure, document, values, other), (9, height), "d")
    alt = "Histogram of all singular values, and quantiles by kind. " + document.answer[0]
    return page.figures([(svg, alt, "")], wide=True)


def _spectra(document: Document, values: Mapping[str, np.ndarray]) -> str:
    low, high = document.range
    limits = common_limits(document, [values])
    pictures = []
    for i, rows in enumerate(by_kind(document)):

        def draw(figure: Figure, rows: Sequence[MatrixRow] = rows) -> None:
            axes = figure.subplots()
            draw_spectra(axes, rows, values, document.range, limits)
            axes.set(xlabel="rank")

        alt = f"Singular values of {len(rows)} {rows[0].kind} matrices against their rank"
        pictures.append((as_svg(draw, (3.6, 2.9), f"s{i}"), alt, ""))
    text = (
        "Each line is a matrix, from blue in the first layer to orange in the last. The dot is where the line leaves "
        f"the bulk that noise explains; the green band is {low:g} to {high:g}."
    )
    return page.paragraphs([text]) + page.figures(pictures)


def _maps(document: Document) -> str:
    rows = document.matrices
    maps = (
        ("m0", lambda r: r.share, "share of values in range", ".0%", (0, None)),
        ("m1", lambda r: r.effective_rank / r.count, "effective rank / full rank", ".2f", (None, 1)),
        ("m2", _outlier_share, "share of outliers", ".0%", (0, None)),
        ("m3", lambda r: np.log10(max(r.largest, 1e-6)), "log10 of the largest value", ".1f", (None, None)),
    )
    return page.figures(_map(rows, *arguments) for arguments in maps)


def _outlier_share(row: MatrixRow) -> float | None:
    return None if row.outliers is None else row.outliers / row.count


def _map(
    rows: Sequence[R], prefix: str, key: Callable[[R], float | None], title: str, form: str, bounds: Bounds
) -> tuple[str, str, str]:
    height = 1.3 + 0.24 * len({row.kind for row in rows})
    svg = as_svg(lambda figure: draw_map(figure, rows, key, title, form, bounds), (3.9, height), prefix)
    return svg, f"Heat map by layer and kind: {title}; the tables hold the numbers", ""


def _kinds(kinds: Sequence[KindRow]) -> str:
    columns = [
        Column("kind"),
        Column("matrices", ".0f"),
        Column("in range", ".1%", measures_note("share")),
        Column("0.5%", ".3g", "a two-hundredth of the values is smaller"),
        Column("median", ".3g"),
        Column("99.5%", ".3g", "a two-hundredth of the values is larger"),
        *(Column(_FIGURES[key][0], _FIGURES[key][1], measures_note(key)) for key in _MEDIANS),
    ]
    rows = [
        [k.kind, k.matrices, k.share, *(k.quantiles[i] for i in (0, 2, 4)), *(getattr(k, key) for key in _MEDIANS)]
        for k in kinds
    ]
    return page.table("Values pooled over layers; from the stable rank on, medians over matrices", columns, rows)


_MEDIANS = (
    "stable_rank",
    "effective_rank",
    "rank_90",
    "rank_95",
    "rank_99",
    "condition",
    "gap",
    "outliers",
    "outlier_energy",
    "bulk_distance",
)


def _matrices(rows: Sequence[MatrixRow]) -> str:
    groups: defaultdict[tuple[int | None, str], list[MatrixRow]] = defaultdict(list)
    for row in rows:
        groups[row.layer, row.kind].append(row)
    columns = [Column("kind"), Column("layer", ".0f"), Column("shape")]
    columns += [Column(label, form, measures_note(key)) for key, (label, form) in _FIGURES.items()]
    lines = []
    for (layer, kind), members in groups.items():
        shape = " x ".join(map(str, members[0].shape)) + (f" ({len(members)})" if len(members) > 1 else "")
        lines.append([kind, layer, shape, *(_median(members, key) for key in _FIGURES)])
    experts = "; experts as the median of their layer" if len(groups) < len(rows) else ""
    table = page.table(f"Press a heading to sort{experts}", columns, lines)
    return page.details(f"Show the {len(groups)} rows", table)


def _median(rows: Sequence[MatrixRow], key: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, key)) is not None]
    return float(np.median(known)) if known else None


def _compare(other: Compared) -> str:
    pairs = other.pairs
    html = page.paragraphs(other.answer)
    if not pairs:
        return html + page.paragraphs(["No matrix has the same layer, kind and shape in both."])
    groups: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.kind].append(pair)
    columns = [
        Column("kind"),
        Column("pairs", ".0f"),
        Column("in range here", ".1%"),
        Column("there", ".1%"),
        Column("effective rank here", ".0f"),
        Column("there", ".0f"),
        Column("distance", ".2%", "||S - S'|| / ||S||: the weights differ by at least that much"),
    ]
    rows = []
    for kind, members in groups.items():
        both = [np.mean([getattr(pair, key) for pair in members], axis=0) for key in ("share", "effective_rank")]
        rows.append([kind, len(members), *both[0], *both[1], np.median([pair.distance for pair in members])])
    text = "The distance ||S - S'|| / ||S|| is the least by which two matrices of these spectra can differ, relatively."
    return html + page.paragraphs([text]) + page.table("Pairs of the same layer, kind and shape", columns, rows)


def _adapter(adapter: Moved) -> str:
    rows, s = adapter.matrices, adapter.summary
    text = [
        f"{adapter.folder} changes {s.matrices} matrices, at the median by {s.relative_norm:.2%} of ||W||. "
        f"Among the first {adapter.top} left singular vectors of each changed matrix, {s.intruders} in "
        f"{s.matrices_with_intruders} matrices are new: no singular vector of W is within |cosine| "
        f"{adapter.epsilon:g} of them (intruder dimensions).",
    ]
    if s.chance is not None:
        text.append(
            f"The update's leading subspace overlaps W's top one by {s.top_overlap:.3f} and its bottom one by "
            f"{s.bottom_overlap:.3f}; a random one would by {s.chance:.3f} (medians)."
        )
    pictures = [
        _map(rows, "a0", lambda r: 100 * r.relative_norm, "size of the update, % of ||W||", ".2g", (0, None)),
        _map(rows, "a1", lambda r: r.intruders, "intruder dimensions", ".0f", (0, max(1, adapter.top))),
        _map(rows, "a2", _over_chance("top"), "overlap with the top / chance", ".1f", (0, None)),
        _map(rows, "a3", _over_chance("bottom"), "overlap with the bottom / chance", ".1f", (0, None)),
    ]
    shift = as_svg(lambda figure: draw_shift(figure, rows), (3.9, 2.7), "a4")
    pictures.append((shift, "Change of singular values by their place in the spectrum, a line a kind", ""))
    columns = [
        Column("kind"),
        Column("layer", ".0f"),
        Column("size", ".2%", "||dW|| / ||W||"),
        Column("update's rank", ".0f", "fewest of its singular values that hold 99% of its energy"),
        Column("intruders", ".0f"),
        Column("top overlap", ".3f"),
        Column("bottom overlap", ".3f"),
        Column("chance", ".3f"),
        Column("first tenth", "+.2%", "change of the largest tenth of the values"),
        Column("last tenth", "+.2%", "change of the smallest tenth"),
    ]
    keys = ("kind", "layer", "relative_norm", "update_rank", "intruders", "top_overlap", "bottom_overlap", "chance")
    lines = [[*(getattr(row, key) for key in keys), row.shift[0], row.shift[-1]] for row in rows]
    table = page.table("What moved; press a heading to sort", columns, lines)
    html = page.paragraphs(text) + page.figures(pictures) + page.details(f"Show the {len(rows)} rows", table)
    return html + (_skipped("layer", adapter.skipped) if adapter.skipped else "")


def _over_chance(end: str) -> Callable[[MovedRow], float | None]:
    return lambda row: getattr(row, f"{end}_overlap") / row.chance if row.chance else None


def _ranks(document: Document) -> str:
    advice = document.recommendation
    if not advice.ranks:
        return page.paragraphs(
            ["The measured matrices are parts of larger tensors, which take no adapter by themselves."]
        )
    columns = [Column("kind"), Column("least", ".0f"), Column("greatest", ".0f"), Column("median outliers", ".0f")]
    rows = [[k.kind, *k.ranks, k.outliers] for k in document.kinds]
    text = (
        f"The rank is {advice.rule}. Together they make a LoRA of {advice.lora_parameters:,} parameters, as many "
        f"as one rank of {advice.uniform_rank:.1f} everywhere: compare with that. A spectrum says what the "
        "pretrained weights hold, not what a task needs."
    )
    lost = advice.without_override
    if lost:
        text += f" {lost} of them are not layers under that name in the model that transformers makes: no override."
    html = page.paragraphs([text]) + page.table("Recommended ranks", columns, rows)
    command = advice.command
    return html + (page.code(command) if command else "")


def _skipped(what: str, skipped: Mapping[str, str]) -> str:
    columns = [Column(what), Column("why")]
    return page.table(f"{what.capitalize()}s left out", columns, [[name, why] for name, why in skipped.items()])


def _how(document: Document) -> str:
    return page.paragraphs(
        [
            "Singular values are the square roots of the eigenvalues of the smaller side's Gram matrix in float64, "
            "from weights raised to float32; embeddings and the output head are left out unless they are named.",
            "The bulk is a Marchenko-Pastur law fitted by its median, without what is above it; an outlier is above "
            "its edge by more than the largest value of one noise matrix in a hundred (Tracy-Widom). The bulk distance "
            "says how far what is left is from it: pure noise is below 0.025, and from 0.05 the edge is a convention.",
            "A gap is the largest ratio of neighbours in the upper half of a spectrum. Two groups would show as a "
            "large one after more than one value.",
            f"Format {document.format}, fingerprint {document.fingerprint[:16]}. Every value is in "
            "values-*.jsonl, every figure in spectrum.json.",
        ]
    )
