"""Classification: encoders and decoders learn, the head travels with the adapter, and mistakes are named."""

import json

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from transformers import BertConfig, BertModel, TrainingArguments

import spectune
from spectune.adapters.labels import Labels
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


GRADES = [{"text": f"say {n} and {m}", "label": i / 4} for i, n in enumerate(NUMBERS) for m in NUMBERS]
TAGS = [
    {"text": f"say {n} and {m}", "label": [t for t, there in (("early", i < 5), ("late", j > 6)) if there]}
    for i, n in enumerate(NUMBERS)
    for j, m in enumerate(NUMBERS)
]


def test_numbers_are_predicted(settings, tmp_path, folders, capsys):
    data = write(tmp_path / "grades.jsonl", GRADES)
    more = [f"model={folders['encoder']}", f"data={data}", "method=lora:rank=4", "lr=1e-2", "epochs=16"]
    result = run(settings, *more)
    assert result.after["pearson"] > 0.6 > 0.3 > result.before["pearson"]
    assert result.after["mse"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert result.after["mse"] < 0.5 * result.before["mse"]
    assert "labels are numbers, 0 to 2.25, to predict (problem_type: regression)" in capsys.readouterr().err
    adapter = spectune.Adapter.load(tmp_path / "out")
    assert adapter.labels == Labels(["label"], "regression")
    model, tokenizer = spectune.load_base(folders["encoder"], "fp32", labels=adapter.labels)
    spectune.attach(model, adapter)
    said = [one.value for one in classify(model, tokenizer, [record["text"] for record in GRADES])]
    there = [record["label"] for record in GRADES]
    assert sum((a - b) ** 2 for a, b in zip(said, there, strict=True)) / len(said) < 0.3
    assert load_config(tmp_path / "out" / "config.yaml", []).problem_type == "regression"


def test_any_number_of_labels(settings, tmp_path, folders, capsys):
    data = write(tmp_path / "tags.jsonl", TAGS)
    more = [f"model={folders['decoder']}", f"data={data}", "method=lora:rank=4", "lr=1e-2", "epochs=16"]
    result = run(settings, *more)
    assert set(result.after) == {"loss", "micro_f1", "macro_f1", "subset_accuracy"}
    assert result.after["micro_f1"] > 0.7 > result.before["micro_f1"]
    said = capsys.readouterr().err
    assert "labels are lists" in said
    assert "35 of 100 records have none of the labels" in said
    adapter = spectune.Adapter.load(tmp_path / "out")
    assert adapter.labels == Labels(["early", "late"], "multi_label_classification")
    model, tokenizer = spectune.load_base(folders["decoder"], "fp32", labels=adapter.labels)
    spectune.attach(model, adapter)
    found = classify(model, tokenizer, [record["text"] for record in TAGS])
    assert sum(list(one.labels) == record["label"] for one, record in zip(found, TAGS, strict=True)) > 60
    assert all(one.labels == tuple(n for n, p in one.probabilities.items() if p > 0.5) for one in found)
    other, _ = spectune.load_base(folders["decoder"], "fp32", labels=["early", "late"])
    with pytest.raises(SpectuneError, match=r"for multi_label_classification and the model for single_label"):
        spectune.attach(other, adapter)


@pytest.mark.parametrize(
    ("labels", "target"),
    [
        (Labels(["a", "b"], "multi_label_classification"), [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
        (Labels(["label"]), [0.5, -100.0, 2.0]),
    ],
)
def test_losses_and_measures_are_those_of_transformers_and_of_scikit_learn(folders, labels, target):
    task = Classify(load_config(None, ["model=m", "data=d", "output=o", "task=classify"]))
    model, tokenizer = spectune.load_base(folders["encoder"], "fp32", labels=labels)
    torch.nn.init.normal_(model.classifier.weight)
    several = len(labels) > 1
    given = [[n for n, there in zip(labels, row, strict=True) if there] for row in target] if several else target
    records = [{"text": text, "label": each} for text, each in zip(("say one", "say two", "say"), given, strict=True)]
    batch = task.collator(model, tokenizer)(task.encode(records, model, tokenizer, 16).examples)
    truth = torch.tensor(target)
    assert int((batch["labels"] != -100).sum()) == truth.numel()  # also of the number -100
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "targets")}
    with torch.no_grad():
        theirs = model(**inputs, labels=truth)
        sums = task.sums(model, dict(batch))
    assert float(sums["loss"] / sums["items"]) == pytest.approx(float(theirs.loss), rel=1e-5)
    found = task.metrics(sums)
    if several:
        said = theirs.logits > 0
        assert found["micro_f1"] == pytest.approx(f1_score(truth, said, average="micro", zero_division=0))
        assert found["subset_accuracy"] == pytest.approx((said == truth.bool()).all(-1).double().mean())
    else:
        said = theirs.logits[:, 0].tolist()
        assert found["pearson"] == pytest.approx(pearsonr(said, target).statistic, abs=1e-6)
        assert found["spearman"] == pytest.approx(spearmanr(said, target).statistic, abs=1e-6)


def test_columns_that_say_yes_or_no_are_labels(settings, tmp_path, folders):
    rows = "text,toxic,insult\nsay one,1,0\nsay two,0,0\nsay three,1,1\n" + "say four,0,1\n" * 5
    data = tmp_path / "jigsaw.csv"
    data.write_text(rows)
    more = [f"model={folders['encoder']}", f"data={data}", "columns={label: [toxic, insult]}", "max_steps=1"]
    assert run(settings, *more).adapter.labels == Labels(["insult", "toxic"], "multi_label_classification")
    data.write_text(rows.replace("0,0", "0,-1"))
    with pytest.raises(SpectuneError, match="row 2: columns: 'insult' is one of several labels, which must be 0 or 1"):
        run(settings, *more, "overwrite=true")


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        ([0.5, "a"], (), "line 2: label is 'a', and others are numbers"),
        ([["a"], "b"], (), "line 2: label is 'b', and others are lists of names"),
        (["3", "x"], ("problem_type=regression",), "line 2: label must be a number, not 'x'"),
        ([["a"]], ("problem_type=regression",), "line 1: label is a list, and problem_type is regression"),
        ([0.5], ("problem_type=single_label_classification",), "line 1: label must be a name"),
        (["a"], ("problem_type=multi_label_classification",), "line 1: label must be a list of names, not 'a'"),
        ([1.5] * 9, (), "every label of the training data is 1.5: nothing to predict"),
        ([[]] * 9, (), "every list of labels in the training data is empty"),
    ],
)
def test_labels_of_several_kinds(settings, tmp_path, folders, labels, more, message):
    rows = [{"text": f"say {i}", "label": label} for i, label in enumerate(labels)]
    data = write(tmp_path / "kinds.jsonl", rows)
    with pytest.raises(SpectuneError, match=message):
        run(settings, f"data={data}", f"model={folders['encoder']}", *more)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "one"}, "has the keys 'text'; it needs 'text' and 'label'"),
        ({"text": 1, "label": "a"}, "text must be a string"),
        ({"text": "one", "label": None}, "label must be a name, a number or a list of names, not None"),
        ({"text": "one", "label": float("nan")}, "label must be a finite number, not nan"),
        ({"text": "one", "label": ["a", None]}, "label must be a list of names, and has None"),
        ({"text": "one", "label": ["a", ["b"]]}, r"label must be a list of names, and has \['b'\]"),
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
