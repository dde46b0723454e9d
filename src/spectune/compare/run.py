"""A comparison from its configuration to its report."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from spectune.compare.bench import Bench
from spectune.compare.candidates import BASE, baseline, candidates
from spectune.compare.config import ONCE, RECORDS, CompareConfig, check_folder, digest
from spectune.compare.report.document import document
from spectune.compare.report.model import Document
from spectune.compare.room import check_room
from spectune.compare.study import Study, beforehand, work
from spectune.compare.trial import Result, Results
from spectune.errors import SpectuneError, need
from spectune.pages.about import describe
from spectune.storage import write_atomically
from spectune.training import record

_POLL = 0.5
Tell = Callable[[int, int, str], None]  # trials done, trials in all, and what ended last


def compare(config: CompareConfig, tell: Tell = lambda done, total, last: None) -> Document:
    """Run every trial that has no result yet, and write the report.

    Args:
        config: the comparison.
        tell: told how far it is.

    Returns:
        The document that is in report.json.

    Raises:
        SpectuneError: bad data, a wrong value, another comparison in the folder, a missing package, or no trial that
            ran to its end.
    """
    from spectune.compare.report.files import write_report  # with matplotlib, which workers go without

    _check_packages(config)

    check_folder(config)
    too_large = check_room(config)
    if config.baseline in too_large:
        raise SpectuneError(f"baseline: {config.baseline} takes more memory than there is: give another")
    if too_large:
        config = config.model_copy(update={"methods": [m for m in config.methods if m not in too_large]})
    bench = Bench(config)
    records = record.digest([{name: part} for name, part in bench.parts.records.items()])
    check_folder(config, records)
    methods, notes = candidates(config, bench.model)
    against = baseline(config, methods, bench.model)
    if against is not None:  # what can be told is told by its runs
        methods = [against, *(method for method in methods if method != against)]
    notes += [f"{method} is left out: it takes more memory than there is" for method in too_large]
    folder = Path(config.output)
    study = Study(config, methods, _opened(config, folder, records))

    can_tell: list[str] = []

    def told(last: str = "") -> None:
        done, total = study.count()
        tell(done, total, last)
        if not can_tell and (sentence := study.told()) is not None:
            can_tell.append(sentence)
            tell(done, total, sentence)

    warnings = beforehand(config, len(bench.parts.test))
    for sentence in warnings:
        tell(*study.count(), sentence)
    _run(config, methods, study, bench, told)
    notes += can_tell or warnings
    stages = [stage(method) for method in methods for stage in (study.starts, study.searches)]
    searches = [result for trials in stages for _, result in trials if result is not None]
    finals = [result for method in methods for result in _finals(study, method)]
    if study.results.corrupt:
        notes.append(f"could not be read and ran again: {', '.join(sorted(set(study.results.corrupt)))}")
    made = document(_header(config, bench, methods, against, notes, study.seeds()), finals, searches)
    given: str = made.config
    write_atomically(folder / "compare.yaml", lambda path: path.write_text(given, encoding="utf-8"))
    write_report(made, folder)
    return made


def _opened(config: CompareConfig, folder: Path, records: str) -> Results:
    """Return the results that a comparison's folder has; it says from now on whose they are."""
    settings = config.settings()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "trials", digest(settings))
    if config.overwrite or config.retry:
        results.clear(failed=not config.overwrite)
    text = json.dumps({**settings, RECORDS: records}, indent=1) + "\n"
    write_atomically(folder / "settings.json", lambda path: path.write_text(text, encoding="utf-8"))
    return results


def _finals(study: Study, method: str) -> list[Result]:
    done = [result for _, result in study.finals(method) if result is not None]
    if not done:  # no learning rate ran to its end
        tried = [*study.timed(method), *study.searches(method)]
        failed = [r for _, r in tried if r is not None and r["error"] is not None]
        return [{**failed[0], "kind": "final", "method": method}] if failed else []
    return done


def _check_packages(config: CompareConfig) -> None:
    need("scipy", "compare", "'spectune[compare]'")
    if config.launcher == "ray":
        need("ray", "launcher: ray", "'spectune[ray]'")


def _run(config: CompareConfig, methods: list[str], study: Study, bench: Bench, told: Callable[..., None]) -> None:
    told()
    if not study.pending():
        return
    if config.workers == 1 and config.launcher == "local":
        work(config, methods, study.results.settings, bench, lambda result: told(_said(result, config)))
        return
    bench.release()
    start = _ray if config.launcher == "ray" else _processes
    alive = start(config, methods, study.results.settings)
    while study.pending():
        told()
        if not alive():
            raise SpectuneError(
                "every worker was killed or failed; is there too little memory for so many? give fewer workers: the "
                "same command goes on where they stopped"
            )
        time.sleep(_POLL)
    told()


def _said(result: Result, config: CompareConfig) -> str:
    lr = "" if result["lr"] is None else f" at {result['lr']:g}"
    if result["error"] is not None:
        return f"{result['method']}{lr}: {result['error']}"
    if result["kind"] == "start":
        return f"{result['method']}: the search begins at {result['start']:g}: {result['reason']}"
    if result["kind"] == "time":
        return f"{result['method']}: {result['step_seconds']:.3g} s a step"
    if result["kind"] == "final":
        return f"{result['method']}{lr}: test {config.measure} {result['test'][config.measure]:.4f}"
    key = config.searched_by
    dropped = f", dropped at step {result['steps']}" if result["pruned"] else ""
    return f"{result['method']}{lr}: validation {key} {result['validation'][key]:.4f}{dropped}"


def _processes(config: CompareConfig, methods: list[str], settings: str) -> Callable[[], bool]:
    """Start workers on this machine, and return what says whether one of them lives."""
    context = multiprocessing.get_context("spawn")
    arguments = (config.model_dump(exclude_unset=True), methods, settings, _threads(config.workers))
    workers = [context.Process(target=_process, args=arguments, daemon=True) for _ in range(config.workers)]
    for process in workers:
        process.start()
    return lambda: any(process.is_alive() for process in workers)


def _process(*arguments: Any) -> None:
    """Take part as a process that ends in peace where it is interrupted, or terminated with the one that started it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        worker(*arguments)


def _ray(config: CompareConfig, methods: list[str], settings: str) -> Callable[[], bool]:
    """Start workers on a Ray cluster, all of whose machines must see the output folder."""
    import ray

    if not ray.is_initialized():
        ray.init(address=config.address, include_dashboard=False, log_to_driver=False)
    threads = _threads(config.workers) if config.address is None else (os.cpu_count() or 1)
    values = {**config.model_dump(exclude_unset=True), "output": str(Path(config.output).absolute())}
    remote = ray.remote(num_cpus=1, max_retries=0)(worker)
    waiting = [remote.remote(values, methods, settings, threads) for _ in range(config.workers)]
    return lambda: len(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]) < len(waiting)


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def worker(values: dict[str, Any], methods: list[str], settings: str, threads: int) -> None:
    """Take part in a comparison, as one of its processes."""
    torch.set_num_threads(threads)
    config = CompareConfig(**values)
    _check_packages(config)
    work(config, methods, settings)


def _header(
    config: CompareConfig, bench: Bench, methods: list[str], against: str | None, notes: list[str], seeds: int
) -> dict[str, object]:
    about: dict[str, Any] = describe()
    kept = (config.model_fields_set | {"methods"}) - set(ONCE)
    given = {k: v for k, v in config.model_dump().items() if k in kept}
    notes += bench.parts.notes
    for name, count in bench.parts.cut.items():
        if count:
            notes.append(f"{count} records of {name} were cut to {config.max_length} tokens")
    for name, count in bench.parts.dropped.items():
        if count:
            notes.append(f"{count} records of {name} had nothing to learn from and were left out")
    if seeds > 1 and BASE in methods and not bench.has_new_head:
        notes.append("the base as it is has nothing to train: its runs are the same")
    return {
        "label": f"{config.model} on {Path(str(config.data)).stem}",
        "model": config.model,
        "data": str(config.data),
        "task": config.task,
        "metric": config.measure,
        "greater_is_better": config.greater_is_better,
        "baseline": against,
        "seeds": list(range(config.seed, config.seed + seeds)),
        "steps": bench.steps,
        "until": config.until,
        "equal": config.equal,
        "searched_by": config.searched_by,
        "batch_size": config.batch_size * config.gradient_accumulation_steps,
        "split": {name: len(part) for name, part in bench.parts.records.items()},
        "folds": len(bench.parts.folds),
        "budget": config.budget,
        "general": config.general,
        "versions": {"python": about["python"], **about.pop("versions")},
        "date": about.pop("date"),
        "machine": about,
        "config": yaml.safe_dump(given, sort_keys=False),
        "command": f"spectune compare {shlex.quote(str(Path(config.output) / 'compare.yaml'))}",
        "notes": notes,
    }
