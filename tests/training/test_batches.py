"""Packed, padded and single examples have one loss."""

import torch
import torch.nn.functional as F

from spectune.training.batches import IGNORE, Packer
from spectune.training.tasks.sft import encode
from training.folder import make_model, make_tokenizer

RECORDS = [
    {"prompt": "one plus two is", "completion": "three"},
    {"text": "ahoy"},
    {"prompt": "say", "completion": "hello and ahoy and hello"},
    {"prompt": "what is the one", "completion": "a two"},
]


def losses(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")


def test_the_loss_of_a_packed_batch_equals_that_of_each_alone_and_of_the_padded_batch():
    tokenizer, model = make_tokenizer(), make_model().eval()
    examples = encode(RECORDS, tokenizer, 32).examples
    packer = Packer(model, 0)
    packed = losses(model, packer(examples))
    alone = torch.cat([losses(model, packer([example])) for example in examples])
    padded = losses(model, packer._padded(examples))
    assert len(packed) == sum(sum(e.supervised[1:]) for e in examples)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, padded[padded != 0], atol=1e-5, rtol=1e-5)


def test_a_batch_has_no_padding_and_logits_only_where_the_loss_is():
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    model = make_model()
    batch = Packer(model, 0)(examples)
    assert batch["input_ids"].shape == (1, sum(len(e.tokens) for e in examples))
    logits = model(**{k: v for k, v in batch.items() if "labels" not in k}, use_cache=False).logits
    assert logits.shape[1] == batch["labels"].numel()


def test_a_model_without_logits_to_keep_gets_a_padded_batch():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    examples = encode(RECORDS, make_tokenizer(), 32).examples
    batch = Packer(Plain(), 0)(examples)
    assert batch["input_ids"].shape == (4, max(len(e.tokens) for e in examples))
    assert int(batch["attention_mask"].sum()) == sum(len(e.tokens) for e in examples)
