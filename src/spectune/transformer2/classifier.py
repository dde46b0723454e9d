"""The classifier that labels a prompt: over the base's own hidden states, or an adapter that was trained to label."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import folder_digest
from spectune.errors import SpectuneError
from spectune.layers.modules import effective_weight, find_linear
from spectune.reading import check_memory, check_tensors_file, parsed, read_json
from spectune.storage import write_atomically
from spectune.transformer2.calibration import Calibration
from spectune.transformer2.labels import label_scores, labelling_prompt, opened
from spectune.transformer2.library import Library, write_json
from spectune.transformer2.pool import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["hidden", "adapter"]
FOLDER, CONFIG, WEIGHTS, ADAPTER = "classifier", "classifier.json", "classifier.safetensors", "adapter"
_KEYS = ("library_name", "format_version", "kind", "labels", "layer", "temperature", "threshold", "report", "sha256")
_TOKENS, _ROWS = 256, 32  # tokens of a prompt that are read, prompts read at once


@dataclass(frozen=True)
class Classifier:
    """Labels prompts with the names of a library's adapters, or "none".

    Args:
        kind: "hidden", a multinomial logistic regression on the base's mean hidden state, or "adapter".
        labels: the names, and "none" where there were prompts for it.
        calibration: temperature and threshold.
        layer: which hidden state.
        tensors: `mean`, `scale`, `weight` (labels x hidden) and `bias` for the kind "hidden"; and sketches of a few of
            the base's weights under `base.`.
        report: what was measured on held-out prompts.
        adapter: for the kind "adapter".
    """

    kind: Kind
    labels: tuple[str, ...]
    calibration: Calibration
    layer: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    report: Mapping[str, object] = field(default_factory=dict)
    adapter: Adapter | None = field(default=None, repr=False)

    def logits(self, pool: Pool, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
        """Return the logits of every label, (prompts x labels), before the temperature.

        Raises:
            SpectuneError: the base is another one.
        """
        if self.kind == "hidden":
            pool.activate(None)
            states = hidden_states(pool.model, tokenizer, prompts, self.layer)
            return regress(states, self.tensors)
        assert self.adapter is not None
        pool.activate_other(self.adapter)
        scores = adapter_scores(pool, tokenizer, prompts, self.labels)
        pool.activate(None)
        return scores

    def check(self, library: Library, model: PreTrainedModel) -> None:
        """Raise unless this is the classifier of a library as it is, on this base.

        Raises:
            SpectuneError: other names, or another base.
        """
        names = {label for label in self.labels if label in library or label != "none"}
        if names != set(library.names):
            differing = ", ".join(sorted(names ^ set(library.names))[:3])
            raise SpectuneError(
                f"the classifier was trained on another library than {str(library.path)!r} is now (it differs in "
                f"{differing}): train it again with `spectune library train-classifier`"
            )
        for key, sketch in self.tensors.items():
            if key.startswith("base."):
                layer = key.removeprefix("base.")
                weight = effective_weight(find_linear(model, layer)).detach()
                if not fingerprint.same_weight(fingerprint.sketch_weight(weight), sketch):
                    raise SpectuneError(
                        f"the classifier was trained on another base: the weight of {layer!r} is another one in this "
                        "model; train it again with `spectune library train-classifier`"
                    )

    def save(self, library: Library) -> Path:
        """Write the classifier into a library's folder, in place of the one that is there."""
        folder = library.path / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is not None:
            self.adapter.save(folder / ADAPTER)
        data = save({key: tensor.contiguous() for key, tensor in self.tensors.items()})
        write_atomically(folder / WEIGHTS, lambda path: path.write_bytes(data))
        values = ("spectune", 1, self.kind, list(self.labels), self.layer, *self.calibration, dict(self.report))
        config = dict(zip(_KEYS, (*values, _digest(data, folder, self.kind)), strict=True))
        write_json(folder / CONFIG, config)
        return folder

    @staticmethod
    def load(library: Library) -> Classifier:
        """Read a library's classifier.

        Raises:
            SpectuneError: there is none, or its files are damaged.
        """
        folder = library.path / FOLDER
        if not (folder / CONFIG).exists():
            raise SpectuneError(
                f"the library {str(library.path)!r} has no classifier: train one with `spectune library "
                "train-classifier`, or use the prompt strategy"
            )
        config = parsed(_Config, read_json(folder / CONFIG), str(folder / CONFIG))
        if config.format_version != 1 or config.kind not in ("hidden", "adapter"):
            raise SpectuneError(f"{folder / CONFIG} is not a classifier that this release reads: train it again")
        kind: Kind = "hidden" if config.kind == "hidden" else "adapter"
        try:
            check_tensors_file(folder / WEIGHTS)
            check_memory(folder / WEIGHTS, "the classifier cannot be read")
            data = (folder / WEIGHTS).read_bytes()
            tensors = load(data)
        except SpectuneError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise SpectuneError(f"{folder / WEIGHTS} is damaged or missing ({error}): train it again") from None
        adapter = Adapter.load(folder / ADAPTER) if kind == "adapter" else None
        if _digest(data, folder, kind) != config.sha256:
            raise SpectuneError(f"{folder / CONFIG} and the files beside it do not belong together: train it again")
        _check_tensors(tensors, kind, len(config.labels), folder / WEIGHTS)
        calibration = Calibration(config.temperature, config.threshold)
        return Classifier(kind, tuple(config.labels), calibration, config.layer, tensors, config.report, adapter)


class _Config(BaseModel):
    """What is in a classifier.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    library_name: Literal["spectune"]
    format_version: int
    kind: str
    labels: list[str]
    layer: Annotated[int, Field(ge=0, lt=1 << 20)]
    temperature: Annotated[float, Field(gt=0)]
    threshold: float
    report: dict[str, object]
    sha256: str


def _check_tensors(tensors: Mapping[str, Tensor], kind: Kind, labels: int, where: Path) -> None:
    """Raise unless a classifier's tensors fit its labels and each other.

    Raises:
        SpectuneError: they do not.
    """
    sides = tensors["weight"].shape if "weight" in tensors and tensors["weight"].dim() == 2 else (labels, 0)
    shapes = {"mean": (sides[1],), "scale": (sides[1],), "weight": (labels, sides[1]), "bias": (labels,)}
    for key, shape in shapes.items() if kind == "hidden" else ():
        found = tensors.get(key)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32 or not found.isfinite().all():
            raise SpectuneError(f"{where} lacks {key!r}, or it does not fit the labels: train it again")
    for key, sketch in tensors.items():
        if key.startswith("base.") and not fingerprint.is_sketch(sketch):
            raise SpectuneError(f"{key!r} in {where} is no sketch of a weight: train it again")


def _digest(data: bytes, folder: Path, kind: str) -> str:
    """Return the SHA-256 of the tensors and, for the kind "adapter", of the adapter's files."""
    more = folder_digest(folder / ADAPTER) if kind == "adapter" else ""
    return hashlib.sha256(data + more.encode()).hexdigest()


def adapter_scores(
    pool: Pool, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], labels: Sequence[str]
) -> Tensor:
    """Return log p(label | question) under what is active on the model, (prompts x labels)."""
    questions = [labelling_prompt(pool.library, prompt, descriptions=False) for prompt in prompts]
    return label_scores(pool.model, tokenizer, [opened(tokenizer, q) for q in questions], labels)


def regress(states: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (prompts x labels) of a logistic regression on standardised hidden states."""
    features = (states - tensors["mean"]) / tensors["scale"]
    return features @ tensors["weight"].mT + tensors["bias"]


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], layer: int
) -> Tensor:
    """Return the mean over a prompt's tokens of a hidden state of the model, (prompts x hidden), float32 on the CPU.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompts: texts, of which the first 256 tokens are read.
        layer: 0 is the embeddings, n the output of block n.
    """
    rows = [tokenizer(prompt)["input_ids"][:_TOKENS] or [0] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        longest = max(len(rows[i]) for i in part)
        ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in part], device=model.device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in part], device=model.device)
        out = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = out.hidden_states[layer].float()
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found |= dict(zip(part, means.cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def base_sketches(pool: Pool) -> dict[str, Tensor]:
    """Return sketches of a few of the base's weights, by which a classifier knows its base."""
    layers = list(dict.fromkeys(piece.layer for piece in pool.load(pool.library.names[0]).structure))
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    weights = {layer: effective_weight(find_linear(pool.model, layer)).detach() for layer in chosen}
    return {f"base.{layer}": fingerprint.sketch_weight(weight) for layer, weight in weights.items()}
