"""What spectune takes from PyTorch that is not public, each with what is done where a release has it no longer.

Other private names are asked for where they are used, with `getattr` and a default beside them; these have several
users, or an answer that has to be thought about.  `tests/test_private.py` switches each off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C
_aten = torch.ops.aten


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _in_no_graph() -> int:
    return -1


def _autocast_on_any() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _copy_each(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    for target, source in zip(to, of, strict=True):
        target.copy_(source)


def _forget(callback: Callable[[], None]) -> None:
    """Leave a callback out."""


# whether torch.func sees every operation; not knowing, one writes as if it did: nothing in place, nothing hidden
_in_transform: Callable[[], bool] = getattr(_C, "_are_functorch_transforms_active", _always)

# whether torch.jit.trace writes every operation down, in place or not
_in_trace: Callable[[], bool] = getattr(_C, "_is_tracing", torch.jit.is_tracing)

# the backward pass that runs here, or -1; torch.utils.checkpoint asks the same.  Without it a checkpointed layer
# answers as the model is set when it runs again: another choice where a context was left before the backward pass
graph_task: Callable[[], int] = getattr(_C, "_current_graph_task_id", _in_no_graph)

# public functions ask for one kind of device each
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", _autocast_on_any)

# modes such as a checkpointed region's see every operation of Python otherwise and find nothing in it: time, no more
unseen: Callable[[], AbstractContextManager[None]] = getattr(_C, "DisableTorchFunction", nullcontext)

# one call for many tensors, where each call of Python counts
copy_all: Callable[[Sequence[Tensor], Sequence[Tensor]], object] = getattr(torch, "_foreach_copy_", _copy_each)

# a processor that is not known to multiply bfloat16 is given float32
_bf16: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", _never)
_amx: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", _never)

# the thread of an accelerator's backward pass is none of Python's, and in no context
FOREIGN_THREAD: type = getattr(threading, "_DummyThread", type(None))

# attention on a CPU with the sums that its gradient needs, which scaled_dot_product_attention has and does not return.
# Without one of the three, packed rows go through that one, and a checkpointed region computes attention twice
flash_attention: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu", None
)
flash_attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = getattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)
sdp_choice: Callable[..., int] | None = getattr(torch, "_fused_sdp_choice", None)


_users: Callable[[int], int] | None = getattr(_C, "_storage_Use_Count", None)
_OWN_USERS = 2  # the tensor itself, and the object that is asked


def is_shared(tensor: Tensor) -> bool:
    """Whether something else than a tensor holds its memory, such as a view or an array; True where nobody knows."""
    return _users is None or _users(tensor.untyped_storage()._cdata) > _OWN_USERS


def is_transformed() -> bool:
    """Whether torch.func, differentiation forwards or a trace sees every operation: nothing in place or hidden then."""
    traced = not torch.compiler.is_compiling() and _in_trace()  # which the compiler cannot ask
    return _in_transform() or traced or getattr(forward_ad, "_current_level", 0) >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is many, of each of which torch.func.vmap sees its own: none can be asked for a value."""
    functorch: Any = getattr(_C, "_functorch", None)
    tells = getattr(functorch, "is_batchedtensor", None)
    if tells is None or not _in_transform():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):  # those of other transforms may lie around it
        if tells(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def multiplies_bfloat16() -> bool:
    """Whether this is an Intel or AMD processor with instructions for products of bfloat16."""
    return _bf16() or _amx()


def after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward pass at hand is over; where PyTorch cannot, never."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    getattr(engine, "queue_callback", _forget)(callback)
