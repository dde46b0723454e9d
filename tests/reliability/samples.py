"""Sound files of every kind that spectune reads, made anew and small."""

from __future__ import annotations

import dataclasses
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import spectune
from spectune import Adapter, Library
from spectune.compare.config import CompareConfig
from spectune.compare.trial import Results, Trial
from spectune.planning.machine import Machine, _key
from spectune.spectral import Request, decompose_many
from spectune.spectrum.ledger import Ledger
from spectune.training.config import load_config
from spectune.training.record import write_run
from spectune.training.trainer import checkpoint_files
from training.folder import save_folder

W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TRIAL = Trial("svf", 1e-3, 0, "final")
PAIRS = [{"prompt": f"what is {n}", "completion": f"ahoy {n}"} for n in ("one", "two", "three", "four")]


def network() -> torch.nn.Sequential:
    """Return the model that every adapter here is of."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 5)).eval()


@cache
def adapter(method: str, seed: int, **options: Any) -> Adapter:
    """Return an adapter with values of its own."""
    model = network()
    spectune.adapt(model, method, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return spectune.extract(model)


def whole() -> Adapter:
    """Return an adapter that brings a norm whole."""
    return adapter("svf", 2, modules_to_save=("1",))


def labelled() -> Adapter:
    """Return an adapter with labels."""
    found = adapter("lora:rank=1", 5)
    found.labels = ("cat", "dog")
    return found


def _peft(place: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    common = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "b", "task_type": "CAUSAL_LM"}
    (place / "adapter_config.json").write_text(json.dumps({**common, **config}))
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})


def _factors(names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, torch.Tensor]:
    layers = {f"base_model.model.model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")}
    return {
        f"{layer}.{name}": torch.ones(shape)
        for layer in sorted(layers)
        for name, shape in zip(names, ((2, 4), (3, 2)), strict=True)
    }


def peft(place: Path) -> None:
    """Write a LoRA as PEFT does, with patterns."""
    more = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 8.0},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
    }
    _peft(place, _factors(), **more)


def peft_adalora(place: Path) -> None:
    """Write an AdaLoRA as PEFT does."""
    tensors = _factors(("lora_A", "lora_B"))
    for key in [key for key in tensors if key.endswith("lora_A")]:
        tensors[key.removesuffix("A") + "E"] = torch.ones(2, 1)
        tensors[key.removesuffix("lora_A") + "ranknum"] = torch.tensor(2.0)
    _peft(place, tensors, peft_type="ADALORA", init_r=2, target_r=2)


def peft_bin(place: Path) -> None:
    """Write a LoRA as PEFT's earlier releases pickled it."""
    _peft(place, _factors())
    (place / "adapter_model.safetensors").unlink()
    torch.save(_factors(), place / "adapter_model.bin")


def library(place: Path) -> None:
    """Write a library of two adapters."""
    found = Library(place)
    found.add("one", adapter("svf", 1), prompts=["a prompt", "another"])
    found.add("two", adapter("lora_xs:rank=2", 2), "what it is for")


def run_yaml(place: Path) -> None:
    """Write the configuration of a run, with a value for most keys."""
    (place / "run.yaml").write_text(
        "model: m\ndata: [a.jsonl, {path: b.jsonl, weight: 2}]\noutput: o\nmethod: 'svf'\ntargets: [q_proj, v_proj]\n"
        "exclude: lm_head\noverrides: {q_proj: 'lora:rank=2', v_proj: null}\nlr: 1.0e-3\ngroup_lr: {z: 0.1}\n"
        "rank_pattern: {q_proj: 4}\nlayers_to_transform: [0]\nmodules_to_save: {embed: [1, 2]}\nseed: 1\n"
        "columns: {prompt: question}\nreport_to: [tensorboard]\nwarmup: 0.1\nmax_steps: 3\n"
    )


def compare_yaml(place: Path) -> None:
    """Write the configuration of a comparison."""
    (place / "run.yaml").write_text(
        "model: m\ndata: d\noutput: o\nmethods: [svf, 'lora:rank=2', base]\nseeds: 3\nmax_steps: 4\n"
    )


def run_folder(place: Path) -> None:
    """Write what a run folder says of its run."""
    config = load_config(None, ["model=m", "output=o", "data=d"])
    write_run(config, place, PAIRS, {})
    adapter("svf", 1).save(place)
    (place / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.5}) + "\n" for n in range(4)))


def training(place: Path) -> None:
    """Write a checkpoint of a run."""
    folder = place / "checkpoint-4"
    adapter("svf", 1).save(folder)
    save_file({"a.adapters.default.0.z": torch.ones(3)}, folder / checkpoint_files.STATE)
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}, folder / "optimizer.pt")
    torch.save({"last_epoch": 4}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 1.0, "log_history": []}))
    (folder / checkpoint_files.MANIFEST).write_text(json.dumps({"sha256": checkpoint_files.digests(folder)}))


def results(place: Path) -> None:
    """Write results of a comparison."""
    written = Results(place, "x")
    written.put(TRIAL, {"error": None, "test": {"loss": 1.0}, "steps": 4, "method": "svf"})
    written.put(Trial("base", None, 0, "final"), {"error": None, "test": {"loss": 2.0}})
    config = load_config(None, ["model=m", "data=d", f"output={place}", "methods=[svf]"], CompareConfig)
    (place / "settings.json").write_text(json.dumps({**json.loads(json.dumps(config.settings())), "records": "y"}))


def ledger(place: Path) -> None:
    """Write lines of a spectrum."""
    book = Ledger(place / "ledger.jsonl", {"format": 1})
    for name in "abc":
        book.add(name, {"values": [1.0] * 3})


def checkpoint(place: Path) -> None:
    """Write two shards of a checkpoint with an index."""
    names = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(2) for kind in "qv"]
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: W.clone() for name in part}, place / f"model-{i}.safetensors", {"format": "pt"})
    where = {name: f"model-{i // 2}.safetensors" for i, name in enumerate(names)}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def gguf(place: Path) -> None:
    """Write a GGUF file of two matrices."""
    from gguf import GGUFWriter

    writer = GGUFWriter(place / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight"):
        writer.add_tensor(name, W.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def jsonl(place: Path) -> None:
    """Write records one a line, of three shapes."""
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ahoy"}]}
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (chat, chat, *PAIRS)))


def json_list(place: Path) -> None:
    """Write records as one JSON document."""
    (place / "data.json").write_text(json.dumps({"data": PAIRS}))


def csv(place: Path) -> None:
    """Write a table of texts and labels."""
    (place / "data.csv").write_text('text,label\n"good, really",pos\nbad,neg\n"a ""quoted"" one",neg\n')


def packed(place: Path) -> None:
    """Write records one a line, packed."""
    (place / "data.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in PAIRS).encode(), mtime=0))


def prompts(place: Path) -> None:
    """Write prompts one a line."""
    (place / "prompts.txt").write_text("hello\nwhat is it?\n")


def decompositions(place: Path) -> None:
    """Write a cache of one decomposition."""
    decompose_many({"w": W}, Request("full"), cache=place)


def bodies(place: Path) -> None:
    """Write bodies of requests to a server."""
    common = {"model": "a", "max_tokens": 4, "temperature": 0.5, "stop": ["x"], "logit_bias": {"3": 1.0}, "seed": 1}
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], **common, "top_logprobs": 1}
    (place / "chat").write_text(json.dumps({**chat, "logprobs": True, "stream_options": {"include_usage": True}}))
    (place / "prompt").write_text(json.dumps({"prompt": [[1, 2], [3]], **common, "n": 2}))
    (place / "load").write_text(json.dumps({"lora_name": "a", "lora_path": "/x"}))


def texts(place: Path) -> None:
    """Write what may be said on the command line."""
    lines = ["method lora:rank=4,alpha=8,dropout=0.1,rslora=true", "method dora:inner=svft,pattern=banded,width=2"]
    lines += ["method adalora:rank=2,initial_rank=3,total_steps=10", "method svf:parametrization=sigmoid"]
    lines += ["set lr=1e-3 seed=1 targets=[q_proj] overrides={q_proj:svf} max_steps=3", "set group_lr={z:0.1} epochs=2"]
    lines += ["pattern model\\.layers\\.\\d+\\..*q_proj", "pattern (q|v)_proj", "pattern [a-z]+_proj", "pattern layers"]
    (place / "texts").write_text("\n".join(lines))


def merged(place: Path) -> None:
    """Write what tells a merged model from others."""
    (place / "spectune.json").write_text(json.dumps({"library_name": "spectune", "base": "b"}))
    (place / "model.safetensors").write_bytes(b"x")


def machine(place: Path) -> None:
    """Write the rates of a machine."""
    (place / "machine.json").write_text(json.dumps({"key": _key(), **dataclasses.asdict(Machine())}))


def base(place: Path) -> None:
    """Write a tiny model and its tokenizer."""
    save_folder(place)
