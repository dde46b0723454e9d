"""Results sorted by method, and each method's numbers over its runs, by hand."""

import math

import numpy as np
import pytest

from spectune.compare.report.outcomes import Outcomes, at, failure, right_of, seconds_of, table_of


def run(method="lora", seed=0, accuracy=0.5, **more):
    """Return a run that counts, of four records."""
    found = {"kind": "final", "method": method, "seed": seed, "lr": 1e-3, "steps": 10, "seconds": 2.0}
    return {**found, "test": {"accuracy": accuracy, "loss": 1 - accuracy}, **more}


def tried(lr, accuracy, method="lora", **more):
    """Return a run of the search."""
    found = {"kind": "search", "method": method, "seed": 9, "lr": lr, "steps": 10, "seconds": 1.0, "pruned": False}
    return {**found, "validation": {"accuracy": accuracy, "loss": 1 - accuracy}, **more}


def outcomes(finals, searches=(), metric="accuracy", greater=True):
    return Outcomes(metric, greater, finals, searches)


def test_the_best_comes_first_and_what_did_not_run_last():
    finals = [run("svf", 0, 0.4), run("lora", 0, 0.6), run("vera", error="it diverged"), run("pissa", 0, 0.5)]
    assert [row.method for row in outcomes(finals).rows()] == ["lora", "pissa", "svf", "vera"]
    assert [row.ran for row in outcomes(finals).rows()] == [True, True, True, False]
    by_loss = outcomes(finals, metric="loss", greater=False).rows()
    assert [row.method for row in by_loss] == ["lora", "pissa", "svf", "vera"]
    assert by_loss[0].value.mean == pytest.approx(0.4)


def test_numbers_over_runs_are_means_and_medians_of_those_that_have_them():
    finals = [
        run(seed=2, accuracy=0.7, step_seconds=0.3, floor_seconds=0.1, peak_bytes=30),
        run(seed=0, accuracy=0.5, step_seconds=0.2, floor_seconds=0.1, peak_bytes=10),
        run(seed=1, accuracy=0.6, step_seconds=0.9, peak_bytes=20, train={"accuracy": 0.9}),
    ]
    (row,) = outcomes(finals).rows()
    assert row.seeds == [0, 1, 2]
    assert row.value.values == [0.5, 0.6, 0.7]
    assert row.value.mean == pytest.approx(0.6)
    half = 4.302652729749464 * 0.1 / math.sqrt(3)  # of Student's t with two degrees of freedom
    assert row.value.ends == pytest.approx((0.6 - half, 0.6 + half))
    assert (row.step_seconds, row.peak_bytes, row.tokens_per_second) == (0.3, 20, None)
    assert row.step_over_floor == pytest.approx(2.5)  # of 3 and 2
    assert row.cost_seconds == 6.0
    assert row.gap is None  # in loss, since two have no accuracy in training, and none has that


def test_a_measure_of_general_text_that_was_not_finite_is_left_out():
    finals = [
        run(seed=0, general={"name": "loss", "before": 2.0, "after": 2.5}),
        run(seed=1, general={"name": "loss", "before": 2.0, "after": math.inf}),
        run(seed=2, general=None),
    ]
    (row,) = outcomes(finals).rows()
    assert row.forgetting.values == [0.5]
    assert row.seeds == [0, 1, 2]


def test_curves_are_over_the_steps_at_which_every_run_was_measured():
    def history(*lines):
        return [{"step": step, "eval_loss": loss} for step, loss in lines]

    finals = [
        run(seed=0, history=[*history((0, 4.0), (5, 3.0), (10, 1.0)), {"step": 7, "loss": 2.0}]),
        run(seed=1, history=history((0, 2.0), (10, 2.0), (12, 0.5))),
    ]
    (row,) = outcomes(finals).rows()
    assert row.curves == {"eval_loss": [[0, 3.0], [10, 1.5]]}
    assert outcomes(finals, metric="loss").start([row]) == 3.0


def test_without_a_measure_before_the_first_step_the_start_is_the_untrained_models():
    rows = outcomes([run("lora", 0, 0.6), run("base", 0, 0.25, trainable_parameters=0)]).rows()
    assert outcomes([run()]).start(rows) == 0.25
    assert outcomes([run()]).start(rows[:1]) is None


def test_where_some_lack_the_metric_the_loss_is_what_they_are_searched_by():
    searches = [tried(1e-3, 0.5), tried(1e-2, 0.6)]
    assert outcomes([run()], searches).searched_by == "accuracy"
    replies = [*searches, {**tried(1e-1, 0.7), "validation": {"loss": 0.3}}]
    assert outcomes([run()], replies).searched_by == "loss"
    failed = {**tried(1e-1, 0.7), "validation": None, "error": "it diverged"}
    assert outcomes([run()], [*searches, failed]).searched_by == "accuracy"
    assert Outcomes("accuracy", True, [run()], searches, "macro_f1").searched_by == "macro_f1"


def test_runs_that_say_where_to_begin_cost_and_are_no_tries():
    found = outcomes([run()], [{**tried(1e-4, 0.3), "kind": "start"}, tried(1e-3, 0.5), tried(1e-2, 0.4)])
    (row,) = found.rows()
    assert [point.lr for point in row.search] == [1e-3, 1e-2]
    assert row.cost_seconds == 2.0 + 3 * 1.0
    assert len(found.all) == 4


@pytest.mark.parametrize(
    ("rates", "edge"),
    [([1e-3, 1e-2], "lowest"), ([1e-4, 1e-3], "highest"), ([1e-4, 1e-3, 1e-2], None), ([1e-3], None)],
)
def test_the_edge_of_the_rates(rates, edge):
    twice = [{**tried(lr, 0.5), "seed": seed} for lr in rates for seed in (9, 10)]
    for searches in ([tried(lr, 0.5) for lr in rates], twice):
        (row,) = outcomes([run()], searches).rows()
        assert row.edge == edge


def test_rates_that_failed_are_listed_and_have_no_part_in_the_width():
    searches = [tried(1e-2, 0.1, pruned=True), tried(2e-3, 0.795), tried(1e-3, 0.8), tried(1.0, 0.9, error="diverged")]
    (row,) = outcomes([run()], searches).rows()
    assert [(point.lr, point.error) for point in row.search] == [
        (1e-3, None), (2e-3, None), (1e-2, None), (1.0, "diverged"),
    ]  # fmt: skip
    assert row.sensitivity.octaves == pytest.approx(1.0)
    assert row.sensitivity.open


def test_answers_of_single_records_are_used_where_the_metric_is_their_share():
    right = [1, 1, 0, 1]
    assert right_of(run(accuracy=0.75, right=right), "accuracy") == right
    assert right_of(run(accuracy=0.7, right=right), "accuracy") is None  # it is another measure
    assert right_of(run(accuracy=0.75, right=[]), "accuracy") is None
    assert right_of(run(accuracy=0.75, right=right, test=None), "accuracy") is None
    runs = [run(seed=1, accuracy=0.5, right=[0, 1, 0, 1]), run(seed=0, accuracy=0.75, right=right)]
    assert table_of(runs, "accuracy") == [right, [0, 1, 0, 1]]
    assert table_of([*runs, run(seed=2)], "accuracy") is None  # whose records are not known
    assert table_of([*runs, run(seed=2, accuracy=1.0, right=[1])], "accuracy") is None
    assert table_of([], "accuracy") is None
    (row,) = outcomes(runs).rows()
    assert (row.value.over, row.value.mean) == ("both", 0.625)
    assert outcomes([*runs, run(seed=2)]).rows()[0].value.over == "seeds"


def test_why_a_run_does_not_count():
    assert failure(run(), "accuracy") is None
    assert failure(run(error="it diverged"), "accuracy") == "it diverged"
    assert failure(run(), "macro_f1") == "it has no finite macro_f1 on the test"
    assert failure(tried(1e-3, 0.5), "accuracy") is None  # which has no test
    assert outcomes([run(accuracy=math.nan)]).sound == {}


def test_seeds_that_fell_apart_are_noted():
    finals = [run("lora", seed, value) for seed, value in enumerate((0.9, 0.9, 0.3))] + [run("svf", 0, 0.8)]
    found = outcomes(finals)
    rows = found.rows()
    found.mark_fallen(rows, 0.2)
    assert {row.method: row.fell_apart for row in rows} == {"svf": [], "lora": [2]}


def test_what_a_run_took():
    assert seconds_of(run(seconds=5.0, setup_seconds=1.0, train_seconds=2.0)) == 5.0
    assert seconds_of(run(seconds=None, setup_seconds=1.0, train_seconds=2.0)) == 3.0
    assert seconds_of({"kind": "final"}) == 0.0
    assert at(run(test=None), "test", "loss") is None


@pytest.mark.parametrize(
    ("methods", "labels"),
    [
        (["full", "lora_xs", "svf", "dora:inner=pissa"], ["full fine-tuning", "LoRA-XS", "SVF", "DoRA pissa"]),
        (["lora:rank=4", "lora:rank=4,alpha=8"], ["LoRA rank=4", "LoRA rank=4 alpha=8"]),
        (["svft:width=8", "svft:pattern=8", "somebodys"], ["svft:width=8", "svft:pattern=8", "somebodys"]),
    ],
)
def test_labels_for_people(methods, labels):
    finals = [run(method, accuracy=value) for method, value in zip(methods, np.linspace(0.9, 0.1, 4), strict=False)]
    assert [row.label for row in outcomes(finals).rows()] == labels
