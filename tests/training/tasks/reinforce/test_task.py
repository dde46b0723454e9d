"""task: reinforce on a tiny model: it learns what is rewarded, resumes bit for bit, and says what went wrong."""

import errno
import json
import os
import sys
import warnings

import pytest
import torch

import spectune
from spectune.bases.generation import prompt_tokens
from spectune.errors import SpectuneError
from spectune.training import processes
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks import make_task
from spectune.training.tasks.reinforce import policy_trainer
from spectune.training.tasks.reinforce import task as task_module
from spectune.training.trainer import trainer as trainer_module
from training.folder import NUMBERS, save_folder

CHECKPOINTING = ["gradient_checkpointing=true"]
RECORDS = [
    {"prompt": prompt, "answer": "ahoy"}
    for n in NUMBERS
    for prompt in (f"what is {n}", [{"role": "user", "content": f"say {n}"}])
    for _ in range(2)
]
REWARDS = """
def ahoy(completions, answer):
    return [(a in c.split()) / len(c.split() or [1]) for c, a in zip(completions, answer)]

def one_word(completions, answer):
    return [float(c.strip() == a) for c, a in zip(completions, answer)]

def signed(completions):
    return [1.0 if "ahoy" in c.split() else -1.0 for c in completions]

def nothing(completions):
    return [0.0] * len(completions)

calls = 0
def fails_late(completions):
    global calls
    calls += 1
    return [0.0, 1.0] * (len(completions) // 2) if calls < 9 else [0.0]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_rewards", raising=False)
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    common = [f"model={model_folder}", "data=data.jsonl", "dtype=fp32", "device=cpu", "held_out=0.25", "save_steps=5"]
    return [*common, "task=reinforce", "reward=tiny_rewards:ahoy", "max_new_tokens=4", "lr=5e-2"]


def run(settings, *more):
    return train(load_config(None, [*settings, *more]))


def values(result):
    layers = result.adapter.layers.items()
    return {(n, k): t for n, layer in layers for k, t in layer.terms[0].trained.items()}


@torch.no_grad()
def expected_reward(model_folder, adapter=None):
    """Return the reward to be expected of completions of one word, over all of them and over all prompts."""
    model, tokenizer = spectune.load_base(model_folder, "fp32")
    if adapter is not None:
        spectune.attach(model, adapter)
    (ahoy,) = tokenizer("ahoy")["input_ids"]
    prompts = [prompt_tokens(tokenizer, record["prompt"]) for record in RECORDS[::2]]
    return sum(float(model(torch.tensor([p])).logits[0, -1].softmax(-1)[ahoy]) for p in prompts) / len(prompts)


ONE_WORD = ["reward=tiny_rewards:one_word", "max_new_tokens=1"]


@pytest.mark.parametrize("method", ["svf", "lora:rank=2"])
def test_it_learns_what_is_rewarded(settings, tmp_path, model_folder, method):
    more = [*ONE_WORD, "output=out", f"method={method}", "max_steps=25", "normalize_rewards=true", "kl=0.001"]
    result = run(settings, *more)
    before, after = expected_reward(model_folder), expected_reward(model_folder, result.adapter)
    assert after > 10 * before  # 0.015 before; 0.48 and more after, at three seeds of two methods
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"reward", "kl", "length"} <= lines[1].keys()
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-5)  # a new adapter is the base
    assert lines[-2]["kl"] > 0.5
    outcomes = (tmp_path / "out" / "outcomes" / "step-25.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in outcomes]
    assert sum(rewards) / len(rewards) == pytest.approx(result.after["reward"])
    assert (tmp_path / "out" / "curve.png").stat().st_size > 0


def test_a_large_coefficient_keeps_it_at_the_base(settings):
    free = run(settings, *ONE_WORD, "output=free", "max_steps=15", "normalize_rewards=true", "log_kl=true")
    held = run(settings, *ONE_WORD, "output=held", "max_steps=15", "normalize_rewards=true", "kl=10")
    free_kl, held_kl = ([line["kl"] for line in r.history if "kl" in line][-1] for r in (free, held))
    assert held_kl < 0.2 * free_kl


def test_dropout_is_off_so_that_the_first_step_is_at_the_base(settings):
    line = run(settings, "output=out", "method=milora:rank=2,dropout=0.5", "max_steps=1", "log_kl=true").history[1]
    assert line["kl"] == 0


@pytest.mark.parametrize("how", ["selective", "true"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["dora:rank=2", "svf"])
def test_the_divergence_starts_at_zero_to_the_bit(settings, method, dtype, how):
    more = [
        "output=out",
        f"method={method}",
        "max_steps=1",
        "kl=0.1",
        f"dtype={dtype}",
        f"gradient_checkpointing={how}",
    ]
    assert run(settings, *more, "held_out=0").history[0]["kl"] == 0


def test_the_base_answers_only_where_the_divergence_is_used(settings, monkeypatch):
    passes = []
    own = task_module.completion_logits
    monkeypatch.setattr(task_module, "completion_logits", lambda *args: passes.append(args) or own(*args))
    for count, more in ((1, []), (2, ["log_kl=true"]), (2, ["kl=0.1"])):
        passes.clear()
        line = run(settings, "output=out", "overwrite=true", "max_steps=1", "held_out=0", *more).history[0]
        assert len(passes) == count
        assert ("kl" in line) == (count == 2)


def test_the_recipe_of_transformer_squared(settings):
    """One greedy completion of each prompt, weighed by its reward alone."""
    recipe = ["samples=1", "temperature=0", "reward_baseline=none", "max_grad_norm=1e-3", "lr=2e-3", "method=svf"]
    first, again = (
        run(settings, f"output=out{i}", "max_steps=2", "held_out=0", "reward=tiny_rewards:signed", *recipe)
        for i in range(2)
    )
    assert [line["reward"] for line in first.history] == [line["reward"] for line in again.history]
    assert all(torch.equal(value, values(again)[key]) for key, value in values(first).items())
    moved = torch.cat([(value - 1).flatten() for value in values(first).values()])
    assert moved.any()
    assert moved.abs().max() < 2 * 2.1e-3  # Adam's steps


def test_recomputed_activations_give_the_same_adapter(settings):
    kept, again = (run(settings, f"output={o}", "max_steps=2", *m) for o, m in [("a", []), ("b", CHECKPOINTING)])
    for key, tensor in values(kept).items():
        torch.testing.assert_close(tensor, values(again)[key], atol=1e-5, rtol=1e-5)


def test_resuming_gives_the_same_adapter_bit_for_bit(settings):
    whole = values(run(settings, "output=whole", "max_steps=8"))
    part = [*settings, "output=part", "max_steps=8"]
    original = trainer_module.AdapterTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(part)
    resumed = values(run(part, "resume=true"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    with pytest.raises(SpectuneError, match="with another samples"):
        run(part, "resume=true", "samples=4")


def test_an_environment_by_name_with_its_own_reward(settings, tmp_path):
    sums = ["environment=chain_sum", "environment_options={max_terms: 2, max_digits: 1}", "problems=40"]
    general = [s for s in settings if not s.startswith(("data=", "reward="))]
    config = load_config(None, [*general, *sums, "output=out", "max_steps=2", "eval_steps=1"])
    records, held = make_task(config).read()
    assert len(held) == 10
    assert not {r["prompt"] for r in records} & {r["prompt"] for r in held}
    result = train(config)
    assert {"reward", "exact_match", "length"} == result.after.keys()


def test_going_on_from_an_adapter(settings, tmp_path, model_folder):
    sft = [f"model={model_folder}", "data=sft.jsonl", "dtype=fp32", "device=cpu", "held_out=0.25", "max_steps=5"]
    lines = [{"prompt": f"what is {n}", "completion": "ahoy"} for n in NUMBERS * 2]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = run(sft, "output=first", "method=lora:rank=2,alpha=4")
    second = run(sft, "output=second", "adapter=first")
    assert second.before["loss"] == pytest.approx(first.after["loss"], rel=1e-4)
    assert second.after["loss"] < first.after["loss"]
    assert spectune.Adapter.load("second").layers.keys() == first.adapter.layers.keys()
    assert "method: lora:rank=2,alpha=4" in (tmp_path / "second" / "config.yaml").read_text()
    third = run(settings, "output=third", "adapter=first", "max_steps=1", "lr=1e-9")
    for key, tensor in values(third).items():
        torch.testing.assert_close(tensor, values(first)[key], atol=1e-6, rtol=0)
    with pytest.raises(SpectuneError, match="method svf is given, and the adapter in first is lora"):
        run(sft, "output=fourth", "adapter=first", "method=svf")
    with pytest.raises(SpectuneError, match="targets cannot change"):
        run(sft, "output=fourth", "adapter=first", "targets=[q_proj]")


def test_a_reward_that_fails_names_what_is_kept(settings, tmp_path):
    message = r"reward tiny_rewards:fails_late returned 1 values; .*at step 8; the last good checkpoint is .*-5"
    with pytest.raises(SpectuneError, match=message):
        run(settings, "output=out", "reward=tiny_rewards:fails_late", "max_steps=20", "batch_size=8")
    assert spectune.Adapter.load(tmp_path / "out" / "checkpoint-5").layers


def test_rewards_that_never_differ_are_told_once(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(settings, "output=out", "reward=tiny_rewards:nothing", "max_steps=22", "max_new_tokens=1", "held_out=0")
    assert len([w for w in caught if "nothing to learn from" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["environment=chain_sum"], "data and environment are both given"),
        (["reward=null"], "needs a reward"),
        (["task=sft"], "reward is a key of task: reinforce"),
        (["reward=tiny_rewards:ahoi"], "has no 'ahoi'; did you mean 'ahoy'"),
        (["max_new_tokens=64"], "no prompt leaves room for 64 new tokens within 64"),
        (["samples=1"], "samples: 1 has no others to be measured against: .*reward_baseline: none"),
        (["samples=0"], "samples: .*greater than or equal to 1"),
        (["temperature=0"], "temperature: 0 draws the same completion each time: give samples: 1"),
        (["reward_baseline=none", "normalize_rewards=true"], "leave out reward_baseline: none"),
    ],
)
def test_mistakes(settings, more, message):
    with pytest.raises(SpectuneError, match=message):
        run(settings, "output=out", *more)


def test_it_does_not_shard(settings, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    task = make_task(load_config(None, [*settings, "output=out", "fsdp=true"]))
    with pytest.raises(SpectuneError, match="fsdp does not go with task: reinforce"):
        task.load([], [])


def test_records_of_another_form(settings, tmp_path):
    for record, message in [({"text": "a"}, "it needs 'prompt'"), ({"prompt": [{"role": "user"}]}, "prompt must be")]:
        (tmp_path / "bad.jsonl").write_text(json.dumps(record))
        with pytest.raises(SpectuneError, match=message):
            run(settings, "output=out", "data=bad.jsonl")


def test_a_full_disk_at_an_evaluation_is_one_sentence(settings, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(policy_trainer, "write_atomically", full)
    with pytest.raises(SpectuneError, match=r"outcomes/step-0.jsonl cannot be written \(No space left.*no checkpoint"):
        run(settings, f"output={tmp_path / 'out'}", "max_steps=1")
