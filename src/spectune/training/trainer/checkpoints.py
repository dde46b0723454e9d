"""Checkpoints of the adapter alone, for transformers.Trainer and every trainer that is built on it."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import transformers
from huggingface_hub import upload_folder
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError
from spectune.layers.shards import whole
from spectune.model.lifecycle import extract
from spectune.storage import publish, save_tensors, telling_of_full_disks
from spectune.training import processes
from spectune.training.trainer.checkpoint_files import (
    MANIFEST,
    OPTIMIZER,
    SCHEDULER,
    STATE,
    TRAINER,
    check_files,
    damaged,
    digests,
)
from spectune.training.trainer.silent import Calls, OnSilent, check_gradients
from spectune.training.trainer.states import adapter_state, optimizer_state, put_adapter_state, put_optimizer_state

_NOT_UPLOADED = [".*", "_*", "checkpoint-*", "training_args.bin"]
_PARTIAL = ".{}.partial"
T = TypeVar("T")


def trainer_for(kind: type[T], adapter: str = "default") -> type[T]:
    """Return a trainer's class that saves, resumes from and pushes the adapter alone, and never the base.

    Works for transformers.Trainer and what is built on it, TRL's SFTTrainer, DPOTrainer and GRPOTrainer among them.
    `spectune.Trainer` is `trainer_for(transformers.Trainer)`.

    Args:
        kind: the trainer's class.
        adapter: the name that the adapter has on the model.
    """
    members = {"adapter_name": adapter, "__doc__": kind.__doc__}
    return cast("type[T]", type(f"Adapter{kind.__name__}", (AdapterCheckpoints, kind), members))


if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object


class AdapterCheckpoints(_Base):
    """Mixed in before a Trainer: what it saves, resumes from and pushes is the adapter, and never the base.

    A checkpoint holds the adapter as `Adapter.save` writes it, which is what to take from it, and every tensor of it
    with its schedules as they are in the model, from which a run goes on bit for bit.  It is written in full under
    another name, flushed to the disk and renamed, by the main process alone, so that whatever ends a run, the folders
    named checkpoint-N are whole.  The tensors in it are whole too, however the model is sharded.

    Attributes:
        adapter_name: the adapter on the model.
        last_checkpoint: the folder of the last checkpoint of this run.
        on_silent: "raise" or "warn" where the first step never calls an adapted layer, as where batches with and
            without pictures go through other parts of a model.
    """

    adapter_name = "default"
    last_checkpoint: str | None = None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    push_in_progress: PushInProgress | None = None

    on_silent: OnSilent = "raise"
    _silent_told = False

    def train(self, *args: Any, **kwargs: Any) -> object:
        """Train, as the trainer does by itself.

        Raises:
            SpectuneError: DeepSpeed is to hold the optimizer in parts, of which a checkpoint here would have one.
        """
        if self.is_deepspeed_enabled:
            raise SpectuneError(
                "spectune.trainer_for writes checkpoints of the adapter alone, and DeepSpeed writes its own: take the "
                "plain trainer, whose checkpoints hold them, with get_peft_model(model, spectune.peft.SVFConfig()) say"
            )
        return super().train(*args, **kwargs)

    @cached_property
    def _calls(self) -> Calls:  # of the first step
        return Calls()

    # the first place where all gradients of a step are there and not yet used: the optimizer would skip tensors without
    # one, and the run would end well with an adapter that did not learn
    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Do a step, and after the first that is complete look at what had no part in it.

        Raises:
            SpectuneError: no trainable tensor has a gradient, or an adapted layer was not called with gradients.
        """
        if self._silent_told:
            return super().training_step(model, *args, **kwargs)
        with self._calls.watched(self.model):
            loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._silent_told = True
            check_gradients(self.model, self._calls, self.on_silent)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter to a folder."""
        adapter = self._extracted()
        with processes.together():
            if self.args.should_save:
                self._write(adapter, Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write(self, adapter: Adapter, folder: Path) -> None:
        adapter.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _extracted(self) -> Adapter:
        return extract(self.accelerator.unwrap_model(self.model), self.adapter_name)

    # the trainer's own writes one file after another into the folder by its final name, the base's weights or what peft
    # finds among them; here a folder appears by that name when it is whole
    def _save_checkpoint(self, model: nn.Module, trial: dict[str, object] | None) -> None:
        """Write a checkpoint whole or not at all.

        Raises:
            SpectuneError: the disk is full; the half-written folder is taken away.
        """
        output = Path(str(self.args.output_dir))
        place = output / f"checkpoint-{self.state.global_step}"
        partial = output / _PARTIAL.format(place.name)
        self.store_flos()
        # every process takes part in gathering what is sharded; only then does the main one write alone
        # collective calls: a process that skipped one would leave the others waiting for ever
        adapter, state = self._extracted(), {k: whole(v) for k, v in adapter_state(self.model).items()}
        optimizer = optimizer_state(self.optimizer)
        remedy = self.with_more_space()
        with processes.together(), telling_of_full_disks(place, remedy):
            own_rng = self._rng_files()
        rngs = processes.gather(own_rng)
        with processes.together():
            if self.args.should_save:
                try:
                    with telling_of_full_disks(place, remedy):
                        if partial.is_symlink():  # nothing is written through one
                            partial.unlink()
                        shutil.rmtree(partial, ignore_errors=True)
                        self._write(adapter, partial)
                        save_tensors(state, partial / STATE)
                        torch.save(optimizer, partial / OPTIMIZER)
                        torch.save(self.lr_scheduler.state_dict(), partial / SCHEDULER)
                        self._save_scaler(str(partial))
                        for name, content in (item for files in rngs for item in files.items()):
                            (partial / name).write_bytes(content)
                        self._save_state(place, partial)
                        text = json.dumps({"sha256": digests(partial)}, indent=1) + "\n"
                        (partial / MANIFEST).write_text(text, encoding="utf-8")
                        # renamed when all of it is on the disk: a folder by this name is whole, whatever ended the run
                        publish(partial, place)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        self.state.best_model_checkpoint = processes.gather(self.state.best_model_checkpoint)[0]  # all go back to it
        self.last_checkpoint = str(place)
        if self.args.push_to_hub:
            with processes.together(), telling_of_full_disks(output, remedy):
                self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    # private, but what `push_to_hub` runs on at each checkpoint; there is no hook
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's adapter; transformers' own needs peft to find it, and pickles the arguments."""
        strategy, before = self.args.hub_strategy, self.push_in_progress or PushInProgress()
        if not processes.is_main() or strategy == HubStrategy.END:
            return
        if not before.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, output = Path(checkpoint_folder), Path(str(self.args.output_dir))
        for name in (CONFIG, WEIGHTS):  # the checkpoint may be gone before it is uploaded
            shutil.copy(checkpoint / name, output / name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output)
        folders: list[tuple[Path, str | None]] = [(output, None)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folders.append((checkpoint, "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name))
        jobs: list[object] = [
            upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                path_in_repo=place,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=_NOT_UPLOADED,
                run_as_future=True,
            )
            for folder, place in folders
        ]
        self.push_in_progress = PushInProgress(cast(Any, [*cast(Any, before.jobs), *jobs]))

    def _rng_files(self) -> dict[str, bytes]:
        """Return the file in which transformers keeps this process' random states, by its name."""
        with tempfile.TemporaryDirectory() as folder:
            # private: which generators there are, by device and process, is its own affair, and so is the name of the
            # file that `_load_rng_state` looks for
            self._save_rng_state(folder)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    # private: it reads the state of the run from the checkpoint, with the best one's path as it was on the machine
    # where the run began
    def _init_training_state(self, *args: object, **kwargs: object) -> tuple[int, int]:
        """Go on from where a checkpoint was made; its best one lies beside it, wherever the folder has gone since."""
        with quiet():  # of the place where it was
            begun = super()._init_training_state(*args, **kwargs)
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return begun

    def _save_state(self, place: Path, partial: Path) -> None:
        best = place.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == place or best.exists()):
            self.state.best_model_checkpoint = str(best)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                cast("dict[str, object]", self.state.stateful_callbacks)[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(partial / TRAINER))

    def kept(self) -> str:
        """Say which checkpoint a run that fails now can go on from."""
        last = self.last_checkpoint
        return f"the last good checkpoint is {last}" if last else "no checkpoint yet"

    def with_more_space(self) -> str:
        """Say what to do where the disk is full."""
        then = "go on with resume=true" if self.last_checkpoint else "run it again"
        return f"{self.kept()}; free some space and {then}"

    # these four read what `_save_checkpoint` wrote, which transformers' own would look for by other names; and they
    # unpickle nothing
    def _load_best_model(self) -> None:
        check_files(Path(str(self.state.best_model_checkpoint)))
        self._load_adapter(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_files(Path(resume_from_checkpoint))
        try:
            TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER))
        except (OSError, ValueError, TypeError) as error:
            raise damaged(resume_from_checkpoint, error) from None
        self._load_adapter(resume_from_checkpoint, model)
        self.last_checkpoint = resume_from_checkpoint

    def _load_adapter(self, checkpoint: str, model: nn.Module | None = None) -> None:
        put_adapter_state(model if model is not None else self.model, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with processes.together():
            try:
                super()._load_rng_state(checkpoint)
            except Exception as error:  # whatever a damaged file makes of the reader
                raise damaged(str(checkpoint), error) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            put_optimizer_state(self.optimizer, self.lr_scheduler, checkpoint)


Trainer = trainer_for(transformers.Trainer)
