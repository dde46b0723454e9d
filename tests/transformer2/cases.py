"""What the tests of this folder share: a tiny model, adapters on it, and a library of them."""

from typing import Any

import torch

import spectune
from spectune.layers.adapted import adapted_layers
from spectune.transformer2.library import Library
from spectune.transformer2.pool import Pool
from spectune.transformer2.shots import as_shot
from training.folder import make_model, make_tokenizer

NAMES = ("ahoy", "plus", "say")

SHOTS = [
    {"prompt": "say one", "completion": "two three"},
    {"messages": [{"role": "user", "content": "what is one plus two"}, {"role": "assistant", "content": "three"}]},
    {"prompt": "say four and five", "completion": "five four one"},
]


def tiny(**changes: object) -> Any:
    """Return a two-layer Llama that reads the words of `make_tokenizer`."""
    return make_model(max_position_embeddings=256, **changes).eval()


def adapter(method: Any = "svf", seed: int = 1, scale: float = 0.3, model: Any = None) -> spectune.Adapter:
    """Return an adapter on the tiny model, far from where its method starts."""
    model = tiny() if model is None else model
    spectune.adapt(model, method, name="made")
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapters["made"].parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=drawn))
    made = spectune.extract(model, "made")
    spectune.detach(model, "made")
    return made


def library(path: Any, methods: Any = ("svf",) * 3, names: Any = NAMES, prompts: Any = None) -> Library:
    """Return a library of adapters, one of each method."""
    made = Library(path / "library")
    for i, (name, method) in enumerate(zip(names, methods, strict=True)):
        made.add(name, adapter(method, seed=i + 1), f"is for {name}", (prompts or {}).get(name, ()))
    return made


def pool(path: Any, methods: Any = ("svf",) * 3, **options: Any) -> Pool:
    """Return a pool of such a library on a tiny model."""
    return Pool(tiny(), library(path, methods), **options)


def tokenizer() -> Any:
    return make_tokenizer()


def ids(rows: int, length: int = 7) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, 24, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(adapter: spectune.Adapter | None, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a fresh tiny model with an adapter attached."""
    model = tiny()
    if adapter is not None:
        spectune.attach(model, adapter)
    return model(tokens).logits


def shots() -> list[Any]:
    """Return shots as a search takes them."""
    return [as_shot(record, tokenizer()) for record in SHOTS]
