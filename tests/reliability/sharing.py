"""Several processes and threads at one folder: `cd tests && python -m reliability.sharing`.

A cache, a library, an adapter's folder and a comparison are written by several at once, while others read them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import spectune
from reliability import commands, kills, samples
from spectune import Adapter, Library
from spectune.spectral import Request, cache, decompose_many


def at_once(work: Callable[[int], object], processes: int, threads: int = 1) -> None:
    """Run work(0), work(1), ... in processes of so many threads each, and wait for all.

    Raises:
        AssertionError: one failed.
    """
    children = []
    for process in range(processes):
        child = os.fork()
        if child == 0:
            failed: list[str] = []

            def one(number: int, failed: list[str] = failed) -> None:
                try:
                    work(number)
                except BaseException:
                    failed.append(traceback.format_exc())

            begun = [threading.Thread(target=one, args=(process * threads + i,)) for i in range(threads)]
            for thread in begun:
                thread.start()
            for thread in begun:
                thread.join()
            os.write(2, "".join(failed).encode())
            os._exit(1 if failed else 0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


def one_cache(rounds: int) -> None:
    """Have processes with threads compute, read, verify and evict the same entries."""
    weights = {str(i): torch.randn(30, 20, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    alone = decompose_many(weights, Request("full"), cache=False)
    with tempfile.TemporaryDirectory() as folder:

        def work(number: int) -> None:
            for i in range(rounds):
                found = decompose_many(weights, Request("full"), cache=folder)
                for name, expected in alone.items():
                    assert torch.equal(found[name].U, expected.U)
                    assert torch.equal(found[name].Vh, expected.Vh)
                if number == 0 and i % 3 == 0:
                    cache.prune(20_000, Path(folder))
                if number == 1:
                    assert cache.verify(Path(folder)) == []

        at_once(work, 3, 2)
        assert cache.verify(Path(folder)) == []
        assert not list(Path(folder).rglob("*.tmp"))


def one_library(rounds: int) -> None:
    """Have processes add, read and remove adapters of one library."""
    with tempfile.TemporaryDirectory() as folder:

        def work(number: int) -> None:
            for i in range(rounds):
                library = Library(folder)
                library.add(f"a-{number}-{i}", samples.adapter("svf", 1), prompts=["x"])
                if i % 2:
                    Library(folder).remove(f"a-{number}-{i - 1}")
                found = Library(folder)
                mine = [name for name in found.names if name.startswith(f"a-{number}-")]
                assert mine
                assert found.adapter(mine[-1]).parameter_count() == samples.adapter("svf", 1).parameter_count()

        at_once(work, 4)
        left = Library(folder)
        kept = {f"a-{number}-{i}" for number in range(4) for i in range(rounds) if i % 2 or i == rounds - 1}
        assert set(left.names) == kept, set(left.names) ^ kept
        for name in left.names:
            left.adapter(name)


def one_adapter(rounds: int) -> None:
    """Have processes save two adapters to one folder while others read it."""
    known = {kills.values(kills.OLD), kills.values(kills.NEW)}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "a"
        kills.OLD.save(folder)

        def work(number: int) -> None:
            for i in range(rounds):
                if number < 2:
                    (kills.OLD if (number + i) % 2 else kills.NEW).save(folder)
                else:
                    assert kills.values(Adapter.load(folder)) in known

        at_once(work, 4)
        assert not list(folder.glob(".*.tmp"))


def answer() -> str:
    """Return a digest of what a few methods answer on one model, decomposed anew."""
    digest = hashlib.sha256()
    x = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    for method in (
        "svf",
        "pissa:rank=4",
        "milora:rank=4",
        "lora_xs:rank=4",
        "svft:pattern=random,width=2",
        "vera:rank=4",
    ):
        model = torch.nn.Sequential(torch.nn.Linear(60, 90)).eval()
        W = torch.randn(90, 60, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            model[0].weight.copy_(W)
            model[0].bias.zero_()
        spectune.adapt(model, method)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # not where it starts, which is random in some
                    parameter.fill_(0.1)
            digest.update(model(x).numpy().tobytes())
    return digest.hexdigest()


def one_answer() -> None:
    """Have processes and threads answer, each after a decomposition of its own: the same to the last bit."""
    os.environ["SPECTUNE_CACHE"] = "off"
    expected = answer()

    def work(number: int) -> None:
        torch.manual_seed(number)
        assert answer() == expected

    at_once(work, 3, 3)


def one_comparison() -> None:
    """Have processes run one comparison in one folder."""
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as other:
        commands.compare(Path(other))
        at_once(lambda number: commands.compare(Path(root)), 3)
        assert commands.read_compare(Path(root)) == commands.read_compare(Path(other))


def main() -> None:
    """Run all of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    one_cache(20)
    print("cache: 3 processes of 2 threads", flush=True)
    one_library(10)
    print("library: 4 processes", flush=True)
    one_adapter(60)
    print("adapter: 2 writers, 2 readers", flush=True)
    one_answer()
    print("answers: 3 processes of 3 threads", flush=True)
    one_comparison()
    print("comparison: 3 processes", flush=True)


if __name__ == "__main__":
    main()
