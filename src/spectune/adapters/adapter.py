"""An adapter away from its model: a formal sum of updates for each layer, with its algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch

from spectune.adapters.adding import add_layers
from spectune.adapters.compress import LOSSY, compress, errors_by_rank, to_lora, to_one_rank
from spectune.adapters.contents import Contents
from spectune.adapters.engines import LoRAFormat, check_ranks, check_taken
from spectune.adapters.folder import read_whole
from spectune.adapters.formats import choose
from spectune.adapters.formats.diffusers import save_diffusers
from spectune.adapters.formats.gguf_lora import save_gguf
from spectune.adapters.formats.mlx import save_mlx
from spectune.adapters.formats.peft import is_peft, save_peft
from spectune.adapters.formats.peft_reading import load_peft
from spectune.adapters.hub import card_of, fetch, is_repository, push
from spectune.adapters.joining import joined
from spectune.adapters.terms import as_head
from spectune.errors import SpectuneError
from spectune.layers.modules import effective_weight, find_linear
from spectune.reading import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Path_ = str | PathLike[str]


class Adapter(Contents):
    """A fine-tuned update of a model, off the model: saved, loaded, added, scaled, compressed and converted.

    Args:
        layers: module name -> update.
        base_model: id or folder of the model that it belongs to.
        error: relative Frobenius error ||dW - exact dW|| / ||exact dW|| over all layers, where it came from a
            truncation.
        labels: what a classifier's logits stand for, in their order, where the adapter brings a classifier's head.
        modules: module name -> sum of terms, of the modules other than linear layers that the adapter brings whole.
    """

    @classmethod
    def of(cls, contents: Contents) -> Adapter:
        """Return the adapter with these contents."""
        adapter = cls(contents.layers, contents.base_model, contents.error, contents.labels, contents.modules)
        adapter.architecture, adapter.groups = contents.architecture, contents.groups
        adapter.quantize = contents.quantize
        return adapter

    def __repr__(self) -> str:
        methods = dict.fromkeys(t.method.name for layer in self.layers.values() for t in layer.terms)
        whole = f" and {len(self.modules)} whole modules" if self.modules else ""
        return (
            f"Adapter({'+'.join(methods)} on {len(self.layers)} layers{whole}, {self.parameter_count():,} parameters)"
        )

    def _with(self, **changes: object) -> Adapter:
        """Return the adapter with other contents."""
        kept = ("layers", "base_model", "error", "labels", "modules", "architecture", "groups", "quantize")
        return Adapter(**{**{key: getattr(self, key) for key in kept}, **changes})

    def bind(self, model: torch.nn.Module, *, check: bool = True) -> Adapter:
        """Give the adapter the weights of its base, from which it recomputes bases when asked for dW.

        Args:
            model: its base.
            check: refuse another base than the one it was trained on.

        Raises:
            SpectuneError: a layer is missing in the model, or is another weight than the adapter was trained on.
        """
        weights = {name: effective_weight(find_linear(model, name)).detach() for name in self.layers}
        if check:
            self.check_base(weights)
        self.layers = {name: replace(layer, held=weights[name]) for name, layer in self.layers.items()}
        return self

    # -- algebra

    def __mul__(self, factor: float) -> Adapter:
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise SpectuneError(f"an adapter's weight must be a finite number, not {factor!r}")
        layers = {
            name: replace(layer, terms=tuple(term.scaled(float(factor)) for term in layer.terms))
            for name, layer in self.layers.items()
        }
        modules = {n: [replace(t, weight=t.weight * float(factor)) for t in terms] for n, terms in self.modules.items()}
        return self._with(layers=layers, modules=modules)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __truediv__(self, divisor: float) -> Adapter:
        return self * (1.0 / divisor)

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other

    def __add__(self, other: Adapter) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        if self.labels and other.labels and self.labels != other.labels:
            raise SpectuneError(
                f"adapters whose heads have different labels cannot be added: {', '.join(self.labels)}; "
                f"and {', '.join(other.labels)}"
            )
        mine, other = _alike(self, other)
        layers = dict(mine.layers)
        for name, theirs in other.layers.items():
            ours = layers.get(name)
            layers[name] = theirs if ours is None else add_layers(name, ours, theirs)
        base, error = self.base_model or other.base_model, max(self.error, other.error)
        modules = {n: (*mine.modules.get(n, ()), *other.modules.get(n, ())) for n in {**mine.modules, **other.modules}}
        labels = self.labels or other.labels
        return self._with(layers=layers, base_model=base, error=error, labels=labels, modules=modules)

    def by_layer(self, weights: Mapping[str, float]) -> Adapter:
        """Return the adapter with a weight of its own for each layer, without the layers that have none or 0.

        Modules that the adapter brings whole have weight one.

        Args:
            weights: module name -> factor of its update.

        Raises:
            SpectuneError: the adapter has no such layer, or a weight is not a finite number.
        """
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise SpectuneError(f"an adapter's weight must be a finite number, not {weight!r}, in {name!r}")
        layers = {
            name: replace(self.layer(name), terms=tuple(term.scaled(weight) for term in self.layer(name).terms))
            for name, weight in weights.items()
            if weight
        }
        return self._with(layers=layers, labels=None)

    # -- other forms of the same update

    def compress(self, rank: int) -> Adapter:
        """Return the best LoRA of this rank, from the stacked factors alone; `error` says how far it is.

        Args:
            rank: columns of B and rows of A in each layer (fewer where the layer has fewer).

        Raises:
            SpectuneError: rank below 1, or no basis at hand.
        """
        return Adapter.of(compress(self, rank))

    def to_lora(self, rank: int | None = None) -> Adapter:
        """Return a LoRA with this update: exact where `rank` is None or holds it, the best of that rank otherwise.

        Without a rank each layer takes what it needs: r for LoRA, LoRA-XS and what AdaLoRA kept, 2r for PiSSA and
        MiLoRA, min(out, in) for SVF, SVFT and DoRA.

        Raises:
            SpectuneError: rank below 1, or no basis at hand.
        """
        return Adapter.of(to_lora(self, rank))

    # -- files

    def save(self, path: Path_, *, bases: Literal["none", "embed"] = "none") -> Path:
        """Write the adapter to a folder: PEFT's own format for LoRA and DoRA, spectune's for the rest.

        Args:
            path: the folder, made if need be.
            bases: "embed" stores the frozen tensors too, so that no decomposition is needed to load it; "none" stores
                those alone that another processor would not find again, of a W with equal singular values.

        Returns:
            The folder.

        Raises:
            SpectuneError: the adapter has no layers, or bases are to be embedded that are not at hand.
        """
        if bases not in ("none", "embed"):
            raise SpectuneError(f"bases must be 'none' or 'embed', not {bases!r}")
        return choose.save(self, path_of(path), embed=bases == "embed")

    @staticmethod
    def load(path: Path_, *, revision: str | None = None, token: str | bool | None = None) -> Adapter:
        """Read an adapter's folder, in spectune's or PEFT's format.

        Args:
            path: the folder, or where there is none a repository on the Hugging Face Hub, "user/name".
            revision: branch, tag or commit of the repository.
            token: for a private repository; by default the one that was logged in with.

        Raises:
            SpectuneError: missing, truncated or tampered files, a config that is not understood, or no such
                repository.
        """
        folder = path_of(path)
        if not folder.exists() and is_repository(str(path)):
            folder = fetch(str(path), revision, token)
        return Adapter.of(read_whole(choose.load, folder))

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str = "Upload adapter",
        bases: Literal["none", "embed"] = "none",
        metrics: Mapping[str, float] | None = None,
        datasets: Sequence[str] = (),
        notes: str = "",
    ) -> str:
        """Upload the adapter to the Hugging Face Hub, with a card that says what it is and how it is used.

        Args:
            name: of the repository, "user/name"; it is made if need be.
            private: whether a new repository is; None leaves it to the account.
            token: by default the one that was logged in with.
            revision: the branch, made if need be; None is the main one.
            message: of the commit.
            bases: as for `save`.
            metrics: shown in the card.
            datasets: ids of the data that it was trained on, for the card.
            notes: a paragraph for the card.

        Returns:
            The address of the commit.

        Raises:
            SpectuneError: the hub refuses, or cannot be reached.
        """
        card = card_of(self, name, metrics=metrics, datasets=datasets, notes=notes)
        with TemporaryDirectory(prefix="spectune-push-") as folder:
            written = self.save(folder, bases=bases)
            return push(written, name, private=private, token=token, revision=revision, message=message, card=card)

    def export(
        self,
        path: Path_,
        format: LoRAFormat | None = None,
        *,
        to: str | None = None,
        rank: int | None = None,
        one_rank: bool = False,
        allow_loss: bool = False,
        component: str | None = None,
        config: PreTrainedConfig | None = None,
    ) -> Adapter:
        """Write the adapter as a LoRA (DoRA around LoRA stays DoRA) for other programs and return what was written.

        Args:
            path: the folder, made if need be.
            format: "peft", a folder that PEFT reads, by default; "diffusers", the file that `load_lora_weights` of its
                pipelines reads; "gguf", the file that llama.cpp reads; "mlx", the folder that mlx_lm reads (these two
                have one rank for all layers, and s in B).
            to: in the place of a format the program that is to serve it ("vllm", "sglang", "tgi", "lorax",
                "llama.cpp", "ollama", "mlx", "diffusers"), which must take it.
            rank: the best LoRA of this rank instead of an exact one; its `error` says how far it is.
            one_rank: fill all layers up with zeros to one rank and one alpha, for programs such as llama.cpp that
                read no `alpha_pattern`.
            allow_loss: write it even where that error is above 0.1, which is another adapter.
            component: for diffusers, the pipeline's component that the adapter is of ("unet", "transformer",
                "text_encoder", ...); by default told from the class of its model.
            config: of the base model: for gguf, and for mlx where mlx_lm calls its layers otherwise (GPT-2).

        Raises:
            SpectuneError: an unknown format, program or component, a program that does not take it, no basis at hand,
                modules that the format cannot hold, or a rank that loses too much of the update.
        """
        if to is not None:
            if format is not None:
                raise SpectuneError(f"to={to!r} says the format: leave format out")
            engine = check_taken(to, self, rank)
            format, one_rank = engine.format, one_rank or engine.one_rank
        format = format or "peft"
        if format not in ("peft", "diffusers", "gguf", "mlx"):
            raise SpectuneError(
                f"format must be 'peft', 'diffusers', 'gguf' or 'mlx', not {format!r}; spectune.merge(model) makes a "
                "merged model"
            )
        if format == "gguf" and config is None:
            raise SpectuneError("gguf needs the configuration of the base model: give config=model.config")
        adapter = self if is_peft(self) and rank is None else self.to_lora(rank)
        if not allow_loss and adapter is not self:
            self.check_loss(adapter)
        adapter = adapter if adapter is self else Adapter.of(joined(adapter))
        if to is not None:
            check_ranks(to, adapter)  # of a fused layer, whose parts' ranks add up
        adapter = Adapter.of(to_one_rank(adapter)) if one_rank or format in ("gguf", "mlx") else adapter
        if config is not None and format == "gguf":
            save_gguf(adapter, Path(path), config)
        elif format == "mlx":
            save_mlx(adapter, Path(path), config)
        elif format == "diffusers":
            save_diffusers(adapter, Path(path), component)
        else:
            save_peft(adapter, Path(path))
        return adapter

    def check_loss(self, result: Adapter) -> None:
        """Raise where a LoRA made of this adapter is too far from it to stand for it, telling the error by rank.

        Raises:
            SpectuneError: its relative error is above 0.1.
        """
        if result.error <= LOSSY:
            return
        errors = errors_by_rank(self)
        table = ", ".join(f"{rank}: {error:.2g}" for rank, error in errors.items())
        enough = next(rank for rank, error in errors.items() if error <= LOSSY)
        raise SpectuneError(
            f"the relative error would be {result.error:.2g}, which is another adapter (by rank, {table}): "
            f"take rank {enough}, a merged model (`spectune export --format merged`), or --allow-loss (allow_loss=True)"
        )

    @staticmethod
    def from_peft(path: Path_, *, allow_bin: bool = False) -> Adapter:
        """Read a LoRA, DoRA, converted PiSSA or AdaLoRA folder that PEFT wrote, with the modules that it saved whole.

        Args:
            path: the folder.
            allow_bin: read `adapter_model.bin` where there are no safetensors, tensors alone (`weights_only`).

        Raises:
            SpectuneError: missing or damaged files, or a kind of adapter that is not one of these.
        """
        return Adapter.of(read_whole(lambda folder: load_peft(folder, allow_bin=allow_bin), path_of(path)))


def _alike(ours: Adapter, theirs: Adapter) -> tuple[Adapter, Adapter]:
    """Return two adapters that are to be added, with whole linear layers in one form in both.

    What PEFT saved whole is known to be a linear layer only where the other adapter says so.
    """

    def converted(these: Adapter, others: Adapter) -> Adapter:
        layers, modules = dict(these.layers), dict(these.modules)
        for name, known in others.layers.items():
            brought = all(term.method.replaces for term in known.terms)
            if brought and name in modules and all(heads := [as_head(t, known.conv1d) for t in modules[name]]):
                layers[name] = replace(known, terms=tuple(heads), held=None, base_sketch=None)
                del modules[name]
        return these._with(layers=layers, modules=modules)

    return converted(ours, theirs), converted(theirs, ours)
