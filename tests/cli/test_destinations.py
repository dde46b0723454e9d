"""Where results go: refused before anything is loaded, replaced whole, never through a link; losses are told."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import forked
import spectune
import tiny
from spectune import cli, storage
from spectune.adapters.destination import check_destination
from spectune.errors import SpectuneError
from spectune.storage import collect_temporaries, publish, temporary_beside
from training.folder import save_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Folders of an SVF and a LoRA adapter of the base."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in (("svf", "svf"), ("lora", "lora:rank=2")):
        model, _ = spectune.load_base(base, "fp32")
        spectune.adapt(model, method)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
        spectune.extract(model).save(folder / name)
    return folder


@pytest.fixture
def says(monkeypatch, capsys):
    """Run a command line and return its exit code and what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["spectune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return ended.value.code or 0, " ".join((output.err + output.out).split())

    return run


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(made, base, out):
    return {
        "export": ["export", made / "lora", out],
        "merged": ["export", made / "lora", out, "--format", "merged", "--base", base],
        "import": ["import", made / "lora", out],
        "compose": ["compose", out, f"{made / 'lora'}:0.5"],
    }


@pytest.mark.parametrize("command", ["export", "merged", "import", "compose"])
def test_nothing_is_overwritten_unless_it_is_asked_for(made, base, tmp_path, says, command, monkeypatch):
    out = tmp_path / "out"
    line = commands(made, base, out)[command]
    assert says(*line)[0] == 0
    before = content(out)
    code, text = says(*line)
    assert (code, content(out)) == (2, before)
    assert f"{out} exists: give another folder, or --overwrite" in text
    assert says(*line, "--overwrite")[0] == 0
    assert content(out).keys() == before.keys()

    monkeypatch.setattr(spectune.Adapter, "load", lambda path: pytest.fail("loaded"))
    foreign, link, file = tmp_path / "thesis", tmp_path / "link", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    link.symlink_to(foreign)
    file.write_text("a file")
    for place, told in (
        (foreign, "is not a"),
        (link, "is a symbolic link"),
        (file, "is a file"),
        (file / "x", "no folder"),
    ):
        code, text = says(*commands(made, base, place)[command], "--overwrite")
        assert code == 2
        assert told in text
    assert content(foreign) == {Path("thesis.tex"): b"years of work"}


@pytest.mark.parametrize("command", ["export", "merged", "import", "compose"])
def test_an_input_is_never_the_output(made, base, tmp_path, says, command):
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    before = content(copied)
    code, text = says(*commands(copied, base, copied / "lora")[command], "--overwrite")
    assert (code, content(copied)) == (2, before)
    assert "holds what the result is made from" in text


def test_a_merged_model_replaces_neither_its_base_nor_an_adapter(made, base, says):
    before = content(base), content(made)
    for out in (base, made / "svf", base.parent):
        assert says("export", made / "lora", out, "--format", "merged", "--base", base, "--overwrite")[0] == 2
    assert (content(base), content(made)) == before


def test_what_cannot_be_made_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SpectuneError, match=r"permissions of .* forbid it"):
        check_destination(tmp_path / "a" / "b")
    with pytest.raises(SpectuneError, match="its permissions forbid it"):
        check_destination(tmp_path)


def test_a_loss_is_refused_with_the_errors_by_rank(made, base, tmp_path, says):
    code, text = says("export", made / "svf", tmp_path / "x", "--rank", "1", "--base", base)
    assert code == 2
    assert not (tmp_path / "x").exists()
    enough = int(text.partition("take rank ")[2].partition(",")[0])
    assert says("export", made / "svf", tmp_path / "y", "--rank", enough, "--base", base)[0] == 0
    assert says("export", made / "svf", tmp_path / "z", "--rank", enough - 1, "--base", base)[0] == 2
    code, text = says("compose", tmp_path / "x", made / "svf", "--rank", "1", "--base", base)
    assert code == 2
    assert "relative error" in text
    assert says("compose", tmp_path / "x", made / "svf", "--rank", "1", "--base", base, "--allow-loss")[0] == 0
    adapter = spectune.Adapter.load(made / "svf").bind(spectune.load_base(base, "fp32")[0])
    with pytest.raises(SpectuneError, match="allow_loss=True"):
        adapter.export(tmp_path / "w", rank=1)
    assert adapter.export(tmp_path / "w", rank=1, allow_loss=True).error > 0.1
    assert adapter.to_lora(1).error > 0.1


@pytest.mark.parametrize("method", ["svf", "lora:rank=3", "dora:rank=2", "svft"])
def test_errors_by_rank_are_those_of_the_truncations(method):
    from spectune.adapters.compress import errors_by_rank

    model = tiny.mlp() if hasattr(tiny, "mlp") else torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 5))
    spectune.adapt(model, method)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    adapter = spectune.extract(model)
    for rank, error in errors_by_rank(adapter).items():
        assert adapter.compress(rank).error == pytest.approx(error, abs=2e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders change places at once on Linux alone")
def test_a_folder_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    out = tmp_path / "out"

    def old():
        with temporary_beside(out, folder=True) as folder:
            for name in ("a", "b", "c"):
                (folder / name).write_text("old")
            publish(folder, out)

    def replaced(dies_at):
        calls = []

        def counted(real):
            def call(*args, **kwargs):
                calls.append(real)
                if len(calls) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        os.replace, os.fsync, os.rmdir = counted(os.replace), counted(os.fsync), counted(os.rmdir)
        storage.exchange = counted(storage.exchange)
        with temporary_beside(out, folder=True) as folder:
            for name in ("a", "b"):
                (folder / name).write_text("new")
            publish(folder, out)

    states = set()
    for dies_at in range(1, 20):
        old()
        how = forked.ended(lambda at=dies_at: replaced(at))
        states.add("".join(path.name + path.read_text() for path in sorted(out.iterdir())))
        collect_temporaries(tmp_path)
        assert list(tmp_path.iterdir()) == [out]
        if how == 0:
            break
        assert how == -signal.SIGKILL
    assert states == {"aoldboldcold", "anewbnew"}
    assert dies_at > 4


def test_what_nobody_foresaw_is_one_sentence_and_code_1(says, monkeypatch, tmp_path):
    def fails(path):
        raise RecursionError("maximum depth")

    monkeypatch.setattr(spectune.Adapter, "load", fails)
    code, text = says("compose", tmp_path / "x", "a")
    assert code == 1
    assert "please report it" in text
    assert "Traceback" not in text
    monkeypatch.setattr(sys, "argv", ["spectune", "--debug", "compose", str(tmp_path / "x"), "a"])
    with pytest.raises(RecursionError):
        cli.main()


def test_a_disk_that_is_full_is_one_sentence_and_code_2(says, monkeypatch, tmp_path, made):
    def fails(*args):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    says("compose", out, made / "lora")
    before = content(out)
    monkeypatch.setattr("spectune.adapters.folder.save_tensors", fails)
    code, text = says("compose", out, f"{made / 'lora'}:2", "--overwrite")
    assert (code, content(out)) == (2, before)
    assert "cannot be written (No space left on device); what was there is as it was" in text


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xyz:1", "meta2"])
def test_a_device_that_is_not_there_is_told(base, says, device):
    code, text = says("generate", base, "say", "--device", device)
    assert code == 2
    assert f"device={device} cannot be used here (" in text
    assert text.rstrip().endswith("give cpu")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "config.json").write_text("[]"),
        lambda f: (f / "config.json").write_text("{" * 5000),
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe"),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": 5}'),
        lambda f: (f / "model.safetensors").write_bytes(b"x"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: change(f / "config.json", hidden_size="many"),
        lambda f: change(f / "config.json", model_type=["llama"]),
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
    ],
)
def test_a_broken_base_is_told(base, tmp_path, damage):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    damage(folder)
    with pytest.raises(SpectuneError):
        spectune.load_base(folder, "fp32")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("extra", [[], ["overwrite=true"], ["resume=true"]])
def test_a_run_is_not_written_into_what_is_no_runs(base, says, tmp_path, extra):
    for name in ("base", "another"):
        shutil.copytree(base, tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    before = content(tmp_path)
    wanted = {
        "base": "made from",
        "another": "holds a config.json that no run",
        "mine": "holds a README.md that no run",
    }
    for name, told in wanted.items():
        code, said = says("train", f"model={tmp_path / 'base'}", "data=d", f"output={tmp_path / name}", *extra)
        assert (code, told in said) == (2, True), said
    code, said = says("spectrum", tmp_path / "base", "--out", tmp_path / "base")
    assert (code, "made from" in said) == (2, True), said
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\ud800"], ids=["long", "zero", "half"])
def test_names_that_no_folder_can_have(made, name, tmp_path):
    adapter = spectune.Adapter.load(made / "lora")
    for use in (
        spectune.Adapter.load,
        spectune.Adapter.from_peft,
        adapter.save,
        spectune.Library,
        spectune.Library.open,
    ):
        with pytest.raises(SpectuneError, match="is no name of a file or folder"):
            use(name)


def test_a_file_in_the_place_of_a_folder(made, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SpectuneError, match="a file is in its place"):
            spectune.Adapter.load(made / "lora").save(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_arguments_that_are_no_text(says):
    code, said = says("generate", "smollm2-135m", "ahoy \udcff")
    assert (code, "half a character" in said) == (2, True), said
