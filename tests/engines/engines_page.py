"""docs/engines.md: what each method's adapter is in each engine, from what was exported here and what ran elsewhere.

    python tests/engines/engines_page.py

Every adapter is exported to every engine from a small random model.  What engines answered is read from what
`make test-vllm`, `make test-engines` and run_llama_cpp_kinds.py have written: tests/vllm_plugin/suite/table.json,
llama_cpp.json, llama_cpp_kinds.json, mlx.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import spectune
from spectune import Adapter, SpectuneError
from spectune.adapters.engines import ENGINES
from spectune.methods import parse

ROOT = Path(__file__).parents[2]
METHODS = {
    "lora:rank=4": "LoRA",
    "lora:rank=4,rslora=true": "rsLoRA",
    "pissa:rank=4": "PiSSA",
    "milora:rank=4": "MiLoRA",
    "lora_xs:rank=4": "LoRA-XS",
    "adalora": "AdaLoRA",
    "vera:rank=8": "VeRA",
    "svf": "SVF",
    "svft": "SVFT",
    "dora:inner=lora,rank=4": "DoRA",
    "dora:inner=svf": "DoRA around SVF",
}
SIDE = 64  # of the model's layers, which an exact LoRA of SVF has as its rank
NEAR = 16  # the rank of a LoRA that is not exact


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / name).read_text(encoding="utf-8"))


def model() -> Any:
    torch.manual_seed(0)
    sides = {"hidden_size": SIDE, "intermediate_size": 2 * SIDE, "vocab_size": 96}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sides, **heads))


def trained(method: str) -> tuple[Any, Adapter]:
    """Return a model and an adapter away from its start, bound to it."""
    base = spectune.adapt(model(), method)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=drawn)
    return base, spectune.extract(base).bind(base)


def exported(base: Any, adapter: Adapter, engine: str, folder: Path) -> str:
    """Return what an adapter is for an engine: exact, at some rank, near, or what goes as a model of its own."""
    try:
        options: dict[str, Any] = {"to": engine, "config": base.config}
        options |= {"component": "transformer"} if engine == "diffusers" else {}
        written = adapter.export(folder / engine, **options)
    except SpectuneError as error:
        if "takes no" not in str(error):
            raise
        return "merged model"
    factors = [term.trained["A"] for layer in written.layers.values() for term in layer.terms]
    rank = max(len(A) for A in factors)
    if rank < SIDE:
        return f"exact, rank {rank}"
    near = adapter.export(folder / f"{engine} near", **options, rank=NEAR, allow_loss=True)
    return f"exact at full rank; off by {near.error:.0%} at rank {NEAR}"


def rows(methods: Iterable[str]) -> list[list[str]]:
    """Return the table's lines of methods."""
    vllm, llama, mlx = read("vllm_plugin/suite/table.json"), read("engines/llama_cpp.json"), read("engines/mlx.json")
    by_kind = {
        "vllm": {name_of(vllm["methods"][key]): told for key, told in vllm["served"].items() if key in vllm["methods"]},
        "llama.cpp": {name_of(key): told.partition(";")[0] for key, told in llama["table"].items() if key != "(base)"},
        "mlx": {name_of(key): f"logits within {off:.0e}" for key, off in mlx["off"].items() if key != "(base)"},
    }
    native = {name_of(vllm["methods"][key]) for key, core in vllm["core_only"].items() if core}
    found = []
    for method in methods:
        title = METHODS[method]
        base, adapter = trained(method)
        with TemporaryDirectory() as folder:
            cells = {engine: exported(base, adapter, engine, Path(folder)) for engine in ENGINES}
        plug_in = "as it is" if title in native else cells["vllm"]
        if by_kind["vllm"].get(title) == "equal":
            plug_in += "; equal tokens"
        for engine in ("llama.cpp", "mlx"):
            ran = by_kind[engine].get(title)
            if ran is not None and not ran.startswith("refused"):
                cells[engine] += f"; {ran}"
        found.append([title, plug_in, *(cells[engine] for engine in ("sglang", "llama.cpp", "mlx", "diffusers"))])
    return found


def name_of(method: str) -> str:
    """Return the title of a method's text, whatever its rank and pattern."""
    parsed = parse(method)
    if parsed.name == "dora":
        return "DoRA" if parsed.inner.name == "lora" else f"DoRA around {parsed.inner.name.upper()}"
    titles = {parse(text).name: title for text, title in METHODS.items() if title != "rsLoRA"}
    return "rsLoRA" if getattr(parsed, "rslora", False) else titles[parsed.name]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def page(methods: Iterable[str] = METHODS) -> str:
    """Return docs/engines.md, of some methods or all."""
    vllm, llama, mlx = read("vllm_plugin/suite/table.json"), read("engines/llama_cpp.json"), read("engines/mlx.json")
    four, kinds = llama["four_bits"], read("engines/llama_cpp_kinds.json")["kinds"]
    off, moved = (_range([four[name][key] for name in four if name != "(base)"]) for key in ("off", "moved"))
    plain = ["SGLang, TGI, LoRAX, plain vLLM", "llama.cpp, Ollama", "MLX", "diffusers"]
    head = ["method", "vLLM with [the plug-in](vllm.md)", *plain]
    lines = [
        "# Engines",
        "",
        "What the adapter of each method is in other programs, written by `python tests/engines/engines_page.py`.",
        f"Each was exported from a random Llama whose layers are {SIDE} wide (`spectune export --to ENGINE`); what a",
        "program answered was compared with our own answer where the tests install the program:",
        "",
        f"- vLLM (`make test-vllm`, {vllm['vllm'].replace('==', ' ')}): greedy tokens of a random Llama in float32,",
        "  all adapters and the base in one batch;",
        f"- llama.cpp (`make test-engines`, {llama['llama.cpp'].replace('==', ' ')}): {llama['tokens']} greedy tokens",
        f"  of {llama['prompts']} prompts by SmolLM2-135M in float32;",
        f"- llama.cpp, LoRA of random models in float32 ({', '.join(kinds)}): log-probabilities",
        f"  within {max(found['lora'] for found in kinds.values()):.0e};",
        "- llama.cpp over SmolLM2-135M in four bits, whose products it rounds: log-probabilities of ten tokens",
        f"  after each prompt, off by {four['(base)']['off']:.2f} for the base, and by {off} with adapters,",
        f"  which moved them by {moved};",
        f"- MLX (`make test-engines`, {', '.join(mlx['mlx']).replace('==', ' ')}): logits of a random Llama;",
        f"  and with LoRA of {', '.join(mlx['kinds'])}, within {max(k['lora'] for k in mlx['kinds'].values()):.0e}.",
        "",
        "SGLang, TGI, LoRAX, Ollama and diffusers' pipelines read the same files, and were not run for this table.",
        "",
        "|" + "|".join(head) + "|",
        "|" + "---|" * len(head),
        *("|" + "|".join(row) + "|" for row in rows(methods)),
        "",
    ]
    if many := vllm.get("many"):
        lines += [
            f"{many['loaded']:,} SVF adapters were loaded into vLLM, {many['values_an_adapter']:,} values each,",
            f"at {many['bytes_an_adapter']:,} bytes of memory each; those that were asked answered as `generate` does.",
            "",
        ]
    lines += [
        "vLLM takes ranks of up to 512: an exact LoRA of SVF or SVFT fits layers of up to that width there. Every",
        "method, and modules trained whole, go everywhere as a merged model: `spectune export --format merged`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write it."""
    (ROOT / "docs" / "engines.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
