"""A batch as training makes it, and its loss, on real tensors or on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.private import flash_attention
from spectune.shared import replaced
from spectune.speed.loss import cross_entropy_sum
from spectune.speed.parts import training_parts
from spectune.training.data.encoding import Example
from spectune.training.data.packing import Packer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """What goes through the model in a step, on each device, and how.

    Args:
        rows: sequences.
        length: tokens of each; for an image model it has no meaning.
        supervised: share of the positions that a causal model computes logits and the loss at.
        gradient_checkpointing: what the backward pass computes again, as in `spectune train`.
    """

    rows: int = 8
    length: int = 512
    supervised: float = 1.0
    gradient_checkpointing: bool | Literal["selective"] = "selective"


def make_inputs(model: PreTrainedModel, batch: Batch, device: str = "cpu") -> dict[str, Tensor]:
    """Return a training batch: a language model's as `spectune train` packs it, with labels; else tokens or images."""
    config = model.config
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
        return {"pixel_values": torch.zeros(batch.rows, getattr(vision, "num_channels", 3), *size, device=device)}
    tokens = torch.ones(batch.rows, batch.length, dtype=torch.int64, device=device)
    if config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens, "labels": torch.ones(tokens.shape, dtype=torch.int64)}
    if not (model.can_generate() and model.get_output_embeddings() is not None):
        return {"input_ids": tokens}
    learned = max(1, round(batch.supervised * batch.length))
    example = Example([1] * batch.length, [False] * (batch.length - learned) + [True] * learned)
    packer = Packer(model, 0)
    packer.shares = False  # the examples of a plan have nothing in common
    inputs = packer([example] * batch.rows)
    return inputs if device == "cpu" else _without_numbers(inputs, model)


def _without_numbers(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Move tokens to the meta device, with a mask at hand, which models would ask numbers for."""
    tokens = inputs.pop("input_ids").to("meta")
    packed = inputs.pop("position_ids", None) is not None
    shape = (1, 1, tokens.shape[1], tokens.shape[1]) if packed else (1, 1, 1, 1)
    dtype = model.dtype if model.config._attn_implementation == "eager" else torch.bool
    return {**inputs, "input_ids": tokens, "attention_mask": torch.empty(shape, dtype=dtype, device="meta")}


def loss_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the loss of training on a batch, or the mean square of what a model without a language head returns."""
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    if labels is not None:
        return cross_entropy_sum(model, inputs, labels)
    output = model(**inputs)
    return (output.logits if "logits" in output else output[0]).float().square().mean()


@contextmanager
def training_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a model attends and norms as in training; on the meta device as a CPU does with numbers."""
    looks = "warn_if_padding_and_no_attention_mask"
    looking = [m for m in model.modules() if model.device.type == "meta" and hasattr(type(m), looks)]
    for module in looking:
        module.__dict__[looks] = lambda *_: None
    with ExitStack() as stack:
        stack.enter_context(training_parts(model))
        if model.device.type == "meta":
            stack.enter_context(_whole_attention.needed())
        try:
            yield
        finally:
            for module in looking:
                del module.__dict__[looks]


def _attends_whole(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what on the meta device has attention as one operation, and elsewhere is `attend`.

    There PyTorch takes attention apart; a CPU does so with dropout or a trained mask only.  It is replaced, since
    what handles calls (TorchFunctionMode) sees none of those that a checkpointed block makes in the backward pass.
    """

    def attend_whole(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attn_mask", args[2] if len(args) > 2 else None)
        dropout = kwargs.get("dropout_p", args[3] if len(args) > 3 else 0.0)
        if query.is_meta and flash_attention is not None and dropout == 0 and (mask is None or not mask.requires_grad):
            return _fused(query, *args, **kwargs)
        return attend(query, *args, **kwargs)

    return attend_whole


_whole_attention = replaced(F, "scaled_dot_product_attention", _attends_whole)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    assert flash_attention is not None
    return flash_attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
