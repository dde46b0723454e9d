"""The folder of a library: what it keeps, what it refuses, and what it makes of damage."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import spectune
from spectune import SpectuneError
from spectune.transformer2.library import Library
from transformer2 import cases


def test_what_was_added_is_read_again(tmp_path):
    library = cases.library(tmp_path, ("svf", "lora:rank=2", "lora_xs:rank=4"), prompts={"ahoy": ["b", "a", "b"]})
    again = Library.open(library.path)
    assert again.names == list(cases.NAMES)
    assert again.records == library.records
    record = again.record("ahoy")
    assert (record.method, record.description, record.prompts) == ("svf", "is for ahoy", 2)
    assert record.bytes == sum(f.stat().st_size for f in again.folder("ahoy").glob("adapter_*"))
    assert again.prompts("ahoy") == ["b", "a"]
    assert again.prompts("plus") == []
    layer = "model.layers.1.mlp.up_proj"
    for name, method, seed in zip(cases.NAMES, ("svf", "lora:rank=2", "lora_xs:rank=4"), (1, 2, 3), strict=True):
        expected = cases.adapter(method, seed).delta(layer)
        torch.testing.assert_close(again.adapter(name).bind(cases.tiny()).delta(layer), expected)


def test_removing_takes_the_files_too(tmp_path):
    library = cases.library(tmp_path)
    folder = library.folder("plus")
    library.remove("plus")
    assert Library.open(library.path).names == ["ahoy", "say"]
    assert not folder.exists()
    library.add("plus", cases.adapter())
    assert "plus" in Library.open(library.path)


def test_an_empty_library_takes_another_base(tmp_path):
    library = cases.library(tmp_path, ("svf",), ("ahoy",))
    library.remove("ahoy")
    library.add("stranger", cases.adapter(model=other_base()))
    assert Library.open(library.path).names == ["stranger"]


def test_a_full_disk_leaves_the_library_as_it_was(tmp_path, monkeypatch):
    library = cases.library(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spectune.Adapter, "save", full)
    with pytest.raises(SpectuneError, match=r"cannot be written \(No space left on device\); the library is as it was"):
        library.add("more", cases.adapter())
    assert Library.open(library.path).names == list(cases.NAMES)


def test_a_folder_of_an_adapter_can_be_added(tmp_path):
    cases.adapter().save(tmp_path / "made")
    library = Library(tmp_path / "library")
    library.add("made", tmp_path / "made", model=cases.tiny())
    assert library.sketches().keys() == library.adapter("made").layers.keys()


def test_an_adapter_that_brings_a_module_whole_is_refused(tmp_path):
    model = cases.tiny()
    spectune.adapt(model, "svf", targets=["q_proj"], modules_to_save=["norm"])
    library = Library(tmp_path / "library")
    with pytest.raises(SpectuneError, match=r"change linear layers only, and this one brings 'model\.norm' whole"):
        library.add("made", spectune.extract(model))
    assert not len(library)


def test_two_adapters_with_one_name_are_refused(tmp_path):
    library = cases.library(tmp_path)
    for name in ("ahoy", "AHOY"):  # one folder on some systems
        with pytest.raises(SpectuneError, match="has an adapter 'ahoy' already"):
            library.add(name, cases.adapter())
    other = Library(library.path)
    Library(library.path).add("new", cases.adapter())
    with pytest.raises(SpectuneError, match="has an adapter 'new' already"):
        other.add("new", cases.adapter())  # added by another process since the index was read


@pytest.mark.parametrize("name", ["none", "None", "../up", "", "a b"])
def test_names_that_cannot_be_are_refused(tmp_path, name):
    with pytest.raises(SpectuneError, match="cannot be an adapter's name"):
        Library(tmp_path).add(name, cases.adapter())


def other_base():
    model = cases.tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    return model


def test_an_adapter_for_another_base_is_refused(tmp_path):
    library = cases.library(tmp_path)
    stranger = cases.adapter(model=other_base())
    with pytest.raises(SpectuneError, match=r"belongs to another base than the library .*q_proj.* differs"):
        library.add("stranger", stranger)
    with pytest.raises(SpectuneError, match="belongs to another base"):
        Library(tmp_path / "new").add("stranger", stranger, model=cases.tiny())
    assert Library.open(library.path).names == list(cases.NAMES)


def test_loras_that_name_different_bases_are_refused(tmp_path):
    library = Library(tmp_path)
    for name, base in (("a", "one"), ("b", "one")):
        lora = cases.adapter("lora:rank=2")
        library.add(name, spectune.Adapter({n: _bare(u) for n, u in lora.layers.items()}, base))
    with pytest.raises(SpectuneError, match=r"belongs to 'two' and the library .* to 'one'"):
        library.add("c", spectune.Adapter({n: _bare(u) for n, u in lora.layers.items()}, "two"))


def _bare(update):
    from dataclasses import replace

    return replace(update, held=None)


def test_no_library_and_an_empty_one_are_told(tmp_path):
    with pytest.raises(SpectuneError, match="there is no library"):
        Library.open(tmp_path / "nowhere")
    library = cases.library(tmp_path, ("svf",), ("ahoy",))
    library.remove("ahoy")
    with pytest.raises(SpectuneError, match="is empty: add an adapter with `spectune library add`"):
        Library.open(library.path)
    with pytest.raises(SpectuneError, match="is empty"):
        spectune.Transformer2(cases.tiny(), library, tokenizer=cases.tokenizer())


def test_an_unknown_name_names_the_nearest(tmp_path):
    with pytest.raises(SpectuneError, match="has no adapter 'ahoi'; did you mean 'ahoy'"):
        cases.library(tmp_path).adapter("ahoi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format_version=2), "format version 1"),
        (lambda index: index.pop("adapters"), "lacks the key 'adapters'"),
        (lambda index: index["adapters"][0].update(name="../up"), "cannot be one"),
        (lambda index: index["adapters"][1].update(name="ahoy"), "in use"),
        (lambda index: index["adapters"][0].update(bytes="many"), "'bytes' .* should be a valid integer"),
    ],
)
def test_a_damaged_index_is_told(tmp_path, change, message):
    library = cases.library(tmp_path)
    path = library.path / "library.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(SpectuneError, match=message):
        Library.open(library.path)
    path.write_text("{")
    with pytest.raises(SpectuneError, match="is not valid JSON"):
        Library.open(library.path)


def test_a_write_that_was_cut_off_leaves_the_library_as_it_was(tmp_path, monkeypatch):
    library = cases.library(tmp_path)

    def fail(self):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Library, "_write", fail)
        with pytest.raises(SpectuneError, match="disk full"):
            library.add("new", cases.adapter())
    again = Library.open(library.path)
    assert again.names == list(cases.NAMES)
    again.add("new", cases.adapter(seed=9))
    assert "new" in Library.open(library.path)


def add_several(path, made, start):
    for i in range(start, start + 3):
        Library(path).add(f"a{i}", made)


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_several_may_add_at_once(tmp_path, monkeypatch, kind):
    write = Library._write

    def slowly(self):
        time.sleep(0.05)  # the index was read before and is written after
        write(self)

    monkeypatch.setattr(Library, "_write", slowly)
    made = cases.adapter().save(tmp_path / "made")
    path = tmp_path / "library"
    if kind == "threads":
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(add_several, [path] * 2, [made] * 2, (0, 3)))
    else:
        processes = [get_context("spawn").Process(target=add_several, args=(path, made, start)) for start in (0, 3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    library = Library.open(path)
    assert sorted(library.names) == [f"a{i}" for i in range(6)]
    assert sorted(folder.name for folder in (path / "adapters").iterdir()) == sorted(library.names)
