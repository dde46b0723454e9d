"""What a model forgets: losses and hidden states of general text against those of one text at a time."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from spectune.compare.general import PYTHON_DOCS, General, forgetting, general_texts, states_or_loss
from spectune.errors import SpectuneError
from training.folder import make_model, make_tokenizer

TEXTS = ["say one", "what is the one and two", "hello", *["ahoy " * n + "three" for n in range(1, 9)]]


def encoder():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=64, **shape)).eval()


def test_the_loss_of_a_language_model_is_a_mean_over_tokens():
    """Each text with the end that is learned, and its first token not."""
    model, tokenizer = make_model().train(), make_tokenizer()
    model.config.attention_dropout = 0.0
    found = states_or_loss(model, tokenizer, General(TEXTS, "loss"))
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert found.dim() == 0
    assert float(found) == pytest.approx(total / count, rel=1e-4)
    assert not model.training


def test_the_states_of_another_model_are_means_over_each_texts_own_tokens():
    model, tokenizer = encoder(), make_tokenizer()
    found = states_or_loss(model, tokenizer, General(TEXTS, "drift"))
    expected = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in TEXTS]
    torch.testing.assert_close(found, torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)


def test_what_is_forgotten():
    general = General(TEXTS, "loss on general text")
    assert forgetting(torch.tensor(2.0), torch.tensor(2.5), general) == {
        "name": "loss on general text", "items": len(TEXTS), "before": 2.0, "after": 2.5
    }  # fmt: skip
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    after = torch.tensor([[3.0, 0.0], [2.0, 0.0], [-1.0, -1.0]])  # 1 - cosine of 0, 1 and 2
    drift = forgetting(before, after, general)
    assert (drift["before"], drift["after"]) == (0.0, pytest.approx(1.0, abs=1e-6))
    assert forgetting(before, before, general)["after"] == pytest.approx(0.0, abs=1e-6)


def test_texts_of_pythons_documentation_are_whole_paragraphs():
    found = general_texts(PYTHON_DOCS, make_model())
    assert len(found.texts) == 32
    assert all(len(text) > 300 and "\n" not in text and "  " not in text for text in found.texts)
    assert found.name == "loss on general text"
    assert general_texts(PYTHON_DOCS, encoder()) == General(found.texts, "drift of hidden states")


@pytest.mark.parametrize("count", [1, 31, 32, 70])
def test_texts_of_ones_own_are_taken_from_all_of_them(tmp_path, count):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(count)))
    found = general_texts(str(path), make_model()).texts
    step = max(1, count // 32)
    assert found == [f"text {i}" for i in range(0, count, step)][:32]


def test_data_without_texts_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "say", "completion": "ahoy"}))
    with pytest.raises(SpectuneError, match=r"general: .* has no text; each record needs a text"):
        general_texts(str(path), make_model())
