"""Modules that answer the rows of a batch apart, those of one choice at a time, where their layers cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.layouts import Layouts, Path
from spectune.layers.rows import Rows
from spectune.layers.selection import Selection, within
from spectune.model.exchange import exchanged
from spectune.model.row_trial import leaves, structure_of, walk

T = TypeVar("T")


@contextmanager
def answering_apart(shared: Sequence[Selection], layouts: Layouts, rows: Rows) -> Iterator[Callable[[], None]]:
    """Within the context, once what it gives is called, have modules answer rows apart where their layers need it."""
    done: set[nn.Module] = set()
    with ExitStack() as undo:

        def begin() -> None:
            for layer, module in layouts.apart.items():
                if module not in done and not rows.same(layer):
                    done.add(module)
                    wrap = partial(partial, _forward, shared, layouts, module)
                    undo.enter_context(exchanged(module, "forward", wrap))

        yield begin


def _forward(
    shared: Sequence[Selection],
    layouts: Layouts,
    module: nn.Module,
    forward: Callable[..., T],
    *args: object,
    **kwargs: object,
) -> T:
    """Return what a module makes of all rows, put together from what it makes of those of each choice."""
    rows = shared[0].scope().choice
    if not isinstance(rows, Rows) or all(rows.same(layer) for layer, m in layouts.apart.items() if m is module):
        return forward(*args, **kwargs)
    tensors = dict(leaves((args, kwargs)))
    plan = layouts.plans[module].get(structure_of(tensors))
    count = rows.count or len(rows.mixtures)
    if plan is None or any(p and tensors[path].shape[p.axis] % count for path, p in plan.taken.items()):
        raise SpectuneError(
            f"rows cannot have different adapters in {type(module).__name__}: it was called in another way than in the "
            "pass that rows were told apart by"
        )
    outputs, order, counts = [], [], []
    for mixture, wanted in rows.groups():

        def taken(path: Path, value: Any, wanted: Sequence[int] = wanted) -> Any:
            layout = plan.taken.get(path)
            if layout is None:
                return value
            return layout.take(value, count, torch.tensor(wanted, device=value.device))

        some_args, some_kwargs = walk((args, kwargs), taken)
        with within(shared, mixture):
            outputs.append(forward(*some_args, **some_kwargs))
        order += wanted
        counts.append(len(wanted))
    places = torch.tensor(order).argsort()
    each = [dict(leaves(output)) for output in outputs]

    def joined(path: Path, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return plan.given[path].join([found[path] for found in each], counts, places.to(value.device))

    return walk(outputs[0], joined)
