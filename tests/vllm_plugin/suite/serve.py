"""Every method's adapter through vLLM, the base and all of them in one batch: the same greedy tokens as `generate`.

Run by `run.py` in an environment with vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spectune
from spectune.layers.adapted import adapted_layers
from spectune.methods import parse

HERE = Path(__file__).parent
LENGTH = 12
METHODS = {
    "svf": "svf",
    "svf_sigmoid": "svf:parametrization=sigmoid",
    "svft_plain": "svft:pattern=plain",
    "svft_banded": "svft:pattern=banded,width=1",
    "svft_random": "svft:pattern=random,width=1",
    "svft_top_k": "svft:pattern=top_k,width=1",
    "lora_xs": "lora_xs:rank=4",
    "lora": "lora:rank=4",
    "rslora": "lora:rank=4,alpha=8,rslora=true",
    "pissa": "pissa:rank=4",
    "milora": "milora:rank=4",
    "adalora": "adalora",
    "dora": "dora:rank=4",
}
PROMPTS = [[5, 6, 7, 8], [100, 30, 2], [9, 4] * 12]


def make_base(folder: Path, width: int = 128, layers: int = 2) -> Path:
    """Write a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,  # heads of 32, at the least, which kernels for CPUs have
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapters(model: Any, folder: Path, methods: dict[str, str]) -> dict[str, Path]:
    """Write an adapter of each method, moved by so much that its tokens are others than the base's."""
    torch.manual_seed(1)
    found = {}
    for name, method in methods.items():
        try:
            spectune.adapt(model, method, name=name)
        except spectune.SpectuneError as error:
            print(f"{name}: {error}")
            continue
        move(model, name)
        found[name] = folder / name
        spectune.extract(model, name).save(found[name])
    return found


def move(model: Any, name: str, by: float = 0.3) -> None:
    """Give an adapter random values."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.adapters[name].parameters():
                p.add_(by * torch.randn_like(p) * max(float(p.abs().mean()), 0.3))


def alone(model: Any, name: str | None) -> list[list[int]]:
    """Return what `generate` says to each prompt."""
    spectune.activate(model, name)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def engine(base: Path, **options: Any) -> Any:
    """Return vLLM with the base."""
    from vllm import LLM

    given = {
        "distributed_executor_backend": "uni",
        "max_loras": 16,
        "max_cpu_loras": 32,
        "max_lora_rank": 16,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
    }
    return LLM(
        str(base),
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_model_len=256,
        **{**given, **options},
    )


def compile_all_the_same() -> None:
    """Have vLLM compile on a processor, in the pieces that CUDA graphs would be made of.

    It compiles nothing there where LoRA is on, since what its own LoRA does on a processor cannot be traced.
    """
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        compiled = config.compilation_config
        compiled.mode, compiled.backend, compiled.compile_sizes = CompilationMode.VLLM_COMPILE, "eager", []

    CpuPlatform.check_and_update_config = staticmethod(checked)


def check_pieces(layers: int) -> None:
    """Raise unless the model is split at the cores of its four linear layers and at attention, layer by layer."""
    from vllm.compilation.counter import compilation_counter as found

    between = found.num_piecewise_graphs_seen - found.num_piecewise_capturable_graphs_seen
    assert between == 5 * layers, found


def answer(llm: Any, rows: list[tuple[str | None, int]], folders: dict[str, Path]) -> list[list[int]]:
    """Return the tokens of (adapter, prompt)s, in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    numbers = {name: i + 1 for i, name in enumerate(folders)}
    requests = [None if n is None else LoRARequest(n, numbers[n], str(folders[n])) for n, _ in rows]
    sampling = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": PROMPTS[i]} for _, i in rows], sampling, lora_request=requests)
    return [list(one.outputs[0].token_ids) for one in out]


def check(llm: Any, model: Any, folders: dict[str, Path], near: Collection[str] = ()) -> dict[str, str]:
    """Return for each adapter how it was served: equal, or why it was refused.

    Args:
        llm: the engine.
        model: what the adapters were made on.
        folders: of the adapters.
        near: adapters that need not be equal, of which is told how many tokens come before the first that is another.
    """
    from vllm.lora.request import LoRARequest

    told, good = {}, {}
    for name, folder in folders.items():
        try:
            llm.llm_engine.add_lora(LoRARequest(name, list(folders).index(name) + 1, str(folder)))
            good[name] = folder
        except Exception as error:  # whatever vLLM makes of it
            told[name] = f"refused: {type(error).__name__}: {error}"
    rows = [(name, i) for i in range(len(PROMPTS)) for name in (None, *good)]  # all in one batch
    wanted = {name: alone(model, name) for name in (None, *good)}
    assert all(wanted[name] != wanted[None] for name in good), "an adapter that moves nothing proves nothing"
    alike: dict[str | None, int] = Counter()
    for (name, i), tokens in zip(rows, answer(llm, rows, folders), strict=True):
        alike[name] += next(
            (n for n, two in enumerate(zip(tokens, wanted[name][i], strict=True)) if len({*two}) > 1), LENGTH
        )
        equal = tokens == wanted[name][i]
        told[name or "base"] = "equal" if equal and told.get(name or "base", "equal") == "equal" else "DIFFERS"
    for name in near:
        assert alike[name] > LENGTH * len(PROMPTS) / 2, f"{name} is far from what it was trained to be"
        if told[name] == "DIFFERS":
            told[name] = f"{alike[name]} of {LENGTH * len(PROMPTS)} tokens"
    return told


def many(llm: Any, model: Any, folder: Path, count: int) -> dict[str, Any]:
    """Load so many SVFs, and ask some of them."""
    from vllm.lora.request import LoRARequest

    spectune.adapt(model, "svf", name="many")
    start = {id(p): p.detach().clone() for x in adapted_layers(model).values() for p in x.adapters["many"].parameters()}
    asked = [i * count // 8 for i in range(8)]
    wanted, folders = {}, {}
    for i in range(count):
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                for p in layer.adapters["many"].parameters():
                    p.copy_(start[id(p)] + 0.3 * torch.randn_like(p))
        folders[f"m{i}"] = folder / f"m{i}"
        spectune.extract(model, "many").save(folders[f"m{i}"])
        if i in asked:
            wanted[f"m{i}"] = alone(model, "many")
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    for i, (name, path) in enumerate(folders.items()):
        llm.llm_engine.add_lora(LoRARequest(name, i + 1, str(path)))
    seconds = time.perf_counter() - began
    rows = [(name, i) for name in wanted for i in range(len(PROMPTS))]
    tokens = answer(llm, rows, folders)
    assert tokens == [wanted[name][i] for name, i in rows], "an adapter among many is answered otherwise than alone"
    return {
        "adapters": count,
        "values_an_adapter": sum(p.numel() for x in adapted_layers(model).values() for p in x.adapters.parameters()),
        "loaded": len(llm.llm_engine.list_loras()),
        "seconds_to_load": round(seconds, 1),
        "bytes_an_adapter": round((psutil.Process().memory_info().rss - before) / count),
    }


def write(args: argparse.Namespace, told: dict[str, Any]) -> None:
    """Write what was answered beside what other runs have found, of the base that the documentation shows."""
    if args.model:
        return
    path = HERE / "table.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = next((name for name in ("tensor_parallel", "int8", "compiled") if getattr(args, name)), None)
    found = {run: told["served"]} if run else told
    path.write_text(json.dumps({**before, **found}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="A folder with a checkpoint; a tiny random Llama if not given.")
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--tensor-parallel", action="store_true", help="In two processes, each with a part of W.")
    parser.add_argument("--compiled", action="store_true", help="Traced, and split as for piecewise CUDA graphs.")
    parser.add_argument("--int8", action="store_true", help="With singular vectors in 8 bits.")
    args = parser.parse_args()
    if args.int8:
        os.environ["SPECTUNE_VLLM_BASES"] = "int8"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = Path(args.model) if args.model else make_base(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        methods, options = METHODS, {}
        if args.tensor_parallel:  # where vLLM waits forever once an adapter was refused
            methods = {name: method for name, method in METHODS.items() if name != "dora"}
            options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        if args.compiled:
            methods = {name: method for name, method in METHODS.items() if parse(method).core_only}
            compile_all_the_same()
        folders = make_adapters(model, folder, methods)
        llm = engine(base, max_cpu_loras=max(32, args.many), **options)
        if args.compiled:
            check_pieces(model.config.num_hidden_layers)
        core_only = {name: parse(METHODS[name]).core_only for name in folders}
        near = [name for name, own in core_only.items() if own and args.int8]
        told: dict[str, Any] = {"served": check(llm, model, folders, near)}
        told |= {"methods": METHODS, "core_only": core_only}
        for name, said in told["served"].items():
            print(f"{name:12} {said}", flush=True)
        write(args, told)
        if args.many:
            spectune.detach(model)
            for number in list(llm.llm_engine.list_loras()):
                llm.llm_engine.remove_lora(number)
            told["many"] = many(llm, model, folder, args.many)
            print(told["many"], flush=True)
    with contextlib.suppress(AttributeError):
        llm.llm_engine.engine_core.shutdown()
    write(args, told)
    sys.exit("DIFFERS" in told["served"].values())


if __name__ == "__main__":
    main()
