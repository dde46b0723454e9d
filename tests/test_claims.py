"""The verdicts on the article's claims, from reports made up for it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(STUDY))
    try:
        import claims as module
    finally:
        sys.path.remove(str(STUDY))
    return module


def measured(values):
    return {"values": values, "mean": sum(values) / len(values)}


def report(percent=True, greater=True, gap_of="accuracy", **methods):
    rows = [
        {"method": name, "ran": True, "seeds": seeds, "metric": measured(values), "gap": measured(gaps)}
        | {"trainable_parameters": count, "difference": None}
        for name, (seeds, values, gaps, count) in methods.items()
    ]
    about = {"model": "tiny", "metric": "accuracy", "trials": [], "split": {"test": 250}}
    return {"methods": rows, "percent": percent, "greater_is_better": greater, "gap_of": gap_of, **about}


def of(values, gaps=(0.0, 0.0, 0.0), count=100, seeds=(0, 1, 2)):
    return list(seeds), list(values), list(gaps), count


def test_a_difference_beyond_chance_decides(claims):
    sure = report(a=of([0.9, 0.91, 0.93]), b=of([0.5, 0.51, 0.52]))
    assert claims.versus({"task": sure}, "a", "b") == ("supported", "task +40 points (+39 to +42)*")
    assert claims.versus({"task": sure}, "b", "a")[0] == "refuted"
    loss = report(percent=False, greater=False, a=of([0.9, 0.91, 0.93]), b=of([0.5, 0.51, 0.52]))
    assert claims.versus({"task": loss}, "a", "b")[0] == "refuted"
    both = {"one": sure, "two": report(a=of([0.1, 0.11, 0.13]), b=of([0.5, 0.51, 0.52]))}
    assert claims.versus(both, "a", "b")[0] == "undecided"
    assert claims.versus({"task": report(a=of([0.9, 0.1, 0.5]), b=of([0.5, 0.5, 0.4]))}, "a", "b")[0] == "undecided"


def test_runs_are_paired_by_seed(claims):
    found = report(a=of([0.9, 0.5], seeds=(2, 0), gaps=(0.0, 0.0)), b=of([0.4, 0.7, 0.8]))
    _, said = claims.versus({"task": found}, "a", "b")
    assert said.startswith("task +10 points")  # 0.9 - 0.8 and 0.5 - 0.4
    assert claims.versus({"task": report(a=of([0.9], [0.0], seeds=(5,)), b=of([0.4, 0.7, 0.8]))}, "a", "b")[1] == ""


def test_who_overfits_is_a_matter_of_the_gap(claims):
    more, less = of([0.5] * 3, [0.30, 0.31, 0.33]), of([0.5] * 3, [0.10, 0.11, 0.12])
    assert claims.versus({"task": report(a=more, b=less)}, "a", "b", "gap")[0] == "supported"
    losses = report(gap_of="loss", a=less, b=more)  # the loss on training data is the lower, the more
    assert claims.versus({"task": losses}, "a", "b", "gap")[0] == "supported"
    assert "points" not in claims.versus({"task": losses}, "a", "b", "gap")[1]


def test_no_worse_is_equivalence_with_a_margin(claims):
    near = report(a=of([0.849, 0.851, 0.853]), b=of([0.850, 0.852, 0.853]))
    assert claims.no_worse({"task": near}, "a", "b")[0] == "supported"
    wide = report(a=of([0.80, 0.88, 0.85]), b=of([0.85, 0.852, 0.853]))
    assert claims.no_worse({"task": wide}, "a", "b")[0] == "undecided"  # what is not seen is not shown to be absent
    far = report(a=of([0.79, 0.791, 0.793]), b=of([0.85, 0.852, 0.853]))
    assert claims.no_worse({"one": near, "two": far}, "a", "b")[0] == "refuted"
    assert claims.no_worse({}, "a", "b") == ("undecided", "")


def test_a_task_that_cannot_tell_and_a_method_that_fell_apart_do_not_count(claims):
    sure = report(a=of([0.9, 0.91, 0.93]), b=of([0.5, 0.51, 0.52]))
    assert claims.versus({"task": {**sure, "start": 0.2}}, "a", "b")[0] == "supported"
    ends = {"mean": 0.4, "low": 0.1, "high": 0.7}
    for row in sure["methods"]:
        row["difference"] = ends  # what could have been told is 30 points
    assert claims.versus({"task": {**sure, "start": 0.85}}, "a", "b")[1].startswith("task not counted: floor, ")
    assert claims.versus({"task": {**sure, "start": 0.2}}, "a", "b")[1].startswith("task not counted: ceiling, ")
    fell = report(a=of([0.9, 0.91, 0.3]), b=of([0.5, 0.51, 0.52]))
    verdict, said = claims.versus({"task": {**fell, "start": 0.2}}, "a", "b")
    assert (verdict, said[:33]) == ("undecided", "task not counted: a fell apart, +")


def test_records_make_intervals_wider(claims):
    rng = np.random.default_rng(0)
    found = report(a=of([0.9, 0.91, 0.9]), b=of([0.7, 0.715, 0.7]))
    narrow = claims.difference(found, "a", "b", "metric")
    for name, share in {"a": 0.9, "b": 0.7}.items():
        bits = "".join(map(str, (rng.random(60) < share).astype(int)))  # the same records at every seed
        found["trials"] += [{"kind": "final", "method": name, "seed": seed, "right": bits} for seed in range(3)]
    wide = claims.difference(found, "a", "b", "metric")
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_how_many_times_fewer(claims):
    found = {"task": report(a=of([0.5] * 3, count=100), b=of([0.5] * 3, count=700))}
    assert claims.fewer(found, "a", "b", 10) == ("supported", "7x on tiny, at rank 16")
    assert claims.fewer(found, "b", "a", 10)[0] == "refuted"
    assert claims.fewer(found, "a", "c", 10) == ("undecided", "not run")


def test_every_claim_has_one_of_three_verdicts(claims):
    for _, verdict, numbers in claims.claims(claims.reports()):
        assert verdict in ("supported", "refuted", "undecided")
        assert numbers


def test_a_task_without_a_report_counts_by_its_grid(claims, tmp_path, monkeypatch):
    keys = {"model": "tiny", "task": "classify", "test": 0.25, "max_steps": 4, "batch_size": 2}
    plan = claims.Plan("made", keys, (), range(2), 3)
    found = {  # by method and place: what the fold says of each seed, and the test
        ("lora:rank=16", 0): ([0.5, 0.6, 0.7], [0.61, 0.62, 0.63]),
        ("lora:rank=16", 1): ([0.6, 0.7, 0.8], [0.71, 0.72, 0.73]),
        ("dora:rank=16", 0): ([0.9, 0.8, 0.9], [0.81, 0.83, 0.82]),  # the fold chooses, whatever the test says
        ("dora:rank=16", 1): ([0.1, 0.1, 0.2], [0.91, 0.92, 0.93]),
    }
    rows = [
        {"method": method, "place": place, "lr": 10.0**place, "seed": seed, "error": None}
        | {"looks": [[0, 0.2, None], [4, fold, None]], "losses": [1.0, 0.5], "test": {"accuracy": test}}
        for (method, place), (folds, tests) in found.items()
        for seed, (fold, test) in enumerate(zip(folds, tests, strict=True))
    ]
    (tmp_path / "made.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(claims, "GRID", tmp_path)
    monkeypatch.setattr(claims, "PLANS", {"made": plan, "left": plan})
    monkeypatch.setattr(claims, "taken", lambda: ["made"])
    report = claims.grids([])["made"]
    best, second = report["methods"]
    assert (best["method"], best["lr"], best["metric"]["mean"]) == ("dora", 1.0, pytest.approx(0.82))
    assert (second["method"], second["lr"], second["metric"]["values"]) == ("lora:rank=16", 10.0, [0.71, 0.72, 0.73])
    assert best["difference"]["mean"] == pytest.approx(0.10)
    assert (report["start"], report["split"]["test"], claims.why_not(report)) == (0.2, 250, None)
    assert claims.versus({"made": report}, "dora", "lora:rank=16")[0] == "supported"
    assert claims.grids(["made"]) == {}


def test_a_task_whose_runs_end_by_their_loss_has_a_line(claims):
    row = {"label": "LoRA", "ran": True, "metric": {"mean": 0.891}}
    found = {"methods": [row, {"label": "SVF", "ran": False}], "percent": True, "config": "until: plateau\nseeds: 5\n"}
    assert claims.ended({"one": {**found, "config": "seeds: 5\n"}}) == ""
    assert claims.ended({"one": found}) == "\n- Where runs end when their loss stops falling (one): LoRA 89.1%."
