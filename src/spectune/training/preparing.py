"""A loaded model made ready to train: the adapter on it, activations, shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import set_seed

from spectune.adapters.adapter import Adapter
from spectune.bases.loading import Outline
from spectune.model.adapting import adapt, attach
from spectune.spectral import cache
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.heap import release_memory
from spectune.training import processes
from spectune.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_limit(config: TrainConfig, model: PreTrainedModel | Outline) -> int:
    """Return how many tokens of an example are used: max_length, or the model's context if that is less."""
    return min(config.max_length, getattr(model.config, "max_position_embeddings", config.max_length))


def prepare(config: TrainConfig, model: PreTrainedModel, start_from: Adapter | None = None) -> None:
    """Put the adapter that a run trains on a model, and the model in training mode, sharded if that is wanted."""

    def adapted() -> None:
        set_seed(config.seed)  # the adapter starts the same in every process
        if start_from is not None:
            attach(model, start_from, trainable=True, factored=config.factored)
        else:
            adapt(model, **config.where(), modules_to_save=config.modules_to_save, factored=config.factored)

    if cache.directory() is None:
        with processes.together():
            adapted()
    else:
        processes.main_first(adapted)
    release_memory()  # of decompositions
    checkpoint_activations(model, config.gradient_checkpointing)
    model.train()
    if processes.wants_shards(config.fsdp):
        processes.shard(model)
