"""The trials of a comparison: their order, their results, and what a kill leaves; nothing trains here."""

import json
from collections import Counter
from pathlib import Path

import pytest

from compare.fake_bench import FakeBench, good_at
from spectune import SpectuneError
from spectune.compare.candidates import rate
from spectune.compare.config import CompareConfig, check_folder, digest
from spectune.compare.study import Study, beforehand, work
from spectune.compare.trial import Results


def config(output, **values):
    made = CompareConfig(**{"model": "m", "data": "d", "task": "classify", "output": str(output), **values})
    made.check()
    return made


def worked(chosen, methods, bench):
    """Return the study of a comparison that ran to its end."""
    work(chosen, methods, "s", bench)
    study = Study(chosen, methods, Results(Path(chosen.output) / "trials", "s"))
    assert study.pending() == []
    return study


def test_a_study_ends_at_the_best_rate_and_nothing_runs_twice(tmp_path):
    chosen = config(tmp_path, seeds=2, lrs=3)
    methods = ["base", "lora", "svf"]
    bench = FakeBench(good_at(0.01))
    study = worked(chosen, methods, bench)
    assert len(bench.ran) == len(set(bench.ran))
    assert sum(trial.kind == "final" for trial in bench.ran) == 6
    for method in ("lora", "svf"):
        assert study.best_rate(method) == pytest.approx(0.01, rel=0.25)
        assert {trial.lr for trial, _ in study.finals(method)} == {study.best_rate(method)}
        assert {trial.seed for trial, _ in study.searches(method)}.isdisjoint({0, 1})
        rates = Counter(trial.lr for trial, _ in study.searches(method))
        assert min(rates) < study.best_rate(method) < max(rates)
        assert rates[study.best_rate(method)] == max(rates.values()) >= 2
        assert sum(rates.values()) <= 12
    assert study.searches("base") == []
    before = len(bench.ran)
    work(chosen, methods, "s", bench)
    assert len(bench.ran) == before
    assert study.count() == (before, before)


def test_the_trials_are_the_same_in_whatever_order_they_end(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    orders = [lambda pending: pending[0], lambda pending: pending[-1]]
    names = []
    for folder, choose in zip(folders, orders, strict=True):
        bench = FakeBench(good_at(3e-3))
        study = Study(config(folder, lrs=3), ["lora", "svf"], Results(folder, "s"))
        while pending := study.pending():
            trial = choose(pending)
            study.results.put(trial, bench.run(trial, study.stops(trial)))
        names.append(sorted(path.name for path in folder.glob("*.json")))
    assert names[0] == names[1]


def test_one_rate_is_the_methods_own_and_is_not_searched(tmp_path):
    study = worked(config(tmp_path, seeds=1, lrs=1), ["lora"], bench := FakeBench(good_at(1.0)))
    assert [(trial.lr, trial.kind) for trial in bench.ran] == [(1e-3, "final")]
    assert study.searches("lora") == []


class Measures(FakeBench):
    """A bench that measures a rate, and cannot for SVF."""

    def run(self, trial, report=lambda looks: False):
        if trial.kind != "start":
            return super().run(trial, report)
        if trial.method == "svf":
            raise SpectuneError("no learning rate lowers the loss")
        self.ran.append(trial)
        return {"start": 0.03, "reason": "", "steps": 24, "seconds": 1.0, "pruned": False, "history": [], "error": None}


def test_a_search_begins_at_a_rate_that_is_measured(tmp_path):
    methods = ["lora", "svf", "full", "base"]
    bench = Measures(good_at(0.03))
    study = worked(config(tmp_path, seeds=1, start="auto"), methods, bench)
    kinds = [trial.kind for trial in bench.ran if trial.method == "lora"]
    assert kinds.count("start") == 1
    assert kinds[0] == "start"
    first = study.searches("lora")[0][0]
    assert first.lr == study.best_rate("lora") == 0.03
    assert study.searches("svf")[0][0].lr == 0.02  # its own, since none was to be had
    assert study.searches("full")[0][0].lr == 5e-5
    assert not any(trial.kind == "start" for trial in bench.ran if trial.method in ("full", "base"))
    assert study.count() == (len(bench.ran) + 1, len(bench.ran) + 1)  # and the one that failed
    apart = worked(config(tmp_path / "own", seeds=1), ["lora"], own := FakeBench(good_at(0.03)))
    assert apart.best_rate("lora") == pytest.approx(0.03, rel=0.25)
    assert len(own.ran) > sum(trial.kind != "start" for trial in bench.ran if trial.method == "lora")


def test_one_rate_may_be_the_one_that_is_measured(tmp_path):
    worked(config(tmp_path, seeds=2, lrs=1, start="auto"), ["lora"], bench := Measures(good_at(1.0)))
    assert [(trial.lr, trial.kind) for trial in bench.ran] == [(None, "start"), (0.03, "final"), (0.03, "final")]


def test_the_ladder():
    chosen = config("o")
    assert [rate(chosen, "lora", place) for place in (-2, 0, 1, 2)] == [3.2e-4, 1e-3, 1.8e-3, 3.2e-3]
    assert rate(chosen, "lora", 2, 0.02) == 0.063
    assert rate(chosen, "full") == 5e-5
    assert rate(chosen, "base", 2) is None


def test_rates_that_fail_are_not_chosen_and_a_method_that_always_fails_has_no_runs(tmp_path):
    class Fails(FakeBench):
        def run(self, trial, report=lambda looks: False):
            if trial.method == "svf" or trial.lr > 2e-3:
                raise SpectuneError("the loss is not finite")
            return super().run(trial, report)

    study = worked(config(tmp_path, lrs=3), ["lora", "svf"], Fails(good_at(3e-3)))
    assert study.best_rate("lora") == pytest.approx(1.8e-3)
    assert study.best_rate("svf") is None
    assert study.finals("svf") == []
    assert {result["error"] for _, result in study.searches("svf")} == {"the loss is not finite"}


def test_seeds_can_be_added(tmp_path):
    worked(config(tmp_path, seeds=1, lrs=2), ["lora"], FakeBench(good_at(1e-3)))
    results = Results(tmp_path / "trials", "s")
    pending = Study(config(tmp_path, seeds=3, lrs=2), ["lora"], results).pending()
    assert [(trial.kind, trial.seed) for trial in pending] == [("final", 1), ("final", 2)]
    assert results.corrupt == []


def noisy(trial):
    """Return an accuracy that differs by seed."""
    return 0.75 + (0.05 if trial.seed % 2 else -0.05)


def test_more_seeds_run_where_a_difference_needs_them(tmp_path):
    plain = worked(config(tmp_path / "a", lrs=1, seeds=3), ["lora", "svf"], FakeBench(noisy))
    assert [len(plain.finals(method)) for method in ("lora", "svf")] == [3, 3]
    told = plain.told()
    assert told.startswith("3 seeds and 40 test records tell a difference of")
    assert "by the runs of lora; 2 points need" in told
    found = worked(config(tmp_path / "b", lrs=1, seeds=3, detect=20), ["base", "lora", "svf"], FakeBench(noisy))
    count = len(found.finals("lora"))
    assert count == 4
    assert {len(found.finals(method)) for method in ("base", "lora", "svf")} == {count}
    assert found.told().startswith(f"{count} seeds and 40 test records tell a difference of")
    never = worked(config(tmp_path / "c", lrs=1, seeds=1, detect=0.1), ["lora"], FakeBench(noisy))
    assert len(never.finals("lora")) == 20


def test_what_is_said_before_the_first_run():
    one, known = beforehand(config("o", seeds=1), 250)
    assert one.startswith("seeds=1 says nothing of what other seeds would do")
    assert known.startswith("1 seed and 250 test records tell a difference of 5.6 points")
    assert len(beforehand(config("o", metric="macro_f1"), 250)) == 0
    assert "need" not in beforehand(config("o", detect=6), 250)[0]


def test_equal_time_gives_a_slower_method_fewer_steps(tmp_path):
    chosen = config(tmp_path, equal="time", lrs=3, seeds=2)
    bench = FakeBench(good_at(3e-3), lambda trial: {"lora": 0.1, "svf": 0.05, "dora": 0.4}.get(trial.method, 1.0))
    worked(chosen, ["lora", "svf", "dora", "base"], bench)
    kinds = Counter((trial.method, trial.kind, trial.steps) for trial in bench.ran)
    assert [kinds[method, "time", None] for method in ("lora", "svf", "dora", "base")] == [1, 1, 1, 0]
    assert kinds["lora", "final", 8] == kinds["svf", "final", 16] == kinds["dora", "final", 2] == 2
    assert kinds["base", "final", None] == 2
    assert not [trial for trial in bench.ran if trial.kind == "search" and trial.steps is None]


def test_a_method_whose_step_cannot_be_timed_does_not_run(tmp_path):
    class Fails(FakeBench):
        def run(self, trial, report=lambda looks: False):
            if trial.method == "svf":
                raise SpectuneError("no layer here takes it")
            return super().run(trial, report)

    study = worked(config(tmp_path, equal="time", lrs=1, seeds=1), ["lora", "svf"], Fails(good_at(1e-3)))
    assert study.finals("svf") == []
    assert [result["error"] for _, result in study.timed("svf")] == [None, "no layer here takes it"]
    assert len(study.finals("lora")) == 1


def test_a_search_in_which_nothing_learns_ends(tmp_path):
    study = worked(config(tmp_path, lrs=3, search=4), ["lora"], bench := FakeBench(lambda trial: 0.2))
    assert study.best_rate("lora") in {trial.lr for trial in bench.ran if trial.kind == "search"}


def test_another_comparison_in_the_folder_is_refused(tmp_path):
    chosen = config(tmp_path, max_steps=8)
    (tmp_path / "settings.json").write_text(json.dumps(chosen.settings()))
    check_folder(config(tmp_path, max_steps=8, seeds=7, methods=["svf"]))
    with pytest.raises(SpectuneError, match="max_steps: 8, not 9"):
        check_folder(config(tmp_path, max_steps=9))
    assert digest(chosen.settings()) == digest(config(tmp_path, max_steps=8, workers=2).settings())
