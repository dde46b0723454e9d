"""Products by oneDNN: what PyTorch's own product gives, and only in training."""

import pytest
import torch
import torch.nn.functional as F

import spectune
from spectune.speed import dense

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()), reason="one library only"
)


@pytest.fixture
def slow_mkl(monkeypatch):
    """A processor on which oneDNN is the faster."""
    monkeypatch.setattr(dense, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(dense, "_SMALL", 1)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), (0, 7), (1, 7)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_pytorchs(shape, biased, slow_mkl):
    x, weight, bias = torch.randn(shape), torch.randn(4, 7), torch.randn(4) if biased else None
    torch.testing.assert_close(dense.linear(x, weight, bias), F.linear(x, weight, bias))


def test_matrices_may_be_held_transposed_or_in_part(slow_mkl):
    a, b = torch.randn(6, 10), torch.randn(3, 20)
    torch.testing.assert_close(dense.matmul(a.mT, a), a.mT @ a)
    torch.testing.assert_close(dense.linear(a, b[:, ::2]), a @ b[:, ::2].mT)
    torch.testing.assert_close(dense.linear(a[:1].expand(4, 10), b[:, :10]), a[:1].expand(4, 10) @ b[:, :10].mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), (0, 7), (1, 7), (7, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_a_weight_that_is_laid_out_is_pytorchs(shape, biased, dtype, monkeypatch):
    monkeypatch.setattr(dense, "least_rows", lambda _: 1)
    weight, bias = torch.randn(4, 7).to(dtype), torch.randn(4).to(dtype) if biased else None
    x = torch.randn(shape).to(dtype)
    x = x.T if shape[-1] != 7 else x
    if not dense.PackedWeight.takes(weight):
        pytest.skip(f"no such product of {dtype} here")
    packed = dense.PackedWeight(weight.T.contiguous().T)
    torch.testing.assert_close(packed.linear(x, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("least", [2, 4])
def test_few_rows_are_left_where_they_would_take_longer(monkeypatch, least):
    monkeypatch.setattr(dense, "least_rows", lambda _: least)
    packed = dense.PackedWeight(torch.randn(4, 7))
    assert packed.linear(torch.randn(7)) is packed.linear(torch.randn(1, least - 1, 7)) is None
    assert packed.linear(torch.randn(least, 7)) is not None


@pytest.mark.parametrize(
    ("capability", "processor", "of_float32", "of_bfloat16"),
    [("AVX2", "AuthenticAMD", 2, 2), ("AVX512", "AuthenticAMD", 1, 1), ("AVX512", "GenuineIntel", 4, 1)],
)
def test_from_how_many_rows_it_pays(monkeypatch, capability, processor, of_float32, of_bfloat16):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(dense, "_processor", lambda: processor)
    caches = (dense.least_rows, dense._mkl_is_slow)
    for found in caches:
        found.cache_clear()
    try:
        assert dense.least_rows(torch.float32) == of_float32
        assert dense.least_rows(torch.bfloat16) == of_bfloat16
        assert dense.one_row_pays(torch.bfloat16) == (of_bfloat16 == 1)
    finally:
        for found in caches:
            found.cache_clear()


def test_a_weight_that_is_laid_out_leaves_what_is_not_its_own(monkeypatch):
    monkeypatch.setattr(dense, "least_rows", lambda _: 1)
    packed, x = dense.PackedWeight(torch.randn(4, 7)), torch.randn(2, 7)
    assert packed.linear(x.double()) is None
    assert packed.linear(x.clone().requires_grad_()) is None
    with torch.no_grad():
        assert packed.linear(x.clone().requires_grad_()) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.linear(x) is None
    asked = []
    torch.func.vmap(lambda row: asked.append(packed.linear(row)) or row)(x)
    assert asked == [None]
    takes = dense.PackedWeight.takes
    assert not takes(torch.randn(4, 7).double())
    assert not takes(torch.randn(4, 7, device="meta"))
    assert not takes(torch.randn(7))
    for name, value in (("_lay_out", None), ("_product", None)):
        with monkeypatch.context() as patch:
            patch.setattr(dense, name, value)
            assert not takes(torch.randn(4, 7))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not takes(torch.randn(4, 7))


def test_only_float32_on_a_processor_is_onednns_and_only_where_it_pays(slow_mkl, monkeypatch):
    columns = torch.zeros(4, 6)[:, :3]  # whose rows do not lie end to end: oneDNN has no product of its own for these
    assert not dense.by_onednn(torch.zeros(2, 3), columns)
    assert dense.by_onednn(torch.zeros(2, 3), torch.zeros(3, 4).mT)

    def by_onednn(**options):
        return dense.by_onednn(torch.zeros(2, 3, **options), torch.zeros(4, 3, **options))

    assert by_onednn()
    assert by_onednn(device="meta")
    assert not by_onednn(dtype=torch.float64)
    assert not by_onednn(dtype=torch.bfloat16)
    for name, value in (("_SMALL", 25), ("_mkl_is_slow", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(dense, name, value)
            assert not by_onednn()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not by_onednn()


@pytest.mark.parametrize(
    ("capability", "text", "slow"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_mkl_is_slow_on_other_processors_than_intels_with_wide_vectors(capability, text, slow, monkeypatch):
    monkeypatch.setattr(dense, "_processor", lambda: f"vendor_id : {text}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dense._mkl_is_slow.cache_clear()
    assert dense._mkl_is_slow() is slow
    dense._mkl_is_slow.cache_clear()


@pytest.mark.parametrize("method", ["lora:rank=2", "lora:rank=2,dropout=0.1", "dora:inner=lora,rank=2"])
def test_layers_take_it_in_training_and_else_answer_as_the_base_to_the_last_bit(method, slow_mkl, monkeypatch):
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(3, 6)
    base = model(x)
    spectune.adapt(model, method)
    taken = []
    operator = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(dense, "_product", lambda *args: taken.append(args[1].shape) or operator(*args))
    weights = {model[0].weight.shape, model[0].weight.mT.shape}
    y = model.eval()(x)
    assert not weights & set(taken)
    assert torch.equal(y, base)
    model.train()(x).sum().backward()
    assert weights & set(taken)
