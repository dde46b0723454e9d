"""Have mlx_lm answer with exported adapters on the processor, beside the model: logits of a random Llama in float32.

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

import spectune

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MLX = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]
METHODS = ["lora:rank=2,alpha=3", "pissa:rank=2", "milora:rank=2", "lora_xs:rank=2", "dora:inner=lora,rank=2", "svf"]
SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
}
ROUNDING = 1e-5
ASK = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
folder, said = Path(sys.argv[1]), {}
for name in json.loads(sys.argv[2]):
    model = load_model(folder / "base")[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path)
    given = parser.parse_args()
    python = given.python or environment()
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
    ids = torch.arange(1, 15)[None]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        base.save_pretrained(folder / "base")
        expected = {"(base)": base(ids).logits}
        for method in METHODS:
            model = spectune.adapt(copy.deepcopy(base), method)
            for name, parameter in model.named_parameters():
                if ".adapters." in name:
                    parameter += 0.1 * torch.randn(parameter.shape)
            expected[method] = model(ids).logits
            spectune.extract(model).export(folder / method, "mlx")
        said = folder / "said.json"
        subprocess.run([str(python), "-c", ASK, str(folder), json.dumps(list(expected)), str(said)], check=True)
        answered = json.loads(said.read_text(encoding="utf-8"))
    off = {name: float((torch.tensor(answered[name]) - logits).abs().max()) for name, logits in expected.items()}
    moved = {name: float((logits - expected["(base)"]).abs().max()) for name, logits in expected.items()}
    result = {"mlx": MLX, "off": off, "moved": moved}
    (HERE / "mlx.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(max(off.values()) > ROUNDING)


if __name__ == "__main__":
    main()
