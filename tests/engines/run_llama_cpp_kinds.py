"""Have llama.cpp answer with LoRA over a random model of each kind that is exported to it, beside the model itself.

    python tests/engines/run_llama_cpp_kinds.py LLAMA_CPP [--python PYTHON]

LLAMA_CPP is a folder of llama.cpp's sources (the package llama-cpp-python brings them under `vendor/llama.cpp`), whose
`convert_hf_to_gguf.py` makes GGUF files of the models, all with SmolLM2's tokenizer.  How far the log-probabilities of
the likeliest tokens after each prompt are apart is written to `tests/engines/llama_cpp_kinds.json`, and the exit code
is 1 if that is more than llama.cpp's rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from run_llama_cpp import HERE, LLAMA_CPP, PROMPTS, environment, likelihoods

import spectune
from spectune.bases.places import model_path

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "vocab_size": 49152}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "mistral", "granite", "smollm3", "qwen2", "olmo2", "starcoder2")},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "tie_word_embeddings": True},
}
ROUNDING = 0.01  # of log-probabilities of some -5; keys and values are float16 there
# kinds whose tokenizers are otherwise than SmolLM2's are written with it all the same
CONVERT = """
import runpy, sys
sources = sys.argv[1]
sys.path[:0] = [sources, sources + "/gguf-py"]
from conversion import base, gemma
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
for known in vars(gemma).values():
    if isinstance(known, type) and issubclass(known, base.TextModel) and "set_vocab" in vars(known):
        known.set_vocab = base.TextModel._set_vocab_gpt2
sys.argv = ["convert", *sys.argv[2:]]
runpy.run_path(sources + "/convert_hf_to_gguf.py", run_name="__main__")
"""
ASK = """
import json, sys, xllamacpp
asked, said = json.load(open(sys.argv[1])), {}
for name, (model, adapters) in asked["runs"].items():
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads = model, 128, 1, 1
    p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    server, said[name] = xllamacpp.Server(p), []
    for prompt in asked["prompts"]:
        how = {"max_tokens": 1, "temperature": 0, "logprobs": 10}
        told = server.handle_completions({"prompt": prompt, **how})["choices"][0]["logprobs"]
        # none where the likeliest token is a part of a character
        said[name].append([[t["id"], t["logprob"]] for t in told["content"][0]["top_logprobs"]] if told else [])
json.dump(said, open(sys.argv[2], "w"))
"""


def made(kind: str, tokenizer: Any, folder: Path, sources: Path) -> Any:
    """Return a random model of a kind, whose GGUF file is then in the folder."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {**(SIZES if kind != "gpt2" else {}), **MORE, **ends, **KINDS[kind]}
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # so that some tokens are likelier than others
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({"n_ctx": 256, **config}), encoding="utf-8")
    command = [sys.executable, "-c", CONVERT, str(sources), str(folder), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(folder / "base.gguf")], check=True, stderr=subprocess.DEVNULL)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--python", type=Path)
    given = parser.parse_args()
    python, tokenizer = given.python or environment(), tf.AutoTokenizer.from_pretrained(model_path("smollm2-135m"))
    runs, ours = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            folder = Path(place, kind)
            model = made(kind, tokenizer, folder, given.sources)
            ours[f"{kind} base"] = likelihoods(model, tokenizer)
            spectune.adapt(model, "lora:rank=2,alpha=3")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".adapters." in name:
                        parameter += 0.1 * torch.randn(parameter.shape)
            ours[f"{kind} lora"] = likelihoods(model, tokenizer)
            spectune.extract(model).export(folder / "lora", "gguf", config=model.config)
            base = str(folder / "base.gguf")
            runs[f"{kind} base"] = (base, [])
            runs[f"{kind} lora"] = (base, [str(folder / "lora" / "adapter.gguf")])
        asked, told = Path(place, "asked.json"), Path(place, "said.json")
        asked.write_text(json.dumps({"runs": runs, "prompts": PROMPTS}), encoding="utf-8")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([str(python), "-c", ASK, str(asked), str(told)], check=True, **quiet)
        said = json.loads(told.read_text(encoding="utf-8"))
    table: dict[str, dict[str, float]] = {}
    for name, tops in said.items():
        kind, _, what = name.partition(" ")
        off = [abs(value - float(ours[name][i, token])) for i, top in enumerate(tops) for token, value in top]
        table.setdefault(kind, {})[what] = round(max(off), 5) if off else float("nan")
    for kind, found in table.items():
        found["moved"] = round(float((ours[f"{kind} lora"] - ours[f"{kind} base"]).abs().max()), 3)
    result = {"llama.cpp": LLAMA_CPP, "kinds": table}
    (HERE / "llama_cpp_kinds.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(any(found["lora"] > ROUNDING for found in table.values()))


if __name__ == "__main__":
    main()
