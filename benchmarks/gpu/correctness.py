"""Whether the card answers what the CPU does in float64: methods, kernels, mixtures, merging, files, training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectune
from gpu import models
from gpu.part import Part, Place, Skipped
from spectune.layers import products
from spectune.layers.core_ops import band_entries, band_indices
from spectune.layers.cores import Diagonal
from spectune.layers.kernels import INTERPRETED, kernels
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.loss import cross_entropy_sum
from spectune.speed.parts import training_parts
from spectune.training.data.encoding import Example
from spectune.training.data.packing import Packer

ROOT = Path(__file__).parents[2]
ADDITIVE = [
    "lora:rank=8",
    "lora:rank=8,rslora=true",
    "pissa:rank=8",
    "milora:rank=8,dropout=0.0",
    "lora_xs:rank=8",
    "adalora:rank=4,initial_rank=8,total_steps=100",
    "svf",
    "svf:parametrization=sigmoid",
    "svft",
    "svft:pattern=banded,width=3",
    "svft:pattern=random,width=3",
    "svft:pattern=top_k,width=3",
    "svft:pattern=banded,width=2,gate=true",
    "vera:rank=16",
]
METHODS = [*ADDITIVE, *(f"dora:inner={text.replace(':', ',', 1)}" for text in ADDITIVE)]
# the largest relative error of an answer or a gradient: many times what rounding in the dtype makes of one
DTYPES = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 5e-2), "fp16": (torch.float16, 1e-2)}
SAME_BASIS = 3e-2  # with a basis that another machine has found, as near as files are checked on loading
HEAD = 24  # singular values at either end that are far apart


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    for kernel, run in kernel_checks(place).items():
        for dtype in DTYPES:
            part.row(f"kernel {kernel} {dtype}", lambda run=run, dtype=dtype: run(dtype))
    with of_its_own_cache():
        for text in METHODS:
            for dtype in DTYPES:
                part.row(f"{text} {dtype}", lambda text=text, dtype=dtype: of_method(place, text, dtype))
            part.row(f"saved on a CPU: {text}", lambda text=text: of_file(place, text))
        for dtype in DTYPES:
            part.row(f"a sparse core of real size {dtype}", lambda dtype=dtype: of_large_core(place, dtype))
            part.row(f"training {dtype}", lambda dtype=dtype: of_training(place, dtype))
        part.row("tokens of one batch", lambda: of_generation(place))
    if not place.tiny:
        part.row("tests of the kernels", lambda: of_tests(part), needs=20)


# -- a layer with each method


def weight(out: int, into: int) -> Tensor:
    """Return W (out x in) in float64, with numbers that every dtype holds and singular values apart at both ends."""
    generator = torch.Generator().manual_seed(0)
    k = min(out, into)
    U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] for n in (out, into))
    ends = min(HEAD, k // 3)
    fall = 0.8 ** torch.arange(ends)
    S = torch.cat([8 * fall, torch.linspace(8 * 0.8**ends, 0.5, k - 2 * ends), 0.4 * fall])
    return ((U * S.sort(descending=True).values) @ V.T).bfloat16().half().double()


def of_layer(place: Place, text: str) -> Any:
    """Return a layer on the CPU in float64, adapted, away from where the method starts."""
    out, into = place.of((768, 512), (40, 36))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(into, out)).double()
    with torch.no_grad():
        model[0].weight.copy_(weight(out, into))
        model[0].bias.copy_(model[0].bias.bfloat16().half())  # type: ignore[union-attr]
        spectune.adapt(model, text)
        for parameter in model[0].adapters.parameters():  # type: ignore[union-attr]
            parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.float())
    return model.train()


def on_card(place: Place, like: Any, dtype: torch.dtype) -> Any:
    """Return the plain layer of a model, on the card."""
    out, into = like[0].weight.shape
    model = nn.Sequential(nn.Linear(into, out, device=place.device, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(like[0].weight)
        model[0].bias.copy_(like[0].bias)  # type: ignore[union-attr]
    return model


def inputs(place: Place, into: int, dtype: torch.dtype) -> Tensor:
    """Return numbers (2, rows, in) in float64 that the dtype holds."""
    rows = place.of(200, 5)
    return torch.randn(2, rows, into, generator=torch.Generator().manual_seed(1)).to(dtype).double()


def outcome(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the answer and all gradients, float64 on the CPU."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).mul(40).sin().reshape(y.shape).to(y))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model[0].adapters["default"][0].named_parameters()}
    return {name: t.double().cpu() for name, t in found.items() if t is not None}


def error(ours: Tensor, exact: Tensor) -> float:
    """Return ||ours - exact|| / ||exact||."""
    return float((ours.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-300))


def verdict(errors: dict[str, float], bound: float) -> dict[str, Any]:
    """Return the errors, and whether all are within the bound; what is not a number is not."""
    return {"ok": all(e <= bound for e in errors.values()), "bound": bound} | {
        k: float(f"{e:.2e}") for k, e in errors.items()
    }


def of_method(place: Place, text: str, name: str) -> dict[str, Any]:
    """Return the errors of a layer with a method: answer, gradients, mixture, rows of a batch, merged weight."""
    dtype, bound = DTYPES[name]
    exact_model = of_layer(place, text)
    adapter = spectune.extract(exact_model)
    model = spectune.attach(on_card(place, exact_model, dtype), adapter, trainable=True).train()
    x = inputs(place, exact_model[0].in_features, dtype)
    here = x.to(place.device, dtype)
    exact, ours = outcome(exact_model, x), outcome(model, here)
    assert exact.keys() == ours.keys(), (list(exact), list(ours))
    errors = {key: error(ours[key], exact[key]) for key in exact}
    with torch.no_grad():
        model.eval()
        spectune.attach(model, 0.5 * adapter, name="other")
        plain = nn.functional.linear(x, exact_model[0].weight, exact_model[0].bias)
        update = exact["y"] - plain
        spectune.activate(model, {"default": 0.5, "other": -1.0})  # half of it, and half of it off again
        errors["mixture"] = error(model(here), plain)
        with spectune.route(model, ["other", {"default": 1.0, "other": 0.5}]):
            rows = model(here)
        expected = torch.stack([plain[0] + 0.5 * update[0], plain[1] + 1.25 * update[1]])
        errors["rows"] = error(rows, expected)
        spectune.detach(model, "other")
        spectune.activate(model, "default")
        errors["merged"] = error(spectune.merge(model)(here), exact["y"])
    return verdict(errors, bound)


def of_file(place: Place, text: str) -> dict[str, Any]:
    """Return the error of an adapter that was trained and saved on a CPU, and attached on the card."""
    if find_spec("pydantic") is None:
        raise Skipped("pydantic is not installed, which reading an adapter needs")
    exact_model = of_layer(place, text)
    with tempfile.TemporaryDirectory() as folder:
        spectune.extract(exact_model).save(folder)
        adapter = spectune.Adapter.load(folder)
    model = spectune.attach(on_card(place, exact_model, torch.float32), adapter).eval()
    x = inputs(place, exact_model[0].in_features, torch.float32)
    with torch.no_grad():
        plain = nn.functional.linear(x, exact_model[0].weight, exact_model[0].bias)
        update = exact_model(x) - plain
        ours = model(x.to(place.device, torch.float32)).double().cpu() - plain
    return verdict({"update": error(ours, update)}, SAME_BASIS)


def of_large_core(place: Place, name: str) -> dict[str, Any]:
    """Return the errors of a product with a sparse core of a 7B model's size, and of its gradients."""
    from spectune.layers.core_ops import sparse_product

    dtype, bound = DTYPES[name]
    size, rows, count = place.of((4096, 512, 69_000), (70, 9, 200))
    generator = torch.Generator().manual_seed(0)
    to, of = torch.randperm(size * size, generator=generator)[:count].sort().values.chunk(2)
    to, of = torch.cat([to, of]) // size, torch.cat([to, of]) % size
    t, values = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, size), (count,)))

    def run(t: Tensor, values: Tensor) -> list[Tensor]:
        t, values = t.detach().requires_grad_(), values.detach().requires_grad_()
        y = sparse_product(t, values, to.to(t.device), of.to(t.device))
        y.backward(torch.linspace(-1, 1, y.numel()).mul(40).sin().reshape(y.shape).to(y))
        return [y.detach(), *(s.grad for s in (t, values) if s.grad is not None)]

    exact, ours = run(t.double(), values.double()), run(t.to(place.device), values.to(place.device))
    return verdict({key: error(a, e) for key, a, e in zip(("y", "t", "values"), ours, exact, strict=True)}, bound)


# -- a whole model


def examples(vocabulary: int, lengths: Sequence[int]) -> list[Example]:
    """Return random examples that begin alike, with the loss on their second halves."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(3, vocabulary, (12,), generator=generator).tolist()
    rows = [[*first, *torch.randint(3, vocabulary, (n,), generator=generator).tolist()] for n in lengths]
    return [Example(row, [i >= len(row) // 2 for i in range(len(row))]) for row in rows]


def of_training(place: Place, name: str) -> dict[str, Any]:
    """Return the errors of a training step's loss and gradients: packed rows, norms, checkpoints, chunked loss."""
    dtype, bound = DTYPES[name]
    shape = place.of({"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}, {})
    shape |= place.of({"num_attention_heads": 8, "num_key_value_heads": 4}, {})
    cpu = Place(torch.device("cpu"), place.tiny)
    exact_model = models.small(cpu, torch.float64, **shape)
    with torch.no_grad():
        for parameter in exact_model.parameters():
            parameter.copy_(parameter.bfloat16().half())
    spectune.adapt(exact_model, "dora:inner=lora,rank=8")
    with torch.no_grad():
        for key, parameter in exact_model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.05 * torch.randn_like(parameter)).copy_(parameter.float())
    adapter = spectune.extract(exact_model)
    plain = spectune.detach(copy.deepcopy(exact_model)).to(place.device, dtype)
    model = spectune.attach(plain, adapter, trainable=True)
    batch = examples(exact_model.config.vocab_size, place.of([150, 60, 220, 90], [9, 14, 20]))

    def step(model: Any, ways: Any) -> dict[str, Tensor]:
        checkpoint_activations(model, ways)
        with training_parts(model):
            inputs = {key: value.to(model.device) for key, value in Packer(model, 0)(batch).items()}
            labels = inputs.pop("labels")
            model.train().zero_grad()
            loss = cross_entropy_sum(model, inputs, labels)
            loss.backward()
        grads = [p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None]
        return {"loss": loss.detach().double().cpu(), "gradients": torch.cat(grads)}

    exact, ours = step(exact_model, False), step(model, "light")
    return verdict({key: error(ours[key], exact[key]) for key in exact}, 2 * bound)


def of_generation(place: Place) -> dict[str, Any]:
    """Return the error of logits behind a cache, each row with an adapter of its own, in fp32."""
    model = models.small(place, torch.float32, **place.of({"num_hidden_layers": 4}, {}))
    for number, text in enumerate(("lora:rank=4", "svf", "dora:inner=lora,rank=4")):
        spectune.adapt(model, text, name=f"a{number}")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().requires_grad_(False)
    names = ["a0", None, "a1", {"a0": 0.5, "a2": 0.5}]
    ids = torch.randint(3, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    ids = ids.to(place.device)
    told = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    told |= {"eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), spectune.route(model, names):
        together = model.generate(ids, **told)
    errors = {}
    for row, name in enumerate(names):
        spectune.activate(model, name)
        with torch.no_grad():
            alone = model(together.sequences[row : row + 1, :-1]).logits[0, ids.shape[1] - 1 :]
        ours = torch.stack([logits[row] for logits in together.logits])
        errors[f"row {row}"] = error(ours, alone.double().cpu())
    return verdict(errors, 1e-3)


# -- the kernels


def kernel_checks(place: Place) -> dict[str, Callable[[str], dict[str, Any]]]:
    """Return for each kernel what compares it with float64 on the CPU, given a dtype."""
    rows, into, out, rank = place.of((2000, 1000, 1500, 16), (70, 40, 50, 4))

    def found(module: str) -> Any:
        answers = kernels(module, torch.zeros(1, device=place.device))
        if answers is None and place.device.type == "cuda" and not INTERPRETED:
            raise RuntimeError(f"the kernels of {module} are not used on this card")
        if answers is None:
            raise Skipped("kernels are for a GPU")
        return answers

    def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def compared(
        run: Callable[[Any, list[Tensor]], Sequence[Any]], module: str, name: str, operands: list[Tensor]
    ) -> Any:
        dtype, bound = DTYPES[name]
        exact = run(None, [s.double() for s in operands])
        ours = run(found(module), [s.to(place.device) for s in operands])
        errors = {str(i): error(a, e) for i, (a, e) in enumerate(zip(ours, exact, strict=True))}
        return verdict(errors, min(bound, 32 * torch.finfo(dtype).eps))

    def project(name: str) -> Any:
        dtype = DTYPES[name][0]
        operands = [drawn(rows, into, dtype=dtype), drawn(rank, into, dtype=dtype, seed=1), drawn(rank, dtype=dtype)]
        return compared(
            lambda ops, s: (ops or products).project(s[0], s[1], Diagonal(s[2]), 0.5), "low_rank", name, operands
        )

    def add(name: str) -> Any:
        dtype = DTYPES[name][0]
        operands = [drawn(rows, out, dtype=dtype), drawn(rows, rank, dtype=dtype, seed=1)]
        operands += [drawn(out, rank, dtype=dtype, seed=2), drawn(out, dtype=torch.float32, seed=3).abs() + 0.5]
        operands += [drawn(out, dtype=dtype, seed=4)]
        return compared(
            lambda ops, s: [(ops or products).add(s[0].clone(), s[1], s[2], 0.5, s[3], s[4])],
            "low_rank",
            name,
            operands,
        )

    def over_rows(name: str) -> Any:
        dtype = DTYPES[name][0]
        operands = [drawn(rows, out, dtype=dtype), drawn(rows, rank, dtype=dtype, seed=1)]
        return compared(lambda ops, s: [(ops or products).over_rows(s[0], s[1], 0.5)], "low_rank", name, operands)

    def through_ratio(name: str) -> Any:
        dtype = DTYPES[name][0]
        operands = [
            drawn(rows, out, dtype=dtype),
            drawn(rows, out, dtype=dtype, seed=1),
            drawn(out, dtype=dtype, seed=2),
        ]
        operands += [drawn(out, dtype=torch.float32, seed=3).abs() + 0.5]
        return compared(lambda ops, s: (ops or products).through_ratio(*s), "low_rank", name, operands)

    def banded(name: str, transpose: bool, gradient: bool) -> Any:
        dtype, width = DTYPES[name][0], place.of(8, 2)
        operands = [drawn(rows, into, dtype=dtype), drawn(rows, into, dtype=dtype, seed=1)]
        operands += [drawn(band_entries(into, width), dtype=dtype, seed=2)]
        places = band_indices(into, width)

        def run(ops: Any, s: list[Tensor]) -> list[Tensor]:
            t, grad, values = s
            if ops is not None and gradient:
                return [ops.entries(grad, t, width, transpose, len(values))]
            if ops is not None:
                return [ops.product(t, values, width, transpose)]
            if gradient:
                outer = t.mT @ grad if transpose else grad.mT @ t
                return [outer[places]]
            C = torch.zeros(into, into, dtype=torch.float64).index_put_(places, values)
            return [t @ C if transpose else t @ C.mT]

        return compared(run, "banded", name, operands)

    return {
        "project": project,
        "add": add,
        "over_rows": over_rows,
        "through_ratio": through_ratio,
        "banded product": lambda name: banded(name, False, False),
        "banded product, transposed": lambda name: banded(name, True, False),
        "banded entries": lambda name: banded(name, False, True),
        "banded entries, transposed": lambda name: banded(name, True, True),
    }


def of_tests(part: Part) -> dict[str, Any]:
    """Run the tests of the suite that run the kernels, which here is on the card."""
    try:
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
    except ImportError as missing:
        raise Skipped(f"{missing.name} is not installed") from None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-x"]
    try:
        done = subprocess.run(
            [*command, "tests/layers/kernels/test_choice.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(1.0, min(90.0, part.left())),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Skipped("the part's time is over") from None
    said = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "said": said[-1:] if done.returncode == 0 else said[-60:]}


@contextmanager
def of_its_own_cache() -> Iterator[None]:
    """Within the context decompositions are kept in a folder that goes with it."""
    before = os.environ.get("SPECTUNE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPECTUNE_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["SPECTUNE_CACHE"]
            else:
                os.environ["SPECTUNE_CACHE"] = before


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part: how many rows there are, and the nearest to their bound."""
    worst: dict[str, tuple[float, str]] = {}
    for name, row in rows.items():
        if "bound" in row:
            numbers = {k: v for k, v in row.items() if k not in ("bound", "took_s", "ok")}
            share, which = max((v / row["bound"], k) for k, v in numbers.items())
            dtype = name.rpartition(" ")[2] if name.rpartition(" ")[2] in DTYPES else "others"
            worst[dtype] = max(worst.get(dtype, (0.0, "")), (share, f"{name}: {which}"))
    return [f"{dtype}: at most {share:.2f} of the bound ({name})" for dtype, (share, name) in worst.items()]
