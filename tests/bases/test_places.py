"""Where a base model lies: what is no folder and no name is told, and a folder is looked at before it is read."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.bases import places
from spectune.bases.places import model_path
from spectune.errors import SpectuneError
from training.folder import save_folder


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model")


def test_a_folder_is_known_from_anywhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert model_path("model") == model_path(Path("model")) == model_path("./model/") == str(folder)


def test_ids_of_the_hub_are_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_path("somebody/some-model") == "somebody/some-model"
    save_folder(tmp_path / "somebody" / "some-model")
    assert model_path("somebody/some-model") == str(tmp_path / "somebody" / "some-model")


def test_names_that_nothing_has(folder):
    with pytest.raises(SpectuneError, match=r"there is no model folder '.*/modle'; did you mean 'model'\?"):
        model_path(folder.parent / "modle")
    for name in ("./nothing", "../nothing", "~/nothing", "a/b/c"):
        with pytest.raises(SpectuneError, match=f"^there is no model folder '{name}'"):
            model_path(name)
    with pytest.raises(SpectuneError, match="unknown model 'smollm2'; did you mean 'smollm2-135m'"):
        model_path("smollm2")
    with pytest.raises(SpectuneError, match=r"^unknown model 'minilm-16'; did you mean 'minilm-l6'.* \(embedded: "):
        model_path("minilm-16")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SpectuneError, match="holds an adapter and no model: name its base here, and the adapter besi"):
        model_path(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a model, with an adapter in the same folder
    assert model_path(tmp_path) == str(tmp_path)


def test_what_transformers_would_not_end_reading_is_refused(folder, monkeypatch):
    monkeypatch.setattr(places, "BASE_JSON_BYTES", 64)
    with pytest.raises(SpectuneError, match=r"\.json"):
        model_path(folder)
    (folder / "pipe").mkdir()
    monkeypatch.undo()
    os.mkfifo(folder / "pipe" / "chat.jinja")
    with pytest.raises(SpectuneError, match=r"chat\.jinja"):
        model_path(folder)


def test_a_link_to_nothing(folder):
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(folder / "gone")
    with pytest.raises(SpectuneError, match=r"generation_config\.json is not there, as the folder's listing says"):
        model_path(folder)


def test_shards_outside_of_the_folder_are_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(SpectuneError, match=r"other\.safetensors"):
        model_path(folder)


def test_a_state_with_an_adapter_beside_is_no_base(folder):
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj"
    more = {f"{key}.adapters.default.0.A": torch.zeros(2, 32), f"{key}.adapters.default.0.B": torch.zeros(48, 2)}
    save_file({**tensors, **more}, folder / "model.safetensors")
    with pytest.raises(SpectuneError, match=r"holds a base and an adapter's tensors beside it.*extract\(model\)\.save"):
        model_path(folder)


def test_a_file_that_is_no_safetensors_is_left_to_who_loads_it(folder):
    (folder / "other.safetensors").write_bytes((9).to_bytes(8, "little") + b"no header")
    assert model_path(folder) == str(folder)
