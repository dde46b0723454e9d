"""Classification: encoders and decoders learn, the head travels with the adapter, and mistakes are named."""

import json

import pytest
import torch
from sklearn.metrics import f1_score
from transformers import BertConfig, BertModel, TrainingArguments

import spectune
from spectune.bases.classifiers import classify
from spectune.errors import SpectuneError
from spectune.methods.head import Head
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks.classify import Classify
from training.folder import NUMBERS, make_model, make_tokenizer, save_folder

RECORDS = [
    {"text": f"say {n} and {m}", "label": "low" if i < 5 else "high"} for i, n in enumerate(NUMBERS) for m in NUMBERS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An encoder and a decoder that know nothing of labels."""
    decoder = save_folder(tmp_path_factory.mktemp("decoder"))
    encoder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=32, initializer_range=0.3, **sizes)).save_pretrained(
        encoder
    )
    make_tokenizer(template=None).save_pretrained(encoder)
    return {"encoder": encoder, "decoder": decoder}


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def settings(tmp_path):
    data = write(tmp_path / "data.jsonl", RECORDS)
    return [f"data={data}", "task=classify", "held_out=0.2", "dtype=fp32", "device=cpu", f"output={tmp_path / 'out'}"]


def run(settings, *more):
    return train(load_config(None, [*settings, *more]))


@pytest.mark.parametrize(
    ("kind", "method", "lr"),
    [("encoder", "lora:rank=4", 1e-2), ("decoder", "pissa:rank=4", 5e-3), ("decoder", "dora:inner=lora,rank=2", 1e-2)],
)
def test_it_learns_and_the_saved_adapter_classifies_alike(settings, tmp_path, folders, kind, method, lr):
    result = run(settings, f"model={folders[kind]}", f"method={method}", f"lr={lr}", "epochs=16")
    assert result.after["accuracy"] > 0.7 > 0.65 >= result.before["accuracy"]
    assert result.after["macro_f1"] > 0.7
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_accuracy"] == result.after["accuracy"]
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["high", "low"]
    adapter = spectune.Adapter.load(tmp_path / "out")
    assert adapter.labels == ("high", "low")
    model, tokenizer = spectune.load_base(folders[kind], "fp32", labels=adapter.labels)
    torch.manual_seed(7)
    for parameter in model.get_submodule("score" if kind == "decoder" else "classifier").parameters():
        torch.nn.init.normal_(parameter)  # whatever the base has there
    spectune.attach(model, adapter)
    texts = [record["text"] for record in RECORDS]
    predictions = classify(model, tokenizer, texts)
    right = sum(p.label == record["label"] for p, record in zip(predictions, RECORDS, strict=True))
    assert right > 85
    assert all(sum(p.probabilities.values()) == pytest.approx(1, abs=1e-5) for p in predictions)
    alone = [classify(model, tokenizer, [text])[0] for text in texts[:5]]
    for one, together in zip(alone, predictions, strict=False):
        assert one.probabilities == pytest.approx(together.probabilities, abs=1e-5)


def test_a_run_resumes_bit_for_bit(settings, tmp_path, folders):
    more = [f"model={folders['encoder']}", "max_steps=8", "save_steps=4", "method=svf"]
    whole = run(settings, *more)
    (tmp_path / "out" / "checkpoint-8").rename(tmp_path / "gone")
    again = run(settings, *more, "resume=true")
    for name, layer in whole.adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            assert torch.equal(tensor, again.adapter.layers[name].terms[0].trained[key])


def test_f1_is_sklearns_and_classes_that_do_not_occur_do_not_count():
    task = Classify(load_config(None, ["model=m", "data=d", "output=o", "task=classify"]))
    truth, said = torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 3, 3])
    confusion = torch.bincount(truth * 5 + said, minlength=25).view(5, 5)
    found = task.metrics({"loss": torch.tensor(1.0), "items": torch.tensor(6), "confusion": confusion})
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert found["accuracy"] == pytest.approx(4 / 6)


def test_pairs_numbers_and_other_names_of_columns(settings, tmp_path, folders):
    rows = [{"a": f"say {n}", "b": f"say {m}", "same": int(n == m)} for n in NUMBERS[:4] for m in NUMBERS[:4]]
    data = write(tmp_path / "pairs.jsonl", rows)
    columns = "columns={text: a, text_pair: b, label: same}"
    result = run(settings, f"model={folders['encoder']}", f"data={data}", columns, "max_steps=1")
    assert result.adapter.labels == ("0", "1")
    model, tokenizer = spectune.load_base(folders["encoder"], "fp32", labels=["0", "1"])
    assert len(classify(model, tokenizer, ["say"], ["ahoy"])) == 1
    with pytest.raises(SpectuneError, match="1 texts and 2 second texts"):
        classify(model, tokenizer, ["say"], ["ahoy", "say"])
    with pytest.raises(SpectuneError, match="columns: the data has no 'sane'; did you mean 'same'"):
        run(settings, f"model={folders['encoder']}", f"data={data}", "columns={label: sane}", "overwrite=true")


def test_labels_that_only_the_evaluation_data_has(settings, tmp_path, folders):
    other = write(tmp_path / "eval.jsonl", [{"text": "say", "label": "middling"}, {"text": "say", "label": "low"}])
    message = r"labels that the training data has not: middling \(training: high, low\)"
    with pytest.raises(SpectuneError, match=message):
        run(settings, f"model={folders['encoder']}", f"eval_data={other}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "one"}, "has the keys 'text'; it needs 'text' and 'label'"),
        ({"text": 1, "label": "a"}, "text must be a string"),
        ({"text": "one", "label": None}, "label must be a name or a whole number, not None"),
        ({"text": "one", "label": 0.5}, "label must be a name or a whole number"),
        ({"text": "one", "text_pair": 3, "label": "a"}, "text_pair must be a string"),
    ],
)
def test_records_of_another_form(settings, tmp_path, folders, record, message):
    data = write(tmp_path / "bad.jsonl", [RECORDS[0], record])
    with pytest.raises(SpectuneError, match=f"line 2: {message}"):
        run(settings, f"data={data}", f"model={folders['encoder']}")


def test_one_label_is_nothing_to_tell_apart(settings, tmp_path, folders):
    data = write(tmp_path / "one.jsonl", RECORDS[:50])
    with pytest.raises(SpectuneError, match="one label only, 'low'"):
        run(settings, f"data={data}", f"model={folders['encoder']}")


def test_texts_of_about_one_length_share_a_batch(folders, tmp_path):
    task = Classify(load_config(None, ["model=m", "data=d", "output=o", "task=classify"]))
    model, tokenizer = spectune.load_base(folders["encoder"], "fp32", labels=["a", "b"])
    records = [{"text": "say " * (1 + i % 20), "label": "a"} for i in range(400)]
    examples = task.encode(records, model, tokenizer, 16)
    assert examples.cut == 80
    trainer = task.trainer(
        model=spectune.adapt(model, "svf"),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, dataloader_pin_memory=False, train_sampling_strategy="group_by_length"
        ),
        train_dataset=examples.examples,
        data_collator=task.collator(model, tokenizer),
    )
    batches = list(trainer.get_train_dataloader())
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    assert padded < 1.1 * sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_a_checkpoint_that_is_a_classifier_keeps_its_head_for_its_labels(tmp_path, folders):
    model, tokenizer = spectune.load_base(folders["encoder"], "fp32", labels=["b", "a"])
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    same, _ = spectune.load_base(tmp_path, "fp32", labels=["a", "b"])
    assert same.config.id2label == {0: "b", 1: "a"}
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert not any(isinstance(u.method, Head) for u in _updates(spectune.adapt(same, "svf")))
    merged = spectune.merge(spectune.adapt(model, "svf"))  # has learned its head
    assert not any(isinstance(u.method, Head) for u in _updates(spectune.adapt(merged, "svf")))
    with pytest.raises(SpectuneError, match=r"tells apart b, a, and the labels are a, c: .*new_head=True"):
        spectune.load_base(tmp_path, "fp32", labels=["a", "c"])
    for labels, new_head in ((["a", "c"], True), (["a", "b", "c"], False)):
        other, _ = spectune.load_base(tmp_path, "fp32", labels=labels, new_head=new_head)
        assert other.classifier.weight.shape[0] == len(labels)
        assert not other.classifier.weight.any()
        assert any(isinstance(u.method, Head) for u in _updates(spectune.adapt(other, "svf", exclude="classifier")))


def _updates(model):
    return [module for module in model.modules() if type(module).__name__ == "Update"]


def test_an_encoder_is_no_language_model(settings, tmp_path, folders):
    data = write(tmp_path / "text.jsonl", [{"text": "say"}] * 8)
    with pytest.raises(SpectuneError, match=r"task: sft needs a causal language model, and .* is a BertModel"):
        run([s for s in settings if not s.startswith("task")], f"model={folders['encoder']}", f"data={data}")


def test_a_language_model_is_no_classifier():
    with pytest.raises(SpectuneError, match="LlamaForCausalLM is not a classifier of texts"):
        classify(make_model(), make_tokenizer(), ["say"])
