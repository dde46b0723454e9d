"""The figures of a report."""

from spectune.compare.report.figures import COSTS, front
from spectune.compare.report.model import Document


def test_the_front_is_what_nothing_beats(written):
    rows = [row for row in Document(**written[0]).ran if row.trainable_parameters]
    for cost in COSTS:
        kept = front(rows, cost, True)
        for row in rows:
            beaten = any(
                cost.of(r) <= cost.of(row) and r.value.mean >= row.value.mean and r is not row
                and (cost.of(r), r.value.mean) != (cost.of(row), row.value.mean) for r in rows
            )  # fmt: skip
            assert (row in kept) == (not beaten)
