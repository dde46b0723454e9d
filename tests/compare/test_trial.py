"""Results and claims of trials: kept, refused, repaired, and free again however a worker ends."""

import multiprocessing

import pytest

from compare.fake_bench import FakeBench, good_at
from compare.test_study import config
from spectune import SpectuneError
from spectune.compare.study import Study, work
from spectune.compare.trial import Results, Trial


def test_a_result_of_another_comparison_is_kept_and_refused(tmp_path):
    trial = Trial("base", None, 0, "final")
    Results(tmp_path, "s").put(trial, {"error": None})
    with pytest.raises(SpectuneError, match=r"base\.seed0\.json is of another comparison: give another output"):
        Results(tmp_path, "t").get(trial)
    assert Results(tmp_path, "s").get(trial) is not None


def test_a_corrupt_result_is_named_and_runs_again(tmp_path):
    chosen, bench = config(tmp_path, seeds=1), FakeBench(good_at(1e-3))
    work(chosen, ["base"], "s", bench)
    results = Results(tmp_path / "trials", "s")
    [path] = (tmp_path / "trials").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert Study(chosen, ["base"], results).pending() == [Trial("base", None, 0, "final")]
    assert results.corrupt == [path.name]
    work(chosen, ["base"], "s", bench)
    assert Study(chosen, ["base"], Results(tmp_path / "trials", "s")).pending() == []


def _hold(folder, ready):
    with Results(folder, "s").claimed(Trial("lora", 0.1, 0, "final")) as mine:
        ready.put(mine)
        ready.get()


def test_a_claim_ends_with_its_worker_however_it_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=600) is True
    results, trial = Results(tmp_path, "s"), Trial("lora", 0.1, 0, "final")
    with results.claimed(trial) as mine:
        assert not mine
    process.kill()
    process.join()
    with results.claimed(trial) as mine:
        assert mine


def test_a_trial_whose_workers_are_killed_again_and_again_is_given_up(tmp_path):
    chosen = config(tmp_path, seeds=1, lrs=1)
    results = Results(tmp_path / "trials", "s")
    [trial] = Study(chosen, ["lora"], results).pending()
    for _ in range(3):
        assert results.attempt(trial)
    work(chosen, ["lora"], "s", FakeBench(good_at(1e-3)))
    assert "killed" in results.get(trial)["error"]


def test_an_interrupted_trial_is_no_killed_one(tmp_path, monkeypatch):
    chosen, bench = config(tmp_path, seeds=1), FakeBench(good_at(1e-3))

    def interrupt(trial, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "run", interrupt)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                work(chosen, ["base"], "s", bench)
    work(chosen, ["base"], "s", bench)
    assert Results(tmp_path / "trials", "s").get(Trial("base", None, 0, "final"))["error"] is None
