"""When kernels answer, when PyTorch does, and that whole adapted layers are the same either way."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
from operands import DEVICE, draw

import spectune
from spectune.layers import kernels as package
from spectune.layers import linear
from spectune.layers.core_ops import band_entries, banded_product
from spectune.layers.kernels import kernels

pytest.importorskip("triton", reason="the kernels need Triton")

LOW_RANK = {"project", "add"}
METHODS = {
    "lora:rank=3": LOW_RANK | {"over_rows"},
    "pissa:rank=4": LOW_RANK | {"over_rows"},
    "lora_xs:rank=5": LOW_RANK,
    "adalora:rank=2,initial_rank=3,total_steps=100": LOW_RANK | {"over_rows"},
    "dora:inner=lora,rank=3": LOW_RANK | {"over_rows", "through_ratio"},
    "svft:pattern=banded,width=2": {"product", "entries"},
    "dora:inner=svft,pattern=banded,width=1": {"product", "entries"},
}


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setenv("SPECTUNE_KERNELS", "on")
    package._working.cache_clear()
    yield
    package._working.cache_clear()


def layer(method, n_in, n_out, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out)).to(DEVICE, dtype)
    spectune.adapt(model, method)
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def outcome(model, x):
    """The answer and all gradients, in float64."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).mul(40).sin().reshape(y.shape).to(y.dtype))
    return [s.double() for s in (y.detach(), x.grad, *(p.grad for p in model[0].adapters.parameters()))]


def spy(name, true, called):
    def function(*args, **kwargs):
        called.add(name)
        return true(*args, **kwargs)

    return function


def compare(method, n, n_in, n_out, dtype, monkeypatch):
    model, x = layer(method, n_in, n_out, dtype), draw((2, n, n_in), dtype)
    ours = outcome(model, x)
    monkeypatch.setenv("SPECTUNE_KERNELS", "off")
    theirs = outcome(model, x)
    exact = outcome(copy.deepcopy(model).double(), x.double())
    slack = 8 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.5  # the interpreter cuts bfloat16 off
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= slack * (b - c).norm() + 1e-6 * c.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_whole_layers_are_as_near_to_float64_as_with_pytorch(method, dtype, switched_on, monkeypatch):
    called = set()
    for module, names in (
        ("low_rank", ("project", "add", "over_rows", "through_ratio")),
        ("banded", ("product", "entries")),
    ):
        found = kernels(module, torch.zeros(1, device=DEVICE))
        for name in names:
            monkeypatch.setattr(found, name, spy(name, getattr(found, name), called))
    compare(method, 150, 37, 45, dtype, monkeypatch)
    assert METHODS[method] <= called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_whole_layers_of_real_size_on_a_gpu(method, dtype, switched_on, monkeypatch):
    compare(method, 4096, 1536, 2048, dtype, monkeypatch)


def test_banded_cores_differentiate_twice_through_kernels(switched_on):
    t = draw((3, 7), torch.float32).requires_grad_()
    values = draw((1, band_entries(7, 2)), torch.float32, seed=1)[0].requires_grad_()
    results = []
    for to in (torch.float32, torch.float64):  # float64 is always PyTorch's
        s, v = t.to(to), values.to(to)
        (first,) = torch.autograd.grad((banded_product(s, v, 2, False) ** 3).sum(), v, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), (t, values)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-2)


def test_what_no_kernel_takes(switched_on, monkeypatch):
    class Own(torch.Tensor):
        pass

    x = torch.zeros(3, device=DEVICE)
    assert kernels("low_rank", x, x.bfloat16()) is not None
    for other in (x.double(), x.as_subclass(Own), x.to("meta")):
        assert kernels("low_rank", x, other) is None
    assert kernels("banded", x) is not None
    monkeypatch.setenv("SPECTUNE_KERNELS", "off")
    assert kernels("banded", x) is None


@pytest.mark.parametrize(("rows", "rank"), [(linear._FEW_ROWS - 1, 2), (linear._FEW_ROWS, 33)])
def test_few_rows_and_high_ranks_are_left_to_pytorch(rows, rank, switched_on):
    x, W = torch.zeros(rows, 8, device=DEVICE), torch.zeros(9, 8, device=DEVICE)
    L, R = torch.zeros(9, rank, device=DEVICE), torch.zeros(rank, 8, device=DEVICE)
    assert linear.products_of(x, W, L, R) is linear.products


def test_without_triton_pytorch_answers_and_nothing_is_said(switched_on, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels("low_rank", torch.zeros(1, device=DEVICE)) is None


@pytest.mark.parametrize("outcome", [False, RuntimeError("no compiler")])
def test_kernels_that_fail_or_disagree_are_not_used(outcome, switched_on, monkeypatch):
    module = kernels("banded", torch.zeros(1, device=DEVICE))
    package._working.cache_clear()

    def agrees(device):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(module, "agrees", agrees)
    with pytest.warns(UserWarning, match="banded kernels are not used on .*(disagree|no compiler)"):
        assert kernels("banded", torch.zeros(1, device=DEVICE)) is None
    assert kernels("banded", torch.zeros(1, device=DEVICE)) is None  # once is enough


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = os.path.join(os.path.dirname(__file__), "compile_all.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90"]
