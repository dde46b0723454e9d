"""An adapter off its model holds what was trained; of the base no more than a look at it while it is there."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import spectune
import tiny


def adapted(build, method):
    model = spectune.adapt(build(), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "pissa:rank=2", "dora:rank=2", "svft", "vera:rank=2"])
@pytest.mark.parametrize("build", [tiny.gpt2, tiny.bert])
def test_the_base_goes_with_the_model_and_the_adapter_is_written_all_the_same(build, method, tmp_path):
    model = adapted(build, method)
    inputs = tiny.batch(build.__name__)
    expected = model(**inputs).logits.detach()
    adapter = spectune.extract(model)
    name = next(iter(adapter.layers))
    delta, double = adapter.delta(name), 2 * adapter
    torch.testing.assert_close(double.delta(name) if "dora" not in method else 2 * delta, 2 * delta)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, double
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    pickle.loads(pickle.dumps(adapter))
    copy.deepcopy(adapter).save(tmp_path)
    for back in (adapter, spectune.Adapter.load(tmp_path)):
        torch.testing.assert_close(spectune.attach(build(), back)(**inputs).logits, expected)
    if "dora" in method:
        with pytest.raises(spectune.SpectuneError, match=r"call adapter\.bind\(model\)|adapter\.bind"):
            adapter.delta(name)
    torch.testing.assert_close(adapter.bind(build()).delta(name), delta, rtol=1e-4, atol=1e-5)
