"""YAML, key=value and their errors."""

import pytest

from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.values import in_full

NEEDED = ["model=m", "data=d.jsonl", "output=o"]


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d.jsonl\noutput: o\nlr: 1e-4\nmethod: pissa:rank=4\ntargets: [q_proj, v_proj]\n")
    config = load_config(path, ["lr=2e-3", "method=lora:rank=2", "resume=true"])
    assert (config.lr, config.method, config.resume) == (2e-3, "lora:rank=2", True)
    assert config.targets == ["q_proj", "v_proj"]
    assert load_config(path, []).lr == 1e-4


def test_the_learning_rate_is_the_methods_own_if_not_given():
    assert load_config(None, [*NEEDED, "method=svf"]).learning_rate() == 2e-2
    assert load_config(None, [*NEEDED, "method=svft:pattern=banded"]).learning_rate() == 5e-3
    assert load_config(None, [*NEEDED, "method=dora:inner=svf"]).learning_rate() == 2e-2
    assert load_config(None, [*NEEDED, "method=svf", "lr=0.5"]).learning_rate() == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*NEEDED, "learning_rat=1"], "unknown key 'learning_rat'"),
        ([*NEEDED, "warmpu=1"], "did you mean 'warmup'"),
        (["model=m", "output=o"], "data is not given"),
        ([*NEEDED, "lr=-1"], "lr: .*greater than 0"),
        ([*NEEDED, "lr=.inf"], "lr: .*finite"),
        ([*NEEDED, "group_lr={magnitude: -1}"], "group_lr: .*greater than 0"),
        ([*NEEDED, "group_lr={magnitude: .nan}"], "group_lr: "),
        ([*NEEDED, "batch_size=many"], "batch_size: .*integer"),
        ([*NEEDED, "schedule=wavy"], "schedule: "),
        ([*NEEDED, "method=lroa"], "did you mean 'lora'"),
        ([*NEEDED, "method=lora:rank=0"], "rank of LoRA"),
        ([*NEEDED, "overrides={mlp: svv}"], "did you mean 'svf'"),
        ([*NEEDED, "lr"], "not key=value"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(SpectuneError, match=message):
        load_config(None, settings)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpectuneError, match="is not there"):
        load_config(tmp_path / "none.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(SpectuneError, match="not valid YAML"):
        load_config(broken, [])
    broken.write_text("- a\n- b\n")
    with pytest.raises(SpectuneError, match="key: value"):
        load_config(broken, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["patience=2"], "patience needs evaluations"),
        (["best=true", "eval_steps=5", "held_out=0"], "best needs held-out data"),
        (["beta=0.3"], "beta is a key of task: dpo, and this is task: sft"),
    ],
)
def test_keys_that_do_not_go_together(settings, message):
    with pytest.raises(SpectuneError, match=message):
        load_config(None, [*NEEDED, *settings])


def test_targets_may_map_patterns_to_methods(tmp_path):
    mapped = "targets={q_proj|v_proj: svf, mlp: 'lora:rank=8'}"
    config = load_config(None, [*NEEDED, mapped, "lr=1e-3"])
    assert config.where()["targets"] == {"q_proj|v_proj": "svf", "mlp": "lora:rank=8"}
    assert (config.method, config.where()["method"]) == ("svf + lora:rank=8", None)
    again = load_config(None, [*NEEDED, mapped, "lr=1e-3", "method=svf + lora:rank=8"])  # as config.yaml holds it
    assert again.model_dump() == config.model_dump()
    assert load_config(None, [*NEEDED, "targets={q_proj: 'lora:rank=2', v_proj: lora}"]).learning_rate() == 1e-3
    with pytest.raises(SpectuneError, match=r"different learning rates by default \(svf: 0.02, lora: 0.001\): give lr"):
        load_config(None, [*NEEDED, mapped])
    with pytest.raises(SpectuneError, match="leave the method out"):
        load_config(None, [*NEEDED, mapped, "lr=1e-3", "method=svf"])
    with pytest.raises(SpectuneError, match="did you mean 'svf'"):
        load_config(None, [*NEEDED, "targets={mlp: svv}"])


def test_layers_are_narrowed_under_pefts_names():
    config = load_config(
        None,
        [*NEEDED, "layers_to_transform=[0, 3]", "layers_pattern=h", "rank_pattern={q_proj: 4}", "target_modules=x"],
    )
    where = config.where()
    assert (where["layers_to_transform"], where["layers_pattern"]) == ([0, 3], "h")
    assert (where["rank_pattern"], where["alpha_pattern"], where["targets"]) == ({"q_proj": 4}, {}, "x")


def test_paths_are_told_in_full_and_what_is_no_source_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    full = str(tmp_path / "a.jsonl")
    assert in_full(["a.jsonl", {"path": "a.jsonl", "weight": 2}]) == [full, {"path": full, "weight": 2}]
    assert in_full({"pth": "a.jsonl"}) == {"pth": "a.jsonl"}
    assert in_full("user/data") == "user/data"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: yes", "lr: YAML reads yes, no, on and off as true and false: .* write a number for one .given: True."),
        ("batch_size: true", "batch_size: YAML reads yes, no"),
        ("targets: no", "targets: YAML reads yes, no, on and off as true and false: quote a name"),
        ("yes: 1", "run.yaml: True is no key: quote it, for YAML reads yes, no, on, off and ~ as values"),
        (
            "columns: text",
            r"columns: Input should be a valid dictionary .given: 'text'.; columns is: the data's names for",
        ),
        (
            "targets: [q_proj, 3]",
            "targets, item 2: Input should be a valid string .given: 3.; targets is: all-linear, ",
        ),
        ("data: [a.jsonl, {path: b.jsonl, weigth: 2}]", "data, item 2: unknown key 'weigth'; did you mean 'weight'"),
        ("data: [a.jsonl, {weight: 2}]", "data, item 2: path is not given"),
        ("data: ''", "data is empty"),
        ("save_total_limit: 2", "unknown key 'save_total_limit': it is seen to without a setting: leave it out"),
        ("datasets: [{path: d.jsonl, type: alpaca}]", "unknown key 'datasets': write data: a file, or a list of"),
        ("a: *b", "run.yaml is not valid YAML: found undefined alias, at line 4, column 4$"),
    ],
)
def test_yaml_as_people_write_it(line, message, tmp_path):
    path = tmp_path / "run.yaml"
    kept = [f"{key}: {key[0]}" for key in ("model", "data", "output") if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(SpectuneError, match=message):
        load_config(path, [])


def test_one_source_with_a_weight_and_data_for_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\noutput: o\ndata: {path: d.jsonl, weight: 2}\nbest: no\n")
    assert load_config(tmp_path / "run.yaml", []).data[0].weight == 2
    with pytest.raises(
        SpectuneError, match=r"d.jsonl is data, and settings are needed: give model=..., data=.*d.jsonl"
    ):
        load_config(tmp_path / "d.jsonl", [])


def test_a_path_may_name_the_home_folder_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    monkeypatch.delenv("NOWHERE", raising=False)
    given = ["model=m", "data=~/a.jsonl", "output=${HOME}/$RUNS/one"]
    config = load_config(None, given)
    assert (config.data, config.output) == (f"{tmp_path}/a.jsonl", f"{tmp_path}/runs/one")
    with pytest.raises(SpectuneError, match=r"output: \$\{NOWHERE\} is not set in the environment"):
        load_config(None, [*given[:2], "output=${NOWHERE}/one"])
    several = load_config(None, ["model=m", "output=o", "data=[~/a.jsonl, {path: $RUNS/b.jsonl, weight: 2}]"])
    assert several.data[0] == f"{tmp_path}/a.jsonl"
    assert (several.data[1].path, several.data[1].weight) == ("runs/b.jsonl", 2)
    (tmp_path / "$odd").mkdir()  # a name that there is
    assert load_config(None, [*given[:2], f"output={tmp_path}/$odd"]).output == f"{tmp_path}/$odd"
