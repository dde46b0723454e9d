"""A comparison from the command line to its report, by one process, by several, and on a cluster."""

import json
import multiprocessing
import time

import pytest
from typer.testing import CliRunner

from compare.fake_bench import FakeBench, good_at
from compare.tiny_bench import config, write_data, write_encoder
from spectune import SpectuneError
from spectune.cli import app
from spectune.compare.bench import Bench
from spectune.compare.config import CompareConfig, digest
from spectune.compare.run import _process, compare
from spectune.training.config import load_config
from spectune.training.preparing import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_encoder(path / "encoder")
    write_data(path / "data.jsonl")
    return path


@pytest.fixture
def untrained(monkeypatch):
    """Let no trial train, where what is looked at is what becomes of results."""
    fake = FakeBench(good_at(1e-2))
    monkeypatch.setattr(Bench, "run", lambda bench, *given: fake.run(*given))


def trials_of(ran):
    """Return of what was told what says that a trial ended."""
    return [last for last in ran if ": test " in last or ": validation " in last]


def small(folder, output, **values):
    return config(folder, output, **{"methods": ["base", "lora", "svf"], "seeds": 2, "lrs": 1, **values})


def test_a_report_is_written_and_a_second_run_repeats_nothing(folder, tmp_path, untrained):
    seen = []
    document = compare(small(folder, tmp_path), lambda done, total, last: seen.append((done, total))).model_dump()
    assert seen[0][0] == 0
    assert any(
        "test records tell a difference of" in note and "by the runs of lora" in note for note in document["notes"]
    )
    assert seen[-1][0] == seen[-1][1]
    assert {row["method"] for row in document["methods"]} == {"base", "lora", "svf"}
    assert all(row["seeds"] == [0, 1] for row in document["methods"])
    page = (tmp_path / "report.html").read_text()
    assert document["answer"][0] in page
    assert json.loads((tmp_path / "report.json").read_text())["methods"] == document["methods"]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    assert document["command"] == f"spectune compare {tmp_path / 'compare.yaml'}"
    again = compare(load_config(str(tmp_path / "compare.yaml"), [], CompareConfig)).model_dump()
    assert again["methods"] == document["methods"]
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}


def test_two_processes_find_what_one_does(folder, tmp_path):
    one = compare(small(folder, tmp_path / "one", seeds=1)).model_dump()
    two = compare(small(folder, tmp_path / "two", seeds=1, workers=2)).model_dump()
    for a, b in zip(one["methods"], two["methods"], strict=True):
        assert (a["method"], a["lr"]) == (b["method"], b["lr"])
        assert a["metric"]["mean"] == pytest.approx(b["metric"]["mean"], abs=0.02)


def test_workers_on_a_cluster(folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or they wait for whatever else the machine does
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        document = compare(small(folder, tmp_path, workers=2, launcher="ray", seeds=1)).model_dump()
    finally:
        ray.shutdown()
    assert {row["method"] for row in document["methods"]} == {"base", "lora", "svf"}


def test_a_method_that_fails_is_in_the_report(folder, tmp_path, monkeypatch):
    document = compare(
        small(folder, tmp_path, methods=["lora", "lora_xs:rank=30"], targets=["intermediate.dense"])
    ).model_dump()
    assert [row["ran"] for row in document["methods"]] == [True, True]

    def refuse(config, model):
        if config.method == "svf":
            raise SpectuneError("no layer here takes it")
        return prepare(config, model)

    monkeypatch.setattr("spectune.compare.bench.prepare", refuse)
    document = compare(small(folder, tmp_path / "b", methods=["lora", "svf"], seeds=1)).model_dump()
    failed = next(row for row in document["methods"] if row["method"] == "svf")
    assert not failed["ran"]
    assert {failure["error"] for failure in document["failures"]} == {"no layer here takes it"}


def test_what_failed_runs_again_when_asked_to(folder, tmp_path, monkeypatch, untrained):
    values = {"methods": ["base"], "seeds": 2}
    run = Bench.run

    def full_disk(bench, trial, *rest):
        if trial.seed == 1:
            raise RuntimeError("no space left")
        return run(bench, trial, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "run", full_disk)
        compare(small(folder, tmp_path, **values))
    (tmp_path / "trials" / ".base.seed1.attempts").write_bytes(b"..")
    failed = compare(small(folder, tmp_path, **values)).model_dump()
    assert [failure["error"] for failure in failed["failures"]] == ["no space left"]
    ran = []
    again = compare(
        small(folder, tmp_path, **values, retry=True), lambda done, total, last: ran.append(last)
    ).model_dump()
    assert again["failures"] == []
    assert len(trials_of(ran)) == 1
    assert "retry" not in (tmp_path / "compare.yaml").read_text()
    (tmp_path / "trials" / ".base.seed1.attempts").write_bytes(b"...")
    ran.clear()
    compare(small(folder, tmp_path, **values, overwrite=True), lambda done, total, last: ran.append(last))
    assert len(trials_of(ran)) == 2
    assert not list((tmp_path / "trials").glob(".*.attempts"))
    assert "overwrite" not in (tmp_path / "compare.yaml").read_text()  # or the command to reproduce it would wipe it


def test_another_data_set_is_another_comparison(folder, tmp_path, untrained):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row["other"] = row["text"].split()[-1]
    rows[5]["text"] = ""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"data": str(path), "methods": ["base"], "seeds": 1}
    document = compare(small(folder, tmp_path / "out", **values)).model_dump()
    assert any("1 records have a text without content and were left out" in note for note in document["notes"])
    with pytest.raises(SpectuneError, match=r"holds trials of other settings \(columns: None, not"):
        compare(small(folder, tmp_path / "out", **values, columns={"label": "other"}))
    rows[7]["label"] = rows[8]["label"] = "many"
    rows[7]["text"] = rows[8]["text"] = "ten nine"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SpectuneError, match=r"other settings \(the data changed\): give another output"):
        compare(small(folder, tmp_path / "out", **values))
    assert len(list((tmp_path / "out" / "trials").glob("*.json"))) == 1


def test_a_baseline_that_does_not_fit_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("spectune.compare.run.check_room", lambda config: ["full"])
    with pytest.raises(SpectuneError, match="baseline: full takes more memory than there is"):
        compare(small(folder, tmp_path, model="nowhere", methods=["full", "lora"], baseline="full"))


def test_an_interrupted_comparison_says_how_it_goes_on(folder, tmp_path, monkeypatch):
    def interrupt(bench, trial, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", interrupt)
    settings = [f"{key}={value}" for key, value in small(folder, tmp_path).model_dump(exclude_unset=True).items()]
    result = CliRunner().invoke(app, ["compare", *settings])
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.output
    assert not list((tmp_path / "trials").glob(".*.attempts"))


def _stays(values, methods, settings, there):
    """Work as a process of a comparison does, but stay at the second trial."""
    run = Bench.run

    def stay(bench, trial, *rest):
        if trial.seed == 1:
            there.set()
            time.sleep(600)
        return run(bench, trial, *rest)

    Bench.run = stay
    _process(values, methods, settings, 1)


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_another_process_goes_on_where_one_ended(end, folder, tmp_path):
    chosen = small(folder, tmp_path, methods=["base", "lora"])
    context = multiprocessing.get_context("spawn")
    there = context.Event()
    values = chosen.model_dump(exclude_unset=True)
    process = context.Process(target=_stays, args=(values, chosen.methods, digest(chosen.settings()), there))
    process.start()
    assert there.wait(120)
    getattr(process, end)()
    process.join()
    trials = tmp_path / "trials"
    assert [path.name for path in trials.glob("*.json")] == ["base.seed0.json"]
    before = (trials / "base.seed0.json").stat().st_mtime_ns
    # whatever stops a comparison on purpose does not count against the trial
    assert [path.name for path in trials.glob(".*.attempts")] == [".base.seed1.attempts"] * (end == "kill")
    ran = []
    document = compare(chosen, lambda done, total, last: ran.append(last)).model_dump()
    assert len(trials_of(ran)) == 3  # base at seed 1, and two seeds of lora
    assert (trials / "base.seed0.json").stat().st_mtime_ns == before
    assert document["failures"] == []
    assert not list(trials.glob(".*.attempts"))


def test_the_command(folder, tmp_path, untrained):
    settings = [f"{key}={value}" for key, value in small(folder, tmp_path).model_dump(exclude_unset=True).items()]
    result = CliRunner().invoke(app, ["compare", *settings])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    told = CliRunner().invoke(app, ["compare", *settings, "--json"])
    assert json.loads(told.stdout)["metric"] == "accuracy"


def test_an_unknown_preset_or_key():
    with pytest.raises(SpectuneError, match="preset: 'slow' is not known"):
        CliRunner().invoke(app, ["compare", "--preset", "slow"], catch_exceptions=False)
    with pytest.raises(SpectuneError, match="did you mean 'seeds'"):
        CliRunner().invoke(app, ["compare", "sedes=3"], catch_exceptions=False)
