"""What the plug-in for vLLM computes, without vLLM: for each token the core of its own adapter over frozen bases."""

import pytest
import torch

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.vllm import checkpoint as checkpoints
from spectune.vllm.checkpoint import Checkpoint
from spectune.vllm.cores import Batch, Bound, LayerCores, shares_of
from training.folder import make_model, save_folder
from transformer2.cases import adapter

METHODS = (
    "svf",
    "svf:parametrization=sigmoid",
    "svft:pattern=plain",
    "svft:pattern=banded,width=1",
    "svft:pattern=random,width=1",
)
METHODS += ("svft:pattern=top_k,width=1", "lora_xs:rank=2", "lora_xs:rank=4")
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("base"))


def own(base, method, seed):
    """Return an adapter on the base, as its files hold it."""
    from transformers import AutoModelForCausalLM

    made = adapter(method, model=AutoModelForCausalLM.from_pretrained(base), seed=seed)
    made.save(base.parent / f"{seed}")
    return Adapter.load(base.parent / f"{seed}")


def cores_of(base, adapters, slots=8, dtype=torch.float32, eight_bits=False):
    """Bind adapters to a layer, one in each slot; return its cores and the checkpoint."""
    source, cores = Checkpoint(base), LayerCores()
    for slot, one in enumerate(adapters):
        terms = source.checked(LAYER, one.layers[LAYER], cores.bases(0))
        shares = shares_of(LAYER, terms)
        for kind, share in shares.items():
            if (0, kind) not in cores.bounds:
                like, same = torch.empty(0, dtype=dtype), lambda matrix: matrix
                beside = cores.bases(0).get(kind[0])
                outputs = slice(3, 3 + one.layers[LAYER].shape[0])
                cores.bounds[0, kind] = Bound(share, slots, outputs, like, same, same, beside, eight_bits)
        source.release()
        cores.set(slot, 0, shares)
    return cores, source


def test_bases_in_eight_bits_take_a_quarter_of_32_and_answer_within_hundredths(base):
    adapters = [own(base, method, seed) for seed, method in enumerate(METHODS)]
    batch, answers, sizes = Batch(range(len(METHODS)), "cpu"), [], []
    for eight_bits in (False, True):
        cores, source = cores_of(base, adapters, eight_bits=eight_bits)
        out, in_features = source.weight(LAYER).shape
        torch.manual_seed(0)
        cores.add(torch.randn(len(METHODS), in_features), y := torch.zeros(len(METHODS), out + 5), batch)
        answers.append(y)
        sizes.append(sum(b.left.bytes + b.right.bytes for b in cores.bounds.values()))
    error = (answers[1] - answers[0]).norm(dim=1) / answers[0].norm(dim=1)
    assert (error < 0.03).all()  # a step of 1/127 of the largest, in vectors of some tens of values
    assert (error > 0).all()
    assert sizes[1] < 0.35 * sizes[0]  # a quarter, and a scale for each of the few vectors


def test_each_token_is_answered_by_its_own_adapter(base):
    adapters = [own(base, method, seed) for seed, method in enumerate(METHODS)]
    cores, source = cores_of(base, adapters)
    weight = source.weight(LAYER)
    deltas = [one.bind(_model(base)).delta(LAYER) for one in adapters]
    slots = [3, -1, 0, 0, 7, 2, 1, -1, 4, 5, 6, 3, 6, 6]  # one core for each token, and one for three
    x, y = torch.randn(len(slots), weight.shape[1]), torch.randn(len(slots), weight.shape[0] + 5)
    wanted = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[token, 3:-2] += deltas[slot] @ x[token]
    cores.add(x, y, Batch(slots, "cpu"))
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    cores.reset(3)  # and nothing is left of who left
    again = torch.zeros_like(y)
    cores.add(x, again, Batch([3] * len(slots), "cpu"))
    assert not again.any()


def _model(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def test_a_basis_is_made_once_and_bound_once(base, monkeypatch):
    made = []
    decompose = checkpoints.decompose_many
    monkeypatch.setattr(checkpoints, "decompose_many", lambda *a, **k: (made.append(a), decompose(*a, **k))[1])
    adapters = [
        own(base, "svft:pattern=banded,width=1", 20),
        own(base, "svft:pattern=plain", 21),
        own(base, "svft:pattern=banded,width=1", 22),
    ]
    cores, source = cores_of(base, adapters)
    assert len(made) == 1
    first, second = cores.bounds.values()
    assert first.left is second.left
    assert first.used == {0, 2}
    assert not source._bases


def test_terms_over_one_basis_are_added(base):
    mixture = 0.5 * own(base, "svf", 30) - 2.0 * own(base, "lora_xs:rank=2", 31) + own(base, "svf", 32)
    cores, source = cores_of(base, [mixture])
    delta = mixture.bind(_model(base)).delta(LAYER)
    x = torch.randn(3, source.weight(LAYER).shape[1])
    y = torch.zeros(3, len(delta) + 3)
    cores.add(x, y, Batch([0] * 3, "cpu"))
    torch.testing.assert_close(y[:, 3:], x @ delta.mT, atol=1e-5, rtol=1e-4)


def test_another_base_is_refused_the_first_time_and_the_next(base, tmp_path):
    torch.manual_seed(5)
    other = make_model(initializer_range=0.5)
    wrong = adapter("svf", model=other, seed=1)
    wrong.save(tmp_path / "wrong")
    wrong = Adapter.load(tmp_path / "wrong")
    with pytest.raises(SpectuneError, match="belongs to another base"):
        cores_of(base, [wrong])
    with pytest.raises(SpectuneError, match="belongs to another base"):
        cores_of(base, [own(base, "svf", 40), wrong])


def test_an_update_that_does_not_come_out_is_refused_over_a_bound_basis(base):
    from dataclasses import replace

    good, bad = own(base, "svf", 41), own(base, "svf", 42)
    layer = bad.layers[LAYER]
    term = replace(layer.terms[0], trained={"z": layer.terms[0].trained["z"].flip(0)})
    bad.layers = {**bad.layers, LAYER: replace(layer, terms=(term,))}
    with pytest.raises(SpectuneError, match="does not reproduce its update"):
        cores_of(base, [good, bad])


def test_what_a_checkpoint_lacks_is_said(base, tmp_path):
    with pytest.raises(SpectuneError, match="holds no safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(SpectuneError, match=r"no weight of 'model.layers.9.x'"):
        Checkpoint(base).weight("model.layers.9.x")
    with pytest.raises(SpectuneError, match="no matrix of 16 or 32 bits"):
        Checkpoint(base).weight("model.norm")
    with pytest.raises(SpectuneError, match=r"lora on .* has no core"):
        shares_of(LAYER, own(base, "lora:rank=2", 50).layers[LAYER].terms)
