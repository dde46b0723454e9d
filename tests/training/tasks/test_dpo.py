"""The loss of preference pairs is DPO's, packed or padded, and a run learns the preference."""

import json
import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import spectune
from spectune.errors import SpectuneError
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.parts import training_parts
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks.dpo import Dpo
from training.folder import make_model, make_tokenizer, save_folder
from training.trainer.test_checkpoints import PLAINLY, settings

TURNS = [
    {"role": "user", "content": "say"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "a"},
]
PAIRS = [
    {"prompt": "one plus two is", "chosen": "three", "rejected": "the four and five"},
    {"prompt": "say", "chosen": "hello and ahoy and hello", "rejected": "ahoy"},
    {
        "prompt": TURNS,
        "chosen": [{"role": "assistant", "content": "ahoy"}],
        "rejected": [{"role": "assistant", "content": "the two"}],
    },
]


def make(**more):
    return Dpo(load_config(None, ["model=m", "data=d", "output=o", "task=dpo", *(f"{k}={v}" for k, v in more.items())]))


@pytest.fixture(scope="module")
def models():
    """A base and the same model with an adapter that does something."""
    base, model = make_model().eval(), make_model().eval()
    spectune.adapt(model, "svf")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return base, model


def log_probability(model, example):
    logits = model(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
    each = logits.gather(1, torch.tensor(example.tokens[1:])[:, None])[:, 0]
    return (each * torch.tensor(example.supervised[1:])).sum()


def independent(base, model, pairs, beta):
    """Return h of each pair times beta, one sequence at a time and with two models."""
    ratio = {True: [], False: []}
    for pair in pairs:
        for example, chosen in ((pair.chosen, True), (pair.rejected, False)):
            ratio[chosen].append(log_probability(model, example) - log_probability(base, example))
    return beta * (torch.stack(ratio[True]) - torch.stack(ratio[False]))


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_one_computed_one_sequence_at_a_time(models, padded, monkeypatch):
    task, tokenizer = make(beta=0.3), make_tokenizer()
    base, model = models
    pairs = task.encode(PAIRS, model, tokenizer, 64).examples
    if padded:
        monkeypatch.setattr("spectune.training.data.packing.PACKED_LIMIT", 0)
    batch = task.collator(model, tokenizer)(pairs)
    assert ("position_ids" in batch) != padded
    sums = task.sums(model, dict(batch))
    h = independent(base, model, pairs, 0.3)
    torch.testing.assert_close(sums["loss"], -F.logsigmoid(h).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums["reward_margin"], h.sum().detach(), atol=1e-4, rtol=1e-4)
    measures = task.metrics({key: value.detach() for key, value in sums.items()})
    assert measures["reward_accuracy"] == pytest.approx(float((h > 0).float().mean()))
    assert measures["reward_margin"] == pytest.approx(measures["reward_chosen"] - measures["reward_rejected"], abs=1e-5)
    sums["loss"].backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (-F.logsigmoid(independent(base, model, pairs, 0.3)).sum()).backward()
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


START = [
    ("llama", "lora:rank=4", "all-linear"),
    ("llama", "lora:rank=4", ["down_proj"]),  # layers before the first adapter have no gradients
    ("llama", "svf", "all-linear"),  # through the factors of W
    ("llama", "dora:inner=svf", "all-linear"),
    ("llama", "svft:pattern=banded,width=2", "all-linear"),
    ("llama", "dora:rank=4,dropout=0.2", "all-linear"),
    ("qwen2", "dora:rank=4", "all-linear"),  # a ratio, and a bias behind it
    ("gpt2", "lora:rank=4", "all-linear"),  # dropout of its own
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "method", "targets"), START)
def test_an_adapter_that_does_nothing_yet_starts_at_the_base_to_the_bit(kind, method, targets, dtype):
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    model: Any
    if kind == "llama":
        model = make_model()
    elif kind == "qwen2":
        config = {key: getattr(make_model().config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config, **sizes))
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = spectune.adapt(model.to(dtype), method, targets, factored=True)
    checkpoint_activations(model, "selective")
    task = make(beta=1.0)
    batch = task.collator(model, tokenizer)(task.encode(PAIRS, model, tokenizer, 64).examples)
    with training_parts(model, task.dropout):
        learning = task.sums(model.train(), dict(batch))
        learning["loss"].backward()
        with torch.no_grad():
            judged = task.sums(model.eval(), dict(batch))
    for sums in (learning, judged):
        assert float(sums["reward_chosen"]) == float(sums["reward_rejected"]) == float(sums["reward_margin"]) == 0
        assert float(sums["loss"].detach()) == pytest.approx(len(PAIRS) * math.log(2), abs=1e-6)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    if kind == "gpt2":
        assert model.config.resid_pdrop == model.transformer.h[0].mlp.dropout.p == 0.1  # as it was


def test_smoothed_hinge_and_ipo_losses(models):
    base, model = models
    tokenizer = make_tokenizer()
    pairs = make().encode(PAIRS, model, tokenizer, 64).examples
    h = independent(base, model, pairs, 0.5)
    lengths = [[sum(e.supervised[1:]) for e in pair] for pair in pairs]
    ratios = [[log_probability(model, e) - log_probability(base, e) for e in pair] for pair in pairs]
    ipo = [(r[0] / n[0] - r[1] / n[1] - 1) ** 2 for r, n in zip(ratios, lengths, strict=True)]
    expected = {
        (("label_smoothing", 0.2),): -(0.8 * F.logsigmoid(h) + 0.2 * F.logsigmoid(-h)).sum(),
        (("dpo_loss", "hinge"),): F.relu(1 - h).sum(),
        (("dpo_loss", "ipo"),): sum(ipo),
    }
    for options, loss in expected.items():
        task = make(beta=0.5, **dict(options))
        sums = task.sums(model, task.collator(model, tokenizer)(pairs))
        torch.testing.assert_close(sums["loss"], loss, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # by TRL
def test_trl_finds_the_same_loss(models, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer, task = models[1], make_tokenizer(), make(beta=0.1)
    batch = task.collator(model, tokenizer)(task.encode(PAIRS[:2], model, tokenizer, 64).examples)
    with torch.no_grad():
        sums = task.sums(model, batch)
    as_trl_reads = [{**pair, "chosen": f" {pair['chosen']}", "rejected": f" {pair['rejected']}"} for pair in PAIRS[:2]]
    data = Dataset.from_list(as_trl_reads)
    trainer = DPOTrainer(
        model,
        spectune.Reference(model),
        args=DPOConfig(**settings(tmp_path, per_device_eval_batch_size=2, **PLAINLY)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    trainer.evaluate()
    found = trainer.state.log_history[-1]
    assert found["eval_loss"] == pytest.approx(float(sums["loss"] / 2), rel=1e-4)
    assert found["eval_rewards/margins"] == pytest.approx(task.metrics(sums)["reward_margin"], rel=1e-3)
    vars(model).pop("forward", None)  # TRL's own, of this instance, in some versions


def learned(example, tokenizer):
    return tokenizer.decode([t for t, s in zip(*example, strict=True) if s]).replace("</s>", "").split()


def test_only_what_differs_is_learned_in_every_form():
    task, tokenizer = make(), make_tokenizer()
    whole = {key: [*TURNS, *PAIRS[2][key]] for key in ("chosen", "rejected")}
    text = {"chosen": "what is one say ahoy", "rejected": "what is one say hello and"}
    encoded = task.encode([PAIRS[2], whole, text], None, tokenizer, 64)
    explicit, implicit, words = encoded.examples
    assert explicit == implicit
    assert [learned(e, tokenizer) for e in explicit] == [["ahoy"], ["the", "two"]]
    assert [learned(e, tokenizer) for e in words] == [["ahoy"], ["hello", "and"]]


def test_pairs_without_a_preference_or_beyond_the_limit_are_counted():
    task, tokenizer = make(), make_tokenizer()
    same = {"prompt": "say", "chosen": "ahoy", "rejected": "ahoy"}
    long = {"prompt": "one " * 20, "chosen": "ahoy", "rejected": "hello"}
    encoded = task.encode([PAIRS[0], same, long], None, tokenizer, 12)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (1, 1, 2)
    with pytest.raises(SpectuneError, match="no pair has a chosen and another rejected completion"):
        task.encode([same], None, tokenizer, 12)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "one"}, "has the keys 'text'; it needs 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "one", "chosen": "a", "rejected": 3}, "must all be text"),
        ({"prompt": TURNS, "chosen": [{"role": "user", "content": "a"}], "rejected": TURNS}, None),
        ({"chosen": TURNS[:1], "rejected": TURNS}, "chosen: messages has no assistant turn"),
    ],
)
def test_forms(record, message):
    problem = make().problem(record)
    assert (problem is None) if message is None else (message in problem)


def test_a_run_learns_the_preference_and_resumes(tmp_path):
    model = save_folder(tmp_path / "model")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = [{"prompt": f"say {w}", "chosen": f"ahoy {w}", "rejected": f"hello {w}"} for w in words * 2]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    keys = [f"model={model}", f"data={data}", "task=dpo", "held_out=0.2", "dtype=fp32", "device=cpu", "batch_size=4"]
    keys += ["method=lora:rank=2", "lr=1e-2", "save_steps=5"]
    result = train(load_config(None, [*keys, f"output={tmp_path / 'out'}", "max_steps=10"]))
    assert result.before["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert result.before["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert result.after["reward_accuracy"] == 1
    assert result.after["reward_margin"] > 0.3
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_reward_accuracy"] == 1
    shutil.rmtree(tmp_path / "out" / "checkpoint-10")
    again = train(load_config(None, [*keys, f"output={tmp_path / 'out'}", "max_steps=10", "resume=true"]))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(again.adapter.delta(name), result.adapter.delta(name))
