"""sentence-transformers: trained by its trainer, saved and loaded with equal vectors; adapters by its own calls."""

import pytest
import torch
import transformers
from datasets import Dataset
from ecosystem_cases import KINDS, adapted, moved
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import models as parts
from sentence_transformers.losses import MultipleNegativesRankingLoss

import spectune
import spectune.peft
import tiny
from training.folder import make_tokenizer

SAID = ["one plus two", "say ahoy", "what is three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {**tiny.BERT, "vocab_size": len(tokenizer)}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def new(folder):
    word = parts.Transformer(folder)
    return SentenceTransformer(modules=[word, parts.Pooling(32)], device="cpu")


def encoded(model):
    return model.encode(SAID, convert_to_tensor=True)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_trained_saved_and_loaded(kind, folder, tmp_path):
    model = new(folder)
    if kind == "adapt":
        adapted(model, kind)
    elif kind == "peft":
        model.add_adapter(spectune.peft.SVFConfig(task_type="FEATURE_EXTRACTION"))
    before = encoded(model)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=2e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_dict({"anchor": SAID, "positive": SAID[::-1]})
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)).train()
    model.eval()
    after = encoded(model)
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(encoded(again), after, atol=1e-5)
    if kind == "peft":
        files = {file.name for file in (tmp_path / "saved").rglob("*")}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files


def test_its_own_calls_for_adapters(folder, tmp_path):
    model = new(folder)
    base = encoded(model)
    model.add_adapter(spectune.peft.SVFConfig(task_type="FEATURE_EXTRACTION"), "one")
    moved(model)
    one = encoded(model)
    model.disable_adapters()
    assert torch.equal(encoded(model), base)
    model.enable_adapters()
    assert torch.equal(encoded(model), one)
    spectune.extract(model[0].auto_model, "one").save(tmp_path / "ours")
    other = new(folder)
    other.load_adapter(str(tmp_path / "ours"))
    assert torch.allclose(encoded(other), one, atol=1e-6)
    merged = spectune.merge(spectune.attach(new(folder)[0].auto_model, spectune.Adapter.load(tmp_path / "ours")))
    plain = new(folder)
    plain[0].auto_model.load_state_dict(merged.state_dict())
    assert torch.allclose(encoded(plain), one, atol=1e-5)
