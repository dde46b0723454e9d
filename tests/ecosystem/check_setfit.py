"""SetFit: trained on a few examples, saved and loaded with equal answers."""

import pytest
import torch
import transformers
from datasets import Dataset
from ecosystem_cases import KINDS, adapted
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as parts
from setfit import SetFitModel, Trainer, TrainingArguments

import spectune.peft
import tiny
from training.folder import make_tokenizer

SAID = ["one plus two", "what is three", "say ahoy", "ahoy"]


def body(folder):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {**tiny.BERT, "vocab_size": len(tokenizer)}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    word = parts.Transformer(str(folder))
    return SentenceTransformer(modules=[word, parts.Pooling(32)], device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_loaded(kind, tmp_path):
    encoder = body(tmp_path / "base")
    before = encoder.encode(SAID, convert_to_tensor=True)
    if kind == "adapt":
        adapted(encoder, kind)
    else:
        encoder.add_adapter(spectune.peft.SVFConfig(task_type="FEATURE_EXTRACTION"))
    from sklearn.linear_model import LogisticRegression

    model = SetFitModel(model_body=encoder, model_head=LogisticRegression(), labels=["sum", "pirate"])
    rows = Dataset.from_dict({"text": SAID, "label": [0, 0, 1, 1]})
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, batch_size=2, body_learning_rate=2e-2, report_to="none",
        save_strategy="no", show_progress_bar=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    after = model.model_body.encode(SAID, convert_to_tensor=True)
    assert (after - before).abs().max() > 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    if kind == "peft":  # of which SetFit writes the adapter alone and reads no base, PEFT's own LoRA or ours
        again = body(tmp_path / "again")
        again.load_adapter(str(tmp_path / "saved"))
        assert torch.allclose(again.encode(SAID, convert_to_tensor=True), after, atol=1e-5)
        return
    again = SetFitModel.from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(again.model_body.encode(SAID, convert_to_tensor=True), after, atol=1e-5)
    assert again.predict(SAID) == model.predict(SAID)
