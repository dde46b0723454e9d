"""Whole layers in an adapter: files, PEFT's modules_to_save, sums, mixtures, merging and detaching."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save_file
from transformers import BertForSequenceClassification, LlamaForSequenceClassification

import spectune
from spectune import Adapter, Head, SpectuneError
from tiny import BERT, TEXT, tf

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # by PEFT
IDS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
NAMES = {"bert": "classifier", "llama": "score"}


def base(kind="bert", seed=0, labels=3):
    torch.manual_seed(seed)
    config = tf.BertConfig(**BERT) if kind == "bert" else tf.LlamaConfig(**TEXT)
    config.num_labels = labels
    config.id2label = {i: f"class {i}" for i in range(labels)}
    return (BertForSequenceClassification if kind == "bert" else LlamaForSequenceClassification)(config).eval()


def trained(model, seed, method="lora:rank=2"):
    """Put an adapter with a head on a model, with random trained tensors."""
    head = NAMES["bert" if isinstance(model, BertForSequenceClassification) else "llama"]
    spectune.adapt(model, method, overrides={head: Head(bias=model.get_submodule(head).bias is not None)})
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return spectune.extract(model)


def answer(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:inner=lora,rank=2", "svf"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_head_travels_with_the_adapter_and_goes_when_it_is_detached(tmp_path, kind, method):
    model = base(kind)
    plain = answer(model)
    adapter = trained(model, 1, method)
    expected = answer(model)
    adapter.save(tmp_path)
    spectune.detach(model)
    assert torch.equal(answer(model), plain)
    loaded = Adapter.load(tmp_path)
    assert loaded.labels == ("class 0", "class 1", "class 2")
    other = base(kind)  # of the same body, and a new head of its own
    torch.nn.init.normal_(other.get_submodule(NAMES[kind]).weight)
    torch.testing.assert_close(answer(spectune.attach(other, loaded)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(spectune.merge(other)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:inner=lora,rank=2"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_peft_loads_the_head_as_a_module_to_save(tmp_path, kind, method):
    model = base(kind)
    adapter = trained(model, 1, method)
    adapter.save(tmp_path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base(kind), str(tmp_path))(IDS).logits
    torch.testing.assert_close(theirs, answer(model), atol=1e-5, rtol=1e-4)


def test_a_head_that_peft_trained_is_read(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    theirs = get_peft_model(base(), config).eval()
    torch.nn.init.normal_(theirs.base_model.model.classifier.modules_to_save["default"].weight)
    expected = answer(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = Adapter.from_peft(tmp_path)
    assert loaded.modules["classifier"][0].tensors.keys() == {"weight", "bias"}
    torch.testing.assert_close(answer(spectune.attach(base(), loaded)), expected, atol=1e-5, rtol=1e-4)


def test_exports_keep_the_head_whole(tmp_path):
    model = base()
    adapter = trained(model, 1, "svf")
    exported = adapter.export(tmp_path)
    assert exported.layers["classifier"].terms[0].method == Head()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base(), str(tmp_path))(IDS).logits
    torch.testing.assert_close(theirs, answer(model), atol=1e-3, rtol=1e-3)
    assert adapter.compress(2).labels == adapter.labels


def test_sums_of_heads(tmp_path):
    first, second = trained(base(), 1), trained(base(), 2)
    mixed = 0.7 * first + 0.3 * second
    mixed.save(tmp_path / "mixed")
    torch.testing.assert_close(
        answer(spectune.attach(base(), Adapter.load(tmp_path / "mixed"))),
        answer(spectune.attach(base(), mixed)),
        atol=1e-5,
        rtol=1e-4,
    )
    one = mixed.to_lora().layers["classifier"].terms
    expected = (
        0.7 * first.layers["classifier"].terms[0].trained["H"] + 0.3 * second.layers["classifier"].terms[0].trained["H"]
    )
    torch.testing.assert_close(one[0].trained["H"], expected)
    with pytest.raises(SpectuneError, match=r"heads on 'classifier' have weights that sum to 1\.7"):
        (first + 0.7 * second).to_lora()
    second.labels = ("a", "b", "c")
    with pytest.raises(SpectuneError, match="different labels cannot be added: class 0, class 1, class 2; and a, b, c"):
        first + second
    with pytest.raises(SpectuneError, match="differ in the shape of 'classifier'"):
        first + Adapter(trained(base(labels=2), 1).layers)


def test_rows_of_a_batch_have_their_own_heads():
    model = base()
    first, second = trained(base(), 1), trained(base(), 2)
    expected = [answer(model)]
    for adapter in (first, second):
        expected.append(answer(spectune.attach(model, adapter)))
        spectune.detach(model)
    spectune.attach(spectune.attach(model, first, "a"), second, "b")
    with spectune.route(model, [None, "a", "b"]):
        routed = answer(model)
    together = torch.stack([expected[i][i] for i in range(3)])
    torch.testing.assert_close(routed, together, atol=1e-5, rtol=1e-4)


def test_labels_and_heads_that_are_damaged(tmp_path):
    adapter = trained(base(), 1)
    adapter.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())  # which some releases of safetensors leave in the file
    save_file(tensors, path, {"labels": "{1"})
    with pytest.raises(SpectuneError, match="'labels' in "):
        Adapter.load(tmp_path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("classifier.weight")}, path)
    with pytest.raises(SpectuneError, match="lacks the weight of 'classifier'"):
        Adapter.load(tmp_path)
