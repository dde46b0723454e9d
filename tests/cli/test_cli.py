"""The commands as a user types them, on a tiny model."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import spectune
from cli.typed import fails, run
from spectune.cli import app, main
from training.folder import make_model, make_tokenizer, save_folder

COMMANDS = ["", "demo", "methods", "train", "generate", "classify", "chat", "compose", "export", "import", "cache"]
COMMANDS += ["plan", "spectrum", "library"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert "Usage" in run(*filter(None, [command]), "--help").output


def test_every_help_has_an_example_that_its_command_takes():
    def check(command, *names):
        for name, inner in getattr(command, "commands", {}).items():
            check(inner, *names, name)
        if not hasattr(command, "commands"):
            begin = " ".join(["spectune", *names])
            assert begin in command.help
            for line in command.help.splitlines():
                if line.strip().startswith(begin):
                    command.make_context(names[-1], shlex.split(line)[1 + len(names) :])

    check(get_command(app))


def test_help_of_train_names_every_key():
    from spectune.training.config import TrainConfig

    text = run("train", "--help").output
    assert all(key in text for key in TrainConfig.model_fields)


def test_help_does_not_import_torch():
    code = "import sys, spectune.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_lists_all_with_their_papers():
    rows = json.loads(run("methods", "--json").stdout)
    assert {"lora", "svf", "svft", "pissa", "milora", "lora_xs", "dora", "adalora"} <= {r["method"] for r in rows}
    assert all(row["paper"].startswith("arXiv:") for row in rows)
    assert "pissa" in run("methods").output


def test_chat_remembers_resets_and_quits(model, adapters):
    result = run(
        "chat", model, "-a", adapters["pirate"], "--max-new-tokens", "3", stdin="say one\n\n/reset\nsay\n/quit\n"
    )
    assert len(result.stdout.strip().splitlines()) >= 2


def test_compose_adds_on_files(adapters, tmp_path):
    out = tmp_path / "sum"
    result = json.loads(
        run("compose", str(out), adapters["pirate"] + ":0.5", adapters["pirate"] + ":1.5", "--json").stdout
    )
    one, total = spectune.Adapter.load(adapters["pirate"]), spectune.Adapter.load(out)
    assert result["parameters"] == one.parameter_count()
    name = next(iter(one.layers))
    z, doubled = (a.layers[name].terms[0].trained["z"] - 1 for a in (one, total))
    assert (doubled - 2 * z).abs().max() < 1e-6


def test_compose_of_different_methods_compresses(model, adapters, tmp_path):
    out = tmp_path / "small"
    terms = [adapters["pirate"], adapters["chef"] + ":-0.5"]
    result = json.loads(
        run("compose", str(out), *terms, "--rank", "2", "--base", model, "--allow-loss", "--json").stdout
    )
    assert 0 < result["error"] < 1
    assert spectune.Adapter.load(out).layers["model.layers.0.self_attn.q_proj"].terms[0].method.rank == 2


def test_another_base_is_refused_unless_asked_for(monkeypatch, capsys, adapters, tmp_path):
    other = tmp_path / "other"
    save_folder(other)
    changed = make_model()
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight.mul_(2)
    changed.save_pretrained(other)
    arguments = ["generate", str(other), "say one", "-a", adapters["chef"], "--dtype", "fp32"]
    assert "belongs to another base" in fails(monkeypatch, capsys, *arguments)
    run(*arguments, "--no-check", "--max-new-tokens", "2")


def test_train_reads_yaml(model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one two three"}\n' * 4)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\ndata: {data}\noutput: {tmp_path / 'out'}\nmax_steps: 5\nheld_out: 0.5\n")
    result = json.loads(run("train", str(config), "max_steps=1", "--json").stdout)
    assert result["steps"] == 1
    assert result["held_out_loss_before"] > 0


def test_mistakes_are_one_sentence_and_code_2(monkeypatch, capsys, model, adapters, tmp_path):
    def says(*arguments):
        return fails(monkeypatch, capsys, *arguments)

    assert "unknown key 'lrr'; did you mean 'lr'" in says("train", "lrr=1")
    assert "model is not given" in says("train")
    assert "there is no adapter folder" in says("generate", model, "say", "-a", str(tmp_path / "none"))
    assert "is not FOLDER or FOLDER:WEIGHT" in says("generate", model, "say", "-a", "a:b")
    assert "unknown model 'smollm'; did you mean 'smollm2-135m'" in says("generate", "smollm", "say")
    assert "there is no model folder" in says("generate", "./nowhere", "say")
    assert "the model's context holds 64" in says("generate", model, "one " * 70)
    assert "needs a value" in says("train", "--lr")
    assert "unknown method 'svv'" in says("demo", "--method", "svv")
    assert "is not an adapter" in says("import", str(tmp_path), str(tmp_path / "out"))
    assert "unknown dtype 'fp31'" in says("generate", model, "say", "--dtype", "fp31")
    assert says("plan") == "error: missing argument 'model' (see `spectune plan --help`)"
    assert says("nope") == "error: no such command 'nope' (see `spectune --help`)"
    assert says("--nope") == "error: no such option: --nope (see `spectune --help`)"
    told = says("generate", model, "say", "--max-new-tokens", "0")
    assert told.startswith("error: invalid value for '--max-new-tokens': ")
    assert told.endswith("(see `spectune generate --help`)")


def test_classify_says_labels_and_probabilities(model, monkeypatch, capsys, tmp_path):
    data, out = tmp_path / "data.jsonl", str(tmp_path / "out")
    rows = [{"text": f"say {w}", "label": w} for w in ("one", "two") * 8]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = [f"model={model}", f"data={data}", "task=classify", f"output={out}", "epochs=6", "held_out=0.25"]
    trained = json.loads(run("train", *settings, "method=lora:rank=2", "dtype=fp32", "device=cpu", "--json").stdout)
    assert trained["held_out_after"]["accuracy"] == 1
    found = json.loads(run("classify", model, "say one", "say two", "-a", out, "--json").stdout)
    assert [one["label"] for one in found] == ["one", "two"]
    assert found[0]["probabilities"].keys() == {"one", "two"}
    shown = run("classify", model, "-a", out, stdin="say\u2028two\n\nsay one\n").stdout
    assert [line.split("\t")[::2] for line in shown.split("\n")[:2]] == [["two", "say\u2028two"], ["one", "say one"]]
    assert "does not generate text" in fails(monkeypatch, capsys, "generate", model, "say", "-a", out)
    assert "does not generate text" in fails(monkeypatch, capsys, "chat", out)  # before anything is typed
    assert "is not a classifier of texts" in fails(monkeypatch, capsys, "classify", model, "say")
    run("export", out, str(tmp_path / "merged"), "--format", "merged", "--base", model)
    merged = json.loads(run("classify", str(tmp_path / "merged"), "say one", "--json").stdout)
    assert merged[0]["label"] == "one"
    run("compose", str(tmp_path / "sum"), f"{out}:0.5", f"{out}:0.5")
    both = json.loads(run("classify", model, "say one", "-a", str(tmp_path / "sum"), "--json").stdout)
    assert both[0]["probabilities"] == pytest.approx(found[0]["probabilities"], abs=1e-4)


def test_a_folder_without_a_model_is_told(monkeypatch, capsys, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert "cannot be loaded as a model" in fails(monkeypatch, capsys, "generate", str(tmp_path), "say")


def test_cache_lists_verifies_and_prunes(model, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / "cache"))
    run("generate", model, "say", "-a", adapters["pirate"], "--max-new-tokens", "1")
    entries = json.loads(run("cache", "ls", "--json").stdout)
    assert len(entries) == 14
    assert {entry["kind"] for entry in entries} == {"one_sided"}
    assert "14 entries" in run("cache", "ls").stdout
    path = Path(entries[0]["path"])
    path.write_bytes(path.read_bytes()[:-1])
    assert json.loads(run("cache", "verify", "--json").stdout) == {"damaged": [entries[0]["key"]]}
    assert "13 deleted" in run("cache", "prune", "--max-bytes", "0").stdout
    assert json.loads(run("cache", "ls", "--json").stdout) == []


def test_the_cache_can_be_moved_and_switched_off(model, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", "unused")
    generate = ["generate", model, "say", "-a", adapters["pirate"], "--max-new-tokens", "1"]
    run("--cache", str(tmp_path / "elsewhere"), *generate)
    assert any((tmp_path / "elsewhere").iterdir())
    assert "the cache is off" in run("--cache", "off", "cache", "ls").stdout


def test_memory_that_is_not_there(monkeypatch, capsys):
    def allocate(*_, **__):
        torch.empty(1 << 60)

    def no_memory(*_, **__):
        raise MemoryError

    for fail in (allocate, no_memory):
        monkeypatch.setattr("spectune.planning.plan.plan", fail)
        assert "there is not enough memory for this" in fails(monkeypatch, capsys, "plan", "minilm-l6")


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("spectune.training.doctor.examine", interrupted)
    monkeypatch.setattr(sys, "argv", ["spectune", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "error: interrupted" in capsys.readouterr().err
