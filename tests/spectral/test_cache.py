"""The cache: the same bits, mapped; shared, damaged, full and read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from spectra import weight_like

from spectune.errors import SpectuneError
from spectune.spectral import Request, cache, decompose_many, svd
from spectune.spectral import _many as many
from spectune.spectral._hash import tensor_digest
from spectune.spectral._sound import is_decomposition
from spectune.storage import temporary_beside

TOP = Request("top", 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / "cache"))
    cache._warned.clear()
    return tmp_path / "cache"


@pytest.fixture
def weights():
    return {name: weight_like(60, 40, i) for i, name in enumerate("abc")}


@pytest.fixture
def computed(monkeypatch):
    """Count the decompositions that are computed."""
    count = []
    compute = many._Job.compute

    def counting(self, weight):
        count.append(tuple(weight.shape))
        return compute(self, weight)

    monkeypatch.setattr(many._Job, "compute", counting)
    return count


def files(folder):
    return sorted(folder.glob("??/*.safetensors"))


def same(a, b):
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def run(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )


# -- hits


@pytest.mark.parametrize("kind", ["top", "bottom", "full", "one_sided"])
def test_the_second_time_is_read_and_equal_bit_for_bit(folder, weights, computed, kind):
    request = Request(kind, 4 if kind in ("top", "bottom") else None)
    first = decompose_many(weights, request)
    assert len(computed) == 3
    second = decompose_many(weights, request)
    assert len(computed) == 3
    assert same(first, second)
    assert len(files(folder)) == 3


def test_what_differs_is_another_entry(folder, weights, computed):
    W = weights["a"]
    for request in (
        TOP,
        Request("top", 5),
        Request("top", 4, 1e-3),
        Request("top", 4, 1e-4, "residual"),
        Request("bottom", 4),
    ):
        decompose_many({"a": W}, request)
    changed = W.clone()
    changed[7, 7] = torch.nextafter(changed[7, 7], torch.tensor(9.0))
    for other in (changed, -W, W.T, W.double(), W.bfloat16(), W.reshape(40, 60), W.flip(0)):
        decompose_many({"a": other}, TOP)
    assert len(computed) == 12
    assert len(files(folder)) == 12


def test_equal_weights_share_an_entry_whatever_their_names_and_strides(folder, weights, computed):
    decompose_many({"a": weights["a"]}, TOP)
    decompose_many({"b": weights["a"].clone(), "c": weights["a"].T.contiguous().T}, TOP)
    assert len(computed) == 1


def test_factors_are_mapped_not_copied(folder):
    W = weight_like(600, 300)
    decompose_many({"a": W}, Request("full"))
    found = decompose_many({"a": W}, Request("full"))["a"]
    (path,) = files(folder)
    first, last = found.U.data_ptr(), found.U.data_ptr() + found.U.numel() * 4 - 1
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines() if Path("/proc").is_dir() else []:
        if line.endswith(str(path)):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            mapped.append(start <= first <= last < end)
    assert any(mapped) or not Path("/proc").is_dir()


def test_changing_a_mapped_factor_does_not_change_the_entry(folder, weights):
    decompose_many(weights, TOP)
    found = decompose_many(weights, TOP)
    found["a"].U.zero_()
    assert cache.verify() == []
    assert float(decompose_many(weights, TOP)["a"].U.norm()) == pytest.approx(2)


def test_an_evicted_entry_stays_readable_where_it_is_in_use(folder, weights):
    first = decompose_many(weights, TOP)
    mapped = decompose_many(weights, TOP)
    cache.prune(0)
    assert same(first, mapped)


def test_a_full_decomposition_answers_what_comes_out_the_same(folder, weights, computed):
    W = weights["a"]
    full = decompose_many({"a": W}, Request("full"))["a"]
    assert len(computed) == 1
    top = decompose_many({"a": W}, Request("top", 4, tol=0))["a"]
    bottom = decompose_many({"a": W}, Request("bottom", 4, tol=0))["a"]
    one = decompose_many({"a": W}, Request("one_sided"))["a"]
    assert len(computed) == 1
    assert torch.equal(top.S, full.S[:4])
    assert torch.equal(bottom.Vh, full.Vh[-4:])
    torch.testing.assert_close(one.L @ one.R, W)
    assert torch.equal(one.S, full.S)
    cold = svd(W, 4, "top", tol=0)
    assert all(torch.equal(a, b) for a, b in zip(top, cold, strict=True))


def test_iterated_results_do_not_depend_on_what_is_in_the_cache(folder):
    W = weight_like(400, 400)
    cold = svd(W, 8, "top")
    decompose_many({"a": W}, Request("full"))
    warm = decompose_many({"a": W}, Request("top", 8))["a"]
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


# -- where it is


def test_off(folder, weights, monkeypatch, tmp_path):
    for value in ("off", "0", "OFF"):
        monkeypatch.setenv("SPECTUNE_CACHE", value)
        assert cache.directory() is None
        decompose_many(weights, TOP)
    assert cache.ls() == []
    assert cache.prune(0) == []
    assert cache.verify() == []
    monkeypatch.setenv("SPECTUNE_CACHE", str(folder))
    decompose_many(weights, TOP, cache=False)
    assert not folder.exists()
    decompose_many(weights, TOP, cache=tmp_path / "elsewhere")
    assert not folder.exists()
    assert len(files(tmp_path / "elsewhere")) == 3


def test_default_folders(monkeypatch):
    monkeypatch.delenv("SPECTUNE_CACHE", raising=False)
    monkeypatch.setenv("SPECTUNE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/decompositions")
    monkeypatch.delenv("SPECTUNE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/xdg/spectune/decompositions")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache/spectune/decompositions"


# -- its size


def age(path, seconds):
    """Put the time of an entry's last use into the past."""
    stamp = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(stamp, stamp))


def write_one(weights, name, request=TOP):
    """Return the path of the entry that this writes."""
    before = set(cache.ls())
    decompose_many({name: weights[name]}, request)
    (path,) = {e.path for e in cache.ls()} - {e.path for e in before}
    return path


def test_ls(folder, weights):
    for path in [write_one(weights, name) for name in weights]:
        age(path, 100)
    decompose_many({"a": weights["a"]}, Request("one_sided"))
    entries = cache.ls()
    assert len(entries) == 4
    assert entries[0].kind == "one_sided"
    assert entries[0].rank is None
    assert {(e.kind, e.rank, e.shape) for e in entries[1:]} == {("top", 4, (60, 40))}
    assert all(e.bytes == e.path.stat().st_size and e.key == e.path.stem for e in entries)


def test_what_was_used_longest_ago_goes_first(folder, weights):
    paths = {}
    for days, name in enumerate("abc"):
        paths[name] = write_one(weights, name)
        age(paths[name], 86_400 * (9 - days))
    size = cache.ls()[0].bytes
    decompose_many({"a": weights["a"]}, TOP)  # the oldest, used again
    assert cache.verify() == []  # which is no use
    assert [e.path for e in cache.ls()] == [paths[name] for name in "acb"]
    assert cache.prune(2 * size) == [paths["b"].stem]
    assert [e.path for e in cache.ls()] == [paths[name] for name in "ac"]
    assert cache.prune(0) == [paths[name].stem for name in "ac"]
    assert cache.ls() == []


def wait_for_another_stamp(folder):
    """Return when the file system would stamp a change with a later time."""
    probe = folder / "probe"
    probe.touch()
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        probe.touch()


@pytest.mark.skipif(os.name == "nt", reason="there the time of the last change is that of creation")
def test_within_one_second_the_order_is_that_of_use_all_the_same(folder, weights, monkeypatch):
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now)
    paths = {}
    for name in "abc":
        paths[name] = write_one(weights, name)
        wait_for_another_stamp(folder)
    for used in ("a", "c", "b", "a"):
        decompose_many({used: weights[used]}, TOP)
        wait_for_another_stamp(folder)
    assert len({e.used for e in cache.ls()}) == 1
    assert [e.path for e in cache.ls()] == [paths[name] for name in "abc"]
    assert cache.prune(2 * cache.ls()[0].bytes) == [paths["c"].stem]


@pytest.fixture
def whole_seconds(monkeypatch):
    """A file system that keeps no fractions of a second."""
    stat, utime = os.stat, os.utime

    def coarse(path, **options):
        found = stat(path, **options)
        fields, named = found.__reduce__()[1]
        stamps = {key: value // 10**9 * 10**9 if key.endswith("_ns") else value for key, value in named.items()}
        return os.stat_result(fields, stamps)

    monkeypatch.setattr(cache.os, "stat", coarse)
    monkeypatch.setattr(cache.os, "utime", lambda path, ns: utime(path, ns=tuple(n // 10**9 * 10**9 for n in ns)))


def test_where_every_stamp_is_the_same_the_order_is_by_name_and_the_limit_is_kept(
    folder, weights, whole_seconds, monkeypatch
):
    stat = cache.os.stat

    def standing(path, **options):
        fields, named = stat(path, **options).__reduce__()[1]
        return os.stat_result(fields, {key: 10**18 if key.endswith("_ns") else 1e9 for key in named})

    monkeypatch.setattr(cache.os, "stat", standing)
    monkeypatch.setattr(cache.time, "time", lambda: 1e9)
    first = decompose_many(weights, TOP)
    names = [path.stem for path in files(folder)]
    assert [e.key for e in cache.ls()] == sorted(names, reverse=True)
    assert cache.prune(2 * cache.ls()[0].bytes) == [min(names)]
    assert same(first, decompose_many(weights, TOP))


def test_writing_keeps_the_limit(folder, weights, monkeypatch):
    decompose_many({"a": weights["a"]}, TOP)
    size = cache.ls()[0].bytes
    monkeypatch.setenv("SPECTUNE_CACHE_BYTES", str(2 * size))
    decompose_many(weights, TOP)
    assert len(cache.ls()) == 2
    monkeypatch.setenv("SPECTUNE_CACHE_BYTES", "much")
    with pytest.raises(SpectuneError, match="SPECTUNE_CACHE_BYTES"):
        cache.prune()


# -- damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(position):
    def damage(path):
        data = bytearray(path.read_bytes())
        at = int(position * (len(data) - 1)) if isinstance(position, float) else position
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def rename_fields(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"Vh"', b'"Wh"'))


def claim_another_shape(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[60,4]', b'"shape":[4,60]'))


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip(0), flip(20), flip(0.5), flip(1.0), rename_fields, claim_another_shape],
    ids=["truncated", "empty", "length", "header", "middle", "last byte", "fields", "shape"],
)
def test_damage_repairs_itself(folder, weights, computed, damage):
    first = decompose_many(weights, TOP)
    for path in files(folder):
        damage(path)
    assert same(first, decompose_many(weights, TOP))
    assert len(computed) == 6
    assert same(first, decompose_many(weights, TOP))
    assert len(computed) == 6
    assert cache.verify() == []


@pytest.mark.parametrize("position", [0.3, 0.5, 1.0])
def test_what_changed_under_a_kept_time_is_found(folder, weights, computed, position):
    first = decompose_many(weights, TOP)
    path = files(folder)[0]
    for check in (lambda: decompose_many(weights, TOP), cache.verify):
        status = path.stat()
        flip(position)(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if the disk had changed it
        check()
        assert same(first, decompose_many(weights, TOP))
    assert len(computed) == 5


@pytest.mark.parametrize("kind", ["top", "bottom", "full", "one_sided"])
def test_an_entry_under_another_name_answers_nothing(folder, weights, computed, kind):
    request = Request(kind, 4 if kind in ("top", "bottom") else None)
    first = decompose_many(weights, request)
    one, other, _ = files(folder)
    shutil.copy2(one, other)
    assert cache.verify() == [other.stem]
    assert same(first, decompose_many(weights, request))
    shutil.copy2(one, other)
    assert same(first, decompose_many(weights, request))
    assert len(computed) == 5


def forgeries(W, found):
    """Return what is no decomposition of W, in its shapes or others."""
    names = found._fields
    turned = torch.linalg.qr(weight_like(found[0].shape[1], found[0].shape[1], 7))[0]
    tensors = dict(zip(names, found, strict=True))
    yield {**tensors, names[0]: found[0] * float("nan")}
    yield {**tensors, names[0]: found[0][:, :-1], "S": found.S[:-1], names[2]: tensors[names[2]][:-1]}
    yield {key: value.double() for key, value in tensors.items()}
    yield {**tensors, names[0]: found[0] @ turned}
    yield {**tensors, "S": found.S * 1.01}
    yield {**tensors, "S": found.S.flip(0)}
    yield {**tensors, names[0]: -found[0]}
    one = found[0].clone()
    one[3, 2] += 0.5 * float(found[0].norm())
    yield {**tensors, names[0]: one}
    yield {key: torch.zeros_like(value) for key, value in tensors.items()}
    if len(names) == 3 and names[0] == "U" and len(found.S) < min(W.shape):  # of the other end
        wrong = svd(W, len(found.S), "bottom" if float(found.S[0]) > float(W.norm()) / len(W) ** 0.5 else "top")
        yield dict(zip(names, wrong, strict=True))


@pytest.mark.parametrize("kind", ["top", "bottom", "full", "one_sided"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_what_is_no_decomposition_of_the_weight_answers_nothing(folder, computed, kind, shape):
    W = weight_like(*shape, 3)
    request = Request(kind, 4 if kind in ("top", "bottom") else None)
    first = decompose_many({"w": W}, request)
    name = files(folder)[0].stem
    for count, tensors in enumerate(forgeries(W, first["w"]), start=2):
        kept = {key: value.contiguous() for key, value in tensors.items()}
        assert cache.store(name, kept, shape, request, folder)
        assert same(first, decompose_many({"w": W}, request))
        assert len(computed) == count


def sound_weights():
    for m, n in ((30, 20), (20, 30), (1, 5), (5, 1), (1, 1), (120, 12)):
        W = weight_like(m, n, 5)
        yield from (W, W.double(), W.bfloat16(), W * 1e30, W * 1e-30, torch.zeros(m, n), torch.ones(m, n))
        yield from (torch.eye(m, n), W * torch.logspace(0, -8, n))


@pytest.mark.parametrize("tol", [0, 1e-4, 1e-2, 0.5])
def test_every_decomposition_is_one(tol):
    for W in sound_weights():
        requests = [Request(kind, rank, tol) for kind in ("top", "bottom") for rank in (1, 4) if rank <= min(W.shape)]
        for request in (*requests, Request("full"), Request("one_sided")):
            assert is_decomposition(W, many._Job(request, None).compute(W), request)


@pytest.mark.skipif(os.name == "nt", reason="there modes say less")
def test_an_entry_has_the_mode_of_other_files(folder, weights):
    before = os.umask(0o027)
    try:
        decompose_many(weights, TOP)
        assert {path.stat().st_mode & 0o777 for path in files(folder)} == {0o640}
    finally:
        os.umask(before)


@pytest.mark.parametrize("damage", [truncate, empty, flip(0.5)])
def test_verify_removes_the_damaged_and_only_those(folder, weights, damage):
    decompose_many(weights, TOP)
    bad = files(folder)[1]
    damage(bad)
    assert cache.verify() == [bad.stem]
    assert len(files(folder)) == 2
    assert cache.verify() == []


def test_what_is_no_entry_is_left_alone(folder, weights):
    decompose_many(weights, TOP)
    adapter = folder / "xs" / "adapter_model.safetensors"  # as where SPECTUNE_CACHE names a folder of runs
    adapter.parent.mkdir()
    adapter.write_bytes(b"an adapter")
    moved = folder / "xs" / files(folder)[0].name  # by an entry's name, and not in its place
    files(folder)[0].rename(moved)
    assert len(cache.ls()) == 2
    assert cache.verify() == []
    assert len(cache.prune(0)) == 2
    assert files(folder) == sorted([adapter, moved])


def test_a_file_for_a_folder_is_told(folder):
    folder.write_text("a file, not a folder")
    for command in (cache.ls, cache.verify, cache.prune):
        with pytest.raises(SpectuneError, match="is no folder: give another by --cache"):
            command()


# -- trouble with the disk


def test_a_folder_that_cannot_be_written_warns_once(folder, weights, computed):
    folder.write_text("a file, not a folder")
    with pytest.warns(RuntimeWarning, match="decompositions are not cached") as warned:
        first = decompose_many(weights, TOP)
    assert len(warned) == 1
    assert same(first, decompose_many(weights, TOP))
    assert len(computed) == 6


FULL_DISK = """
    import resource, signal, sys, warnings
    import torch
    from spectra import weight_like
    from spectune.spectral import Request, cache, decompose_many, svd
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the file system takes no more
    W = {str(i): weight_like(60, 40, i) for i in range(5)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = decompose_many(W, Request("full"), cache=sys.argv[1])
    assert torch.equal(found["3"].S, svd(W["3"]).S)
    print(sum("not cached" in str(w.message) for w in caught))
"""


def test_a_full_disk_warns_once_and_leaves_nothing(folder):
    process = run(FULL_DISK, folder)
    assert process.communicate(timeout=600)[0].strip() == "1"
    assert process.returncode == 0
    assert [p for p in folder.glob("**/*") if p.is_file()] == []


def test_where_an_open_file_cannot_be_replaced_the_one_that_is_there_is_kept(folder, weights, computed, monkeypatch):
    first = decompose_many(weights, TOP)

    def locked(source, target):
        raise PermissionError(13, "The process cannot access the file because it is being used", str(target))

    monkeypatch.setattr(cache.os, "replace", locked)
    monkeypatch.setattr(cache, "load", lambda name, folder: None)  # it was not there yet as this process looked
    assert same(first, decompose_many(weights, TOP))
    assert len(computed) == 6
    assert not list(folder.glob("??/.*.tmp"))
    for path in files(folder):
        flip(0.5)(path)
    with pytest.warns(RuntimeWarning, match="decompositions are not cached: .*is being used"):
        assert same(first, decompose_many(weights, TOP))


# -- several processes

WRITER = """
    import hashlib, os, signal, sys
    from spectra import weight_like
    from spectune.spectral import Request, cache, decompose_many
    if sys.argv[2] == "killed":
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    first = 100 if sys.argv[2] == "killed" else 0  # else it might find all that it would write
    weights = {str(i): weight_like(60, 40, first + i) for i in range(30)}
    for _ in range(3):
        found = decompose_many(weights, Request("full"), cache=sys.argv[1])
        if sys.argv[2] == "prunes":
            cache.prune(10_000, cache.Path(sys.argv[1]))
    digest = hashlib.sha256()
    for result in found.values():
        for tensor in result:
            digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_writers_readers_and_pruners_at_once_and_one_killed(folder):
    processes = [run(WRITER, folder, role) for role in ("writes", "prunes", "killed")]
    printed = [process.communicate(timeout=600)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, -9]
    assert len(set(printed[:2])) == 1
    assert cache.verify() == []
    cache.prune()
    assert list(folder.glob("??/.*.tmp")) == []


def test_what_a_living_writer_has_begun_is_left_alone(folder, weights):
    decompose_many(weights, TOP)
    with temporary_beside(files(folder)[0]) as begun:
        cache.prune()
        assert begun.exists()


# -- the digest


def test_every_byte_counts():
    flat = torch.arange(1000, dtype=torch.int32)
    before = tensor_digest(flat)
    for byte in (0, 1, 7, 8, 2000, 3999):
        for bit in (1, 0x80):
            changed = flat.clone()
            changed.view(torch.uint8)[byte] ^= bit
            assert tensor_digest(changed) != before


def test_changes_that_cancel_in_plain_sums_do_not():
    W = weight_like(64, 64)
    digests = {
        tensor_digest(W),
        tensor_digest(-W),
        tensor_digest(W.flip(0)),
        tensor_digest(W.flip(1)),
        tensor_digest(W.T),
    }
    for i, j in ((0, 1), (1, 3), (0, 2), (5, 4095)):  # signs of two entries
        changed = W.clone()
        changed.view(-1)[[i, j]] *= -1
        digests.add(tensor_digest(changed))
    assert len(digests) == 9


def test_the_digest_is_stable():
    digests = [tensor_digest(t) for t in (torch.zeros(0, 4), torch.arange(5), torch.ones(3, 3, dtype=torch.bfloat16))]
    golden = json.loads((Path(__file__).parent / "digests.json").read_text())
    assert digests == golden
