"""Two processes, started by torchrun as a user would: the same losses as one, one writer, and nobody left waiting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

import spectune
from spectune.adapters.folder import WEIGHTS
from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.run import train
from training.folder import NUMBERS, make_tokenizer, save_folder
from training.two_processes import REINFORCE

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path, model_folder):
    """Examples of several lengths, and so many that the last batch is not full."""
    data = tmp_path / "data.jsonl"
    records = [
        {"prompt": f"what is {n}", "completion": " ".join(NUMBERS[: 1 + i % 7])} for i, n in enumerate(NUMBERS * 3)
    ]
    data.write_text("\n".join(map(json.dumps, records)))
    return [f"model={model_folder}", f"data={data}", "held_out=0.17", "dtype=fp32", "device=cpu", "lr=2e-2"]


def torchrun(*arguments):
    return launched("torch.distributed.run", "--nproc-per-node", "2", *arguments)


def launched(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    paths = os.pathsep.join([str(TESTS), *(p for p in [os.environ.get("PYTHONPATH")] if p)])
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False, timeout=600
    )


def told_by(done):
    """Return the document on standard output, before which Gloo says in PyTorch 2.8 to whom it is connected."""
    return json.loads(done.stdout[done.stdout.index("{") :])


def scenarios(names, folder, settings):
    done = torchrun(TESTS / "training" / "two_processes.py", names, folder, "batch_size=4", "max_steps=8", *settings)
    assert {path.name for path in folder.glob("done-*")} == {"done-0", "done-1"}, done.stderr[-4000:]


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tokens_of(line):
    """Return the tokens that a line of the log says were trained on, and by how much its rounding may be off."""
    pace, seconds = line["tokens_per_second"], line["seconds"]
    return pace * seconds, 0.05 * seconds + 0.0005 * pace + 1


@pytest.mark.parametrize("kind", ["--multi_gpu", pytest.param("--use_fsdp", marks=pytest.mark.slow)])
def test_accelerate_launches_it_too(settings, tmp_path, kind):
    settings += ["method=lora:rank=2", "max_steps=4", "save_steps=2"]
    one = train(load_config(None, [*settings, f"output={tmp_path / 'one'}", "batch_size=8"]))
    options = [kind, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--fsdp_version", "2"] if kind == "--use_fsdp" else []
    two = [*settings, f"output={tmp_path / 'two'}", "batch_size=4", "--json"]
    done = launched("accelerate.commands.launch", *options, "-m", "spectune", "train", *two)
    assert done.returncode == 0, done.stderr
    assert told_by(done)["held_out_loss_after"] == pytest.approx(one.loss_after, abs=1e-5)
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    if kind == "--use_fsdp":  # gone on with from the middle, it ends the same to the last bit
        whole = load_file(tmp_path / "two" / WEIGHTS)
        shutil.rmtree(tmp_path / "two" / "checkpoint-4")
        done = launched("accelerate.commands.launch", *options, "-m", "spectune", "train", *two, "resume=true")
        assert done.returncode == 0, done.stderr
        resumed = load_file(tmp_path / "two" / WEIGHTS)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_two_processes_learn_what_one_does_on_the_same_global_batch(settings, tmp_path):
    settings += ["method=adalora:rank=2,interval=1", "epochs=2", "save_steps=5"]
    one = train(load_config(None, [*settings, f"output={tmp_path / 'one'}", "batch_size=8"]))
    two = [*settings, f"output={tmp_path / 'two'}", "batch_size=2", "gradient_accumulation_steps=2", "--json"]
    done = torchrun("-m", "spectune", "train", *two)
    assert done.returncode == 0, done.stderr
    told = told_by(done)  # of one process
    assert told["held_out_loss_before"] == pytest.approx(one.loss_before, abs=1e-5)
    assert told["held_out_loss_after"] == pytest.approx(one.loss_after, abs=1e-5)
    assert "Warning" not in done.stderr.replace("Setting OMP_NUM_THREADS", "")
    ours, theirs = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
    tokens = [tokens_of(line) for line in (ours[-2], theirs[-2])]  # as the log rounds pace and time
    assert abs(tokens[0][0] - tokens[1][0]) <= tokens[0][1] + tokens[1][1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in (tmp_path / "two" / "checkpoint-5").iterdir()}
    loaded = spectune.Adapter.load(tmp_path / "two")
    for name, layer in one.adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            torch.testing.assert_close(loaded.layers[name].terms[0].trained[key], tensor, atol=1e-5, rtol=1e-4)
    more = [*settings, f"output={tmp_path / 'two'}", "resume=true"]
    with pytest.raises(
        SpectuneError, match=r"another batch_size, gradient_accumulation_steps, number of processes \(1, not 2\)"
    ):
        train(load_config(None, [*more, "batch_size=4"]))
    resumed = train(load_config(None, [*more, "batch_size=8"]))  # on one process, from step 8
    assert resumed.loss_after == pytest.approx(one.loss_after, abs=1e-5)


def test_every_task_learns_what_it_does_in_one_process(settings, tmp_path):
    records = {
        "classify": [
            {"text": " ".join(NUMBERS[i % 10 : i % 10 + 1 + i % 6]), "label": "odd" if i % 2 else "even"}
            for i in range(45)
        ],
        "dpo": [
            {"prompt": f"say {n}", "chosen": " ".join(NUMBERS[: 1 + i % 5]), "rejected": "ahoy " * (1 + i % 3)}
            for i, n in enumerate(NUMBERS * 3)
        ],
    }
    for name, examples in records.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)))
    settings += ["method=lora:rank=2", "eval_steps=4", "epochs=3", "max_steps=null"]
    scenarios("tasks", tmp_path, settings)
    for name in records:
        own = [f"task={name}", f"data={tmp_path / f'{name}.jsonl'}", f"output={tmp_path / f'one-{name}'}"]
        train(load_config(None, [*settings, *own, "batch_size=8"]))
        one, two = (lines(tmp_path / f"{count}-{name}") for count in ("one", "two"))
        assert [line["step"] for line in two] == [line["step"] for line in one]
        pace = ("tokens_per_second", "seconds", "peak_memory")
        for ours, theirs in zip(two, one, strict=True):
            assert {k: v for k, v in ours.items() if k not in pace} == pytest.approx(
                {k: v for k, v in theirs.items() if k not in pace}, abs=1e-4
            )
    train(load_config(None, [*settings, *REINFORCE, f"output={tmp_path / 'one-reinforce'}", "batch_size=8"]))
    one, two = (tmp_path / f"{count}-reinforce" for count in ("one", "two"))
    for key in ("eval_reward", "eval_length", "eval_exact_match"):  # before the first step, which draws at random
        assert lines(two)[0][key] == pytest.approx(lines(one)[0][key])
    outcomes, expected = ((folder / "outcomes" / "step-0.jsonl").read_text().splitlines() for folder in (two, one))
    assert len(expected) == 5
    assert sorted(outcomes) == sorted(expected)


@pytest.mark.filterwarnings("ignore:these adapted layers got no gradient in the first step")  # which say it
@pytest.mark.parametrize("method", ["lora:rank=2", "svf"])
def test_experts_that_one_process_has_no_tokens_for(settings, tmp_path, method):
    sizes = {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
    sizes |= {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=1)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    make_tokenizer().save_pretrained(tmp_path / "experts")
    settings += [f"model={tmp_path / 'experts'}", f"method={method}", "max_steps=4"]
    one = train(load_config(None, [*settings, f"output={tmp_path / 'one'}", "batch_size=8"]))
    done = torchrun("-m", "spectune", "train", *settings, f"output={tmp_path / 'two'}", "batch_size=4", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["held_out_loss_after"] == pytest.approx(one.loss_after, abs=1e-5)
    loaded = spectune.Adapter.load(tmp_path / "two")
    assert sum(".experts." in name for name in loaded.layers) == 2 * 16 * 2
    for name, layer in one.adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            torch.testing.assert_close(loaded.layers[name].terms[0].trained[key], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_one_process_says_what_went_wrong(settings, tmp_path):
    done = torchrun("-m", "spectune", "train", *settings, f"output={tmp_path / 'out'}", "data=nowhere.jsonl")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: cannot read nowhere.jsonl") == 1
    assert "exitcode  : 2" in done.stderr


def test_signals_and_faults_reach_all(settings, tmp_path):
    scenarios("interrupted,not_finite,full_disk,other_process_fails,best", tmp_path, settings)


@pytest.mark.slow
def test_sharded_models_train_and_resume_as_whole_ones(settings, tmp_path):
    scenarios("sharded", tmp_path, settings)


def test_one_process_cannot_shard(settings, tmp_path):
    with pytest.raises(SpectuneError, match="fsdp=true shards over several processes"):
        train(load_config(None, [*settings, f"output={tmp_path / 'out'}", "fsdp=true"]))
