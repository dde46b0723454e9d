"""Have mlx_lm answer with exported adapters on the processor, beside the model: logits of random models in float32.

Every method on a Llama, and LoRA on a model of each kind that both know under a configuration of these sizes.

    python tests/engines/run_mlx.py [--python PYTHON]

mlx and mlx-lm come in `.venv-mlx` beside `.venv`, or an environment that is given.  How far the logits are apart is
written to `tests/engines/mlx.json`, and the exit code is 1 if that is more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import spectune

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MLX = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]
METHODS = ["lora:rank=2,alpha=3", "pissa:rank=2", "milora:rank=2", "lora_xs:rank=2", "dora:inner=lora,rank=2", "svf"]
SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
# what a kind needs beside the sizes; mlx_lm looks for what older configurations had beside `rope_parameters`
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("mistral", "qwen2", "starcoder2", "smollm3", "nemotron", "olmo2", "phi3", "granite")},
    "mamba": {},
    **{kind: {"head_dim": 8} for kind in ("qwen3", "glm4", "helium", "hunyuan_v1_dense", "seed_oss")},
    **{kind: {"num_attention_heads": 2} for kind in ("phi", "stablelm")},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
}
OLD: dict[str, Any] = {"n_ctx": 1024, "num_key_value_heads": 2}
ROUNDING = 1e-4  # logits are near 1, and adapters move them by a third
ASK = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
folder, said = Path(sys.argv[1]), {}
for name, base in json.loads(sys.argv[2]).items():
    model = load_model(folder / base)[0]
    if (folder / name).exists():
        load_adapters(model, str(folder / name))
    said[name] = model(mx.arange(1, 15)[None]).tolist()
json.dump(said, open(sys.argv[3], "w"))
"""


def environment() -> Path:
    """Return the interpreter of an environment with mlx_lm."""
    python = ROOT / ".venv-mlx" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv-mlx")], check=True)
        subprocess.run([str(python), "-m", "pip", "--quiet", "install", *MLX], check=True)
    return python


def lora_on(kind: str) -> str:
    return f"LoRA on {kind}"


def write_base(model: Any, folder: Path, kind: str) -> None:
    """Write a model as its checkpoint on the hub is written."""
    model.save_pretrained(folder)
    place = folder / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    rotation = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **(config.get("rope_parameters") or {})}
    rotation = {key: rotation[key] for key in ("rope_theta", "partial_rotary_factor")}
    place.write_text(json.dumps({**OLD, **rotation, **config}), encoding="utf-8")
    if kind == "gpt2":
        weights = load_file(folder / "model.safetensors")
        named = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})


def trained(base: Any, method: str) -> Any:
    """Return an adapted copy whose adapter has values of its own."""
    model = spectune.adapt(copy.deepcopy(base), method)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path)
    given = parser.parse_args()
    python = given.python or environment()
    torch.manual_seed(0)
    ids = torch.arange(1, 15)[None]
    expected, bases = {}, {}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        for kind in ("llama", *KINDS):
            sizes = {**SIZES, **KINDS.get(kind, {})}
            base = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **sizes)).eval()
            write_base(base, folder / f"{kind}.base", kind)
            expected[kind] = base(ids, use_cache=False).logits
            for method in METHODS if kind == "llama" else METHODS[:1]:
                model, name = trained(base, method), method if kind == "llama" else lora_on(kind)
                expected[name] = model(ids, use_cache=False).logits
                spectune.extract(model).export(folder / name, "mlx", config=base.config)
                bases[name] = kind
        said, asked = folder / "said.json", {name: f"{bases.get(name, name)}.base" for name in expected}
        subprocess.run([str(python), "-c", ASK, str(folder), json.dumps(asked), str(said)], check=True)
        answered = json.loads(said.read_text(encoding="utf-8"))
    off = {name: float((torch.tensor(answered[name]) - logits).abs().max()) for name, logits in expected.items()}
    moved = {name: float((expected[name] - expected[base]).abs().max()) for name, base in bases.items()}
    kinds = {kind: {"base": off[kind], "lora": off[lora_on(kind)], "moved": moved[lora_on(kind)]} for kind in KINDS}
    methods = {"(base)": off["llama"], **{method: off[method] for method in METHODS}}
    result = {"mlx": MLX, "off": methods, "moved": {method: moved[method] for method in METHODS}, "kinds": kinds}
    (HERE / "mlx.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(max(off.values()) > ROUNDING)


if __name__ == "__main__":
    main()
