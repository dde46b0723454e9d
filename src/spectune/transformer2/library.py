"""A library of adapters on one base: a folder with an index, a subfolder for each adapter, and sketches of the base."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import CONFIG, WEIGHTS, folder_digest
from spectune.errors import SpectuneError, nearest
from spectune.layers.modules import effective_weight, find_linear
from spectune.reading import check_memory, check_tensors_file, parsed, path_of, read_json
from spectune.storage import collect_temporaries, locked, save_tensors, telling_of_full_disks, write_atomically
from spectune.transformer2.packed import structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX, BASE, PROMPTS, LOCK = "library.json", "base.safetensors", "prompts.json", ".lock"
NONE = "none"  # the label of a prompt that is for no adapter
EMPTY = "the library {!r} is empty: add an adapter with `spectune library add`"
_VERSION = 1
_KEYS = ("library_name", "format_version", "base_model_name_or_path", "adapters")


_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")


class _Listed(BaseModel):
    """What the index holds of an adapter."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str
    method: str
    parameters: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    prompts: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Index(BaseModel):
    """What is in a library.json."""

    model_config = ConfigDict(extra="forbid")

    library_name: str
    format_version: int
    base_model_name_or_path: str | None
    adapters: Annotated[list[_Listed], Field(max_length=100_000)]


class Record(NamedTuple):
    """What the index says of an adapter.

    Args:
        name: its name, which is also its label and its folder in `adapters/`.
        description: what it is for, as the prompt strategy tells the model.
        method: the methods of its terms.
        parameters: trained values.
        bytes: of its two files.
        prompts: how many example prompts are kept beside it.
        sha256: of its two files, by which a replacement is known.
    """

    name: str
    description: str
    method: str
    parameters: int
    bytes: int
    prompts: int
    sha256: str


class Library:
    """Adapters on one base in a folder; what is asked for is read when it is asked for.

    Args:
        path: the folder, made by the first `add`.

    Raises:
        SpectuneError: an index that is damaged or of another version.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = path_of(path)
        self.base_model: str | None = None
        self._records: dict[str, Record] = {}
        self._base: dict[str, Tensor] | None = None
        if self.path.is_dir():
            collect_temporaries(self.path)
        self._read()

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Library:
        """Return a library that is there.

        Raises:
            SpectuneError: the folder has no index, or the library is empty.
        """
        library = cls(path)
        if not (library.path / INDEX).exists():
            raise SpectuneError(f"there is no library in {str(path)!r}: make one with `spectune library add`")
        if not len(library):
            raise SpectuneError(EMPTY.format(str(path)))
        return library

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self._records)

    @property
    def records(self) -> list[Record]:
        """What the index says of each adapter."""
        return list(self._records.values())

    def record(self, name: str) -> Record:
        """Return what the index says of an adapter.

        Raises:
            SpectuneError: the library has none of that name; the nearest are listed.
        """
        if name not in self._records:
            raise SpectuneError(f"the library {str(self.path)!r} has no adapter {name!r}{nearest(name, self.names)}")
        return self._records[name]

    def folder(self, name: str) -> Path:
        """Return the folder of an adapter."""
        return self.path / "adapters" / self.record(name).name

    def adapter(self, name: str) -> Adapter:
        """Read an adapter, which must be the one that the index knows, or that another process put in its place.

        Raises:
            SpectuneError: no such adapter, or damaged or changed files.
        """
        for last in (False, True):
            adapter = Adapter.load(self.folder(name))
            if folder_digest(self.folder(name)) == self.record(name).sha256:
                return adapter
            if not last:
                self._read()  # another process may have replaced it
        raise SpectuneError(
            f"the files of {name!r} in the library {str(self.path)!r} are not those that were added: remove it and add "
            "it again"
        )

    def prompts(self, name: str) -> list[str]:
        """Return the example prompts of an adapter.

        Raises:
            SpectuneError: no such adapter, or a damaged file.
        """
        if not self.record(name).prompts:
            return []
        prompts = read_json(self.folder(name) / PROMPTS)
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise SpectuneError(f"{self.folder(name) / PROMPTS} is not a list of texts")
        return prompts

    def sketches(self) -> Mapping[str, Tensor]:
        """Return the sketches of the base's weights, by layer, as far as the adapters' files told them.

        Raises:
            SpectuneError: a damaged file.
        """
        if self._base is None:
            where = self.path / BASE
            try:
                if where.exists():
                    check_tensors_file(where)
                    check_memory(where, "the sketches of the base cannot be read")
                self._base = load_file(where) if where.exists() else {}
            except SpectuneError:
                raise
            except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
                raise SpectuneError(f"{where} is damaged ({error}); delete it and add the adapters anew") from None
            strange = next((layer for layer, sketch in self._base.items() if not fingerprint.is_sketch(sketch)), None)
            if strange is not None:
                self._base = None
                raise SpectuneError(
                    f"{strange!r} in {where} is no sketch of a weight; delete it and add the adapters anew"
                )
        return self._base

    def add(
        self,
        name: str,
        adapter: Adapter | str | PathLike[str],
        description: str = "",
        prompts: Sequence[str] = (),
        model: PreTrainedModel | None = None,
    ) -> Record:
        """Copy an adapter into the library.

        Args:
            name: letters, digits, '-' and '_'; the label that the strategies give.
            adapter: the adapter or its folder.
            description: what it is for.
            prompts: examples of what it is for, such as the prompts that it was trained on.
            model: the base; where given, the adapter is checked against its weights.

        Raises:
            SpectuneError: a name in use, a name that cannot be one, an adapter for another base, or one with modules
                that it brings whole.
        """
        if not _NAME.fullmatch(name) or name.lower() == NONE:
            raise SpectuneError(
                f"{name!r} cannot be an adapter's name in a library; give one (--name) of letters, digits, "
                f"'-' and '_', not {NONE!r}"
            )
        loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        structure_of(loaded)  # what no strategy could use is not taken
        with self._alone(), telling_of_full_disks(self.path, "the library is as it was; free some space"):
            taken = next((other for other in self._records if other.lower() == name.lower()), None)
            if taken is not None:
                raise SpectuneError(
                    f"the library {str(self.path)!r} has an adapter {taken!r} already: remove it or choose another name"
                )
            base = self._checked_base(name, loaded, model)
            folder = self.path / "adapters" / name
            if folder.is_symlink():
                raise SpectuneError(f"{folder} is a symbolic link, through which nothing is written: remove it")
            if folder.exists():  # left by a write that was cut off before the index knew of it
                shutil.rmtree(folder)
            loaded.save(folder)
            kept = list(dict.fromkeys(prompts))
            if kept:
                write_json(folder / PROMPTS, kept)
            methods = dict.fromkeys(term.method.name for layer in loaded.layers.values() for term in layer.terms)
            size = sum((folder / file).stat().st_size for file in (CONFIG, WEIGHTS))
            told = (name, description, "+".join(methods), loaded.parameter_count(), size, len(kept))
            record = Record(*told, folder_digest(folder))
            if base.keys() - self.sketches().keys():
                self._base = {**base, **self.sketches()}
                sketches = {layer: sketch.clone() for layer, sketch in self._base.items()}
                write_atomically(self.path / BASE, lambda path: save_tensors(sketches, path))
            self.base_model = self.base_model or loaded.base_model
            self._records[name] = record
            self._write()
            return record

    def remove(self, name: str) -> None:
        """Take an adapter out of the library and delete its files.

        Raises:
            SpectuneError: no such adapter.
        """
        with self._alone():
            folder = self.folder(name)
            del self._records[name]
            if not self._records:  # the next adapter says which base it is
                self.base_model = None
            self._write()
            if not self._records:
                self._base = {}
                (self.path / BASE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the context no other process changes the library, and what others did before is known."""
        with locked(self.path / LOCK):
            self._base = None
            self._read()
            yield

    def _checked_base(self, name: str, adapter: Adapter, model: PreTrainedModel | None) -> dict[str, Tensor]:
        """Return the sketches of the base that an adapter tells of, which must be those of the library."""
        if model is not None:
            weights = {layer: effective_weight(find_linear(model, layer)).detach() for layer in adapter.layers}
            adapter.check_base(weights)
            base = {layer: fingerprint.sketch_weight(weight) for layer, weight in weights.items()}
        else:
            found = {layer: update.base() for layer, update in adapter.layers.items()}
            base = {layer: sketch for layer, sketch in found.items() if sketch is not None}
        known = self.sketches()
        for layer in base.keys() & known.keys():
            if not fingerprint.same_weight(base[layer], known[layer]):
                raise SpectuneError(
                    f"the adapter {name!r} belongs to another base than the library {str(self.path)!r}: the weight of "
                    f"{layer!r} differs; keep a library for each base"
                )
        strangers = adapter.base_model and self.base_model and adapter.base_model != self.base_model
        if strangers and not base.keys() & known.keys():
            raise SpectuneError(
                f"the adapter {name!r} belongs to {adapter.base_model!r} and the library {str(self.path)!r} to "
                f"{self.base_model!r}: keep a library for each base, or show that they are one with --base"
            )
        return base

    def _read(self) -> None:
        where = self.path / INDEX
        if not where.exists():
            return
        index = parsed(_Index, read_json(where), str(where))
        if index.library_name != "spectune" or index.format_version != _VERSION:
            raise SpectuneError(f"{where} is not a library of format version {_VERSION}: update spectune")
        records: dict[str, Record] = {}
        for one in index.adapters:
            record = Record(**one.model_dump())
            taken = record.name.lower() in [name.lower() for name in records]
            if not _NAME.fullmatch(record.name) or record.name.lower() == NONE or taken:
                raise SpectuneError(f"{where} has the name {record.name!r:.80}, which is in use or cannot be one")
            records[record.name] = record
        self.base_model, self._records = index.base_model_name_or_path, records

    def _write(self) -> None:
        values = ("spectune", _VERSION, self.base_model, [record._asdict() for record in self.records])
        write_json(self.path / INDEX, dict(zip(_KEYS, values, strict=True)))


def write_json(path: Path, document: object) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))
