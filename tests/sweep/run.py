"""Try every architecture in a process of its own, and write what came of it to docs/architectures.md."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SPECTUNE_CACHE", "off")

import torch
import transformers as tf

from spectune import SpectuneError
from sweep import zoo
from sweep.check import REFUSED, RIGHT, SKIPPED, WRONG, Verdict, check

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
SECONDS, BYTES = 120, 6 << 30


def _one(kind: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    try:
        model, inputs = zoo.build(kind)
        verdict = check(model, inputs)
    except Exception as error:  # of the model, the config or the batch, not of what is tried
        verdict = _not_built(error)
    pipe.send(verdict)


def _not_built(error: BaseException) -> Verdict:
    trace, ours = error.__traceback__, False
    while trace is not None:
        ours |= "/spectune/" in trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if isinstance(error, SpectuneError):
        return Verdict(REFUSED, REFUSED, 0, 0, str(error))
    return Verdict(WRONG if ours else SKIPPED, "", 0, 0, text)


def try_one(kind: str, seconds: float = SECONDS) -> Verdict:
    """Return what came of a model type, tried in a process of its own."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_one, args=(kind, there))
    process.start()
    there.close()
    try:
        verdict = here.recv() if here.poll(seconds) else None
    except EOFError:
        verdict = Verdict(SKIPPED, "", 0, 0, "its process ended")
    if verdict is None:
        verdict = Verdict(SKIPPED, "", 0, 0, f"more than {seconds:.0f} s")
    process.kill()
    process.join()
    return verdict


def page(found: dict[str, Verdict]) -> str:
    """Return the page."""
    known = zoo.classes()
    built = {k: v for k, v in found.items() if v.whole != SKIPPED}
    counts, rows = Counter(v.whole for v in built.values()), Counter(v.rows for v in built.values())
    lines = [
        "# Architectures",
        "",
        "Written by `make sweep`. A tiny random model of every type that the installed transformers has is built from",
        "its config and adapted with LoRA: one step, every layer that has a part gets its gradient; saved, and loaded",
        "onto a fresh base; two adapters in two rows of a batch, each as alone, or refused with a reason; detached, to",
        "the last bit; merged, saved by transformers and loaded again. *Idle* layers have no part in what the batch",
        "asks for, such as a vision tower before text.",
        "",
        f"transformers {tf.__version__}: {len(known)} types, {len(found)} tried, {len(built)} of them built. All: "
        + ", ".join(f"{n} {what}" for what, n in counts.most_common())
        + ". Rows: "
        + ", ".join(f"{n} {what}" for what, n in rows.most_common() if what)
        + ".",
        "",
        "| type | class | kind | layers | idle | whole | rows | why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, v in sorted(built.items(), key=lambda item: (item[1].whole == RIGHT, item[0])):
        task, cls = known[kind]
        why = _plain(v.why)
        lines.append(f"| {kind} | {cls} | {task} | {v.layers} | {v.idle or ''} | {v.whole} | {v.rows} | {why} |")
    lines += ["", "## Not built", "", "| type | class | why |", "|---|---|---|"]
    for kind, v in sorted(found.items()):
        if v.whole == SKIPPED:
            lines.append(f"| {kind} | {known[kind][1]} | {_plain(v.why)} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Return a text that stands in a table of Markdown as it is."""
    return text.replace("|", "\\|").replace("[", "\\[")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to go on from and to add to")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    found: dict[str, Verdict] = {}
    if options.results and options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            kind, *verdict = json.loads(line)
            found[kind] = Verdict(*verdict)
    check(*zoo.build("llama"))  # what this imports, processes need not
    for kind in options.kinds or zoo.classes():
        if kind in found and not options.kinds:
            continue
        started = time.monotonic()
        found[kind] = try_one(kind)
        print(f"{kind:28} {time.monotonic() - started:5.1f} s  {found[kind]}", flush=True)
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([kind, *found[kind]]) + "\n")
    options.page.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
