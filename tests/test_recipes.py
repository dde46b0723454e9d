"""Every recipe of docs/recipes.md runs as it stands there, on a tiny model and for two steps."""

import re
import shlex
from pathlib import Path

import pytest

from cli.typed import run
from training.folder import save_folder

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
_, *PARTS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {part.partition("\n")[0]: part for part in PARTS}
BASES = ("smollm2-135m", "minilm-l6")
SMALL = ["max_steps=2", "device=cpu", "held_out=0.1", "replies=1"]
MORE = {
    "train": SMALL,
    "eval": ["--device", "cpu", "--examples", "1", "--max-new-tokens", "2"],
    "generate": ["--device", "cpu", "--max-new-tokens", "2"],
    "classify": ["--device", "cpu"],
    "plan": ["--no-measure"],
    "library": [],
    "data": [],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_folder(tmp_path_factory.mktemp("model")))


def small(words):
    """Return what makes a command of a recipe small."""
    more = MORE[words[0]]
    if words[0] == "train" and "task=classify" in words:
        return [each for each in more if not each.startswith("replies")]
    if words[0] == "train" and "task=reinforce" in words:
        kept = [each for each in more if each.startswith(("max_steps", "device"))]
        return [*kept, "samples=2", "batch_size=2", "held_out=0.1", "max_new_tokens=2"]
    if words[:2] == ["library", "add"]:
        return ["--base", BASES[0]]
    return more


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, command in re.findall(
        r"```python\n(.*?)```|^    spectune ([^\n]*)$", RECIPES[name], re.DOTALL | re.MULTILINE
    ):
        if code:
            exec(code, {})
            continue
        words = shlex.split(command)
        if "quantize=nf4" in words:
            pytest.importorskip("bitsandbytes")
        words = ["smollm2-135m" if word == "llama-3-8b" else word for word in [*words, *small(words)]]
        named = [re.sub(rf"^(model=|)({'|'.join(BASES)})$", rf"\g<1>{model}", word) for word in words]
        run(*named)
    assert any(tmp_path.glob("runs/*/adapter_config.json"))
