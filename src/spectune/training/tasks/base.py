"""What a task is: the records it takes, the model, its examples, its loss and its measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from spectune.bases.loading import Outline, load_base
from spectune.bases.prompts import stop_tokens
from spectune.errors import SpectuneError
from spectune.training import processes
from spectune.training.config import FOLLOWING, Source, TrainConfig
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.records import Record, of, read
from spectune.training.data.splitting import copies, repeated, split
from spectune.training.data.spool import Spool
from spectune.training.defaults import Choice, by_count, by_lengths, settle
from spectune.training.options import TaskOptions
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MEASURED = 500  # records whose lengths stand for all
Collator = Callable[[Sequence[Any]], dict[str, Any]]  # a batch of what `encode` made, as `sums` takes it


class Task:
    """One task of one run.

    A run reads and checks records (`forms`, `problem`), loads the model (`load`), makes examples (`encode`) and batches
    (`collator`), and trains on the sum of losses over the items of each optimizer step, divided by their number
    (`sums`).  An evaluation adds the sums of all batches up and reports `metrics` of them.

    Args:
        config: of the run.
    """

    options_type: ClassVar[type[TaskOptions]] = TaskOptions  # its keys in the configuration, and what compare measures
    forms: ClassVar[str]  # the keys of a record, for messages
    unit: ClassVar[str]  # what the loss is a mean over
    curve: ClassVar[str] = "loss"  # the measure that is shown and drawn
    best_metric: ClassVar[str] = "eval_loss"  # by which checkpoints compare; the smaller the better if it ends in loss

    shown: ClassVar[tuple[str, ...]] = ()  # the measures of an evaluation that are shown and drawn beside the loss
    by_length: ClassVar[bool] = False  # batches are of examples of about one length; these are mappings with input_ids

    gathered: ClassVar[tuple[str, ...]] = ()  # of `sums`, what is laid end to end over batches and not added

    dropout: ClassVar[bool] = True  # the model's own stays on in training; an adapter's does
    follows: ClassVar[tuple[str, ...]] = FOLLOWING  # settings that follow the data where they are not given

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.notes: list[str] = []  # what a user should know of the data
        self.choices: list[Choice] = []  # settings that followed the data, which `config` has by then

    def problem(self, record: Record) -> str | None:
        """Return what is wrong with the form of a record, or None."""
        raise NotImplementedError

    def read(self) -> tuple[Sequence[Record], Sequence[Record]]:
        """Return the records to train on and those to evaluate on.

        Raises:
            SpectuneError: what cannot be read, or a record of another form, with its number.
        """
        config = self.config
        assert config.data is not None  # or the configuration was not checked
        records, other = self.records(config.data, config.data_config, config.data_split), config.evaluation()
        held = [] if other is None else self.records(*other)
        self.look(records, held)
        config = self._choose(by_count(self.config, len(records), self.follows, processes.count(), len(held)))
        if other is None:
            records, held = self.split(records, config.held_out)
        self._watch(records, held)
        most = config.max_eval_samples
        if most is not None and len(held) > most:
            held = self.split(held, most / len(held))[1][:most]  # copies of one record may be a few more
        return repeated(records, config.seed), held

    def _choose(self, choices: Sequence[Choice]) -> TrainConfig:
        self.choices += choices
        self.config = settle(self.config, choices)
        return self.config

    def measure(
        self, records: Sequence[Record], model: PreTrainedModel | Outline, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Let the length of examples follow the data, where it is not given.

        Args:
            records: to train on.
            model: the model, or its outline.
            tokenizer: the model's.
        """
        if "max_length" not in self.follows or "max_length" in self.config.model_fields_set:
            return
        encoder = Encoder(tokenizer, stop_tokens(model, tokenizer))
        lengths: list[int] = []
        try:
            for record in records[:: max(1, len(records) // _MEASURED)]:
                with of(record):
                    lengths += (len(example.tokens) for example in self.examples(record, encoder))
        except NotImplementedError:  # a task of someone else's, whose examples are of another kind
            return
        context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._choose(by_lengths(self.config, lengths, context, self.follows))

    def look(self, records: Sequence[Record], held: Sequence[Record]) -> None:
        """Look at all records once they are read, before any is held out.

        Args:
            records: to train on, and to hold a share out of.
            held: others, to evaluate on.

        Raises:
            SpectuneError: they do not go together.
        """

    def split(self, records: Sequence[Record], share: float) -> tuple[Sequence[Record], Sequence[Record]]:
        """Return records to learn from and a share of them that is held out, with as much of each kind in both.

        Raises:
            SpectuneError: one of the two would be empty.
        """
        return split(records, share, self.config.seed, self.kind)

    def kind(self, record: Record) -> object:
        """Return what a held-out share has as much of as the data, such as a label."""
        return None

    def records(
        self, source: str | list[str | Source], config_name: str | None = None, split_name: str | None = None
    ) -> Sequence[Record]:
        """Return the records of data, in memory or, where the configuration says so, in a file.

        Raises:
            SpectuneError: what cannot be read, or a record of another form, with its place.
        """
        if not self.config.streaming:
            return read(source, self, config_name, split_name, self.notes.append)
        spool = Spool()
        read(source, self, config_name, split_name, self.notes.append, spool)
        return spool.all()

    def _watch(self, records: Sequence[Record], held: Sequence[Record]) -> None:
        twice, leaks = copies(records, held)
        if twice:
            self.notes.append(
                f"{twice} of {len(records)} training records are repeated; each counts as often as it is there"
            )
        if leaks:
            self.notes.append(
                f"{leaks} of {len(held)} held-out records are in the training data too: measures will flatter"
            )

    def load(
        self, records: Sequence[Record], held: Sequence[Record]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model, without adapter, and the tokenizer.

        Args:
            records: to train on.
            held: to evaluate on.

        Raises:
            SpectuneError: a model that is not of the kind that the task trains.
        """
        config = self.config
        device = processes.load_device(config.device, config.fsdp)
        options = {"quantize": config.quantize, "trust_remote_code": config.trust_remote_code}
        model, tokenizer = load_base(config.model, config.dtype, device=device, **options)
        if not model.can_generate() or model.config.is_encoder_decoder:  # whose target its decoder would be given
            raise SpectuneError(
                f"task: {config.task} needs a causal language model, and {config.model} is a {type(model).__name__}; "
                "task: classify takes encoders too"
            )
        return model, tokenizer

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        """Return the examples of records, none longer than `limit` tokens.

        Raises:
            SpectuneError: nothing is left to learn from.
        """
        raise NotImplementedError

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        """Return the tokens of one record and which of them are learned, before anything is cut, where it has such."""
        raise NotImplementedError

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return what makes a batch of examples; entries of its "labels" other than -100 are the items of the loss."""
        raise NotImplementedError

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over a batch: "loss", with its gradient, "items", and what `metrics` needs besides.

        Those that `gathered` names have a row for each item instead.
        """
        raise NotImplementedError

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the measures of an evaluation, given sums over all its batches."""
        return {"loss": float(sums["loss"] / sums["items"])}

    def group_rates(self, model: PreTrainedModel) -> dict[str, float]:
        """Return learning rates that trained tensors have by their name, whatever the method's is."""
        return {}

    def trainer(self, **kwargs: Any) -> AdapterTrainer:
        """Return the trainer."""
        return AdapterTrainer(task=self, **kwargs)

    def files(self, model: PreTrainedModel) -> dict[str, str]:
        """Return texts that the run folder holds for this task, by file name."""
        return {}
