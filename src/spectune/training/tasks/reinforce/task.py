"""Reinforcement learning with verifiable rewards: the policy gradient on completions that the model draws itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from spectune.bases.prompts import prompt_tokens, stop_tokens
from spectune.bases.tokens import padding
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.model.routing import base_alone
from spectune.training import processes
from spectune.training.config import TrainConfig
from spectune.training.data.encoding import Encoded
from spectune.training.data.messages import is_conversation
from spectune.training.data.records import Record, of
from spectune.training.data.splitting import split
from spectune.training.options import ReinforceOptions, TaskOptions
from spectune.training.tasks.base import Collator, Task
from spectune.training.tasks.reinforce.environments import Environment
from spectune.training.tasks.reinforce.policy import advantages, policy_loss
from spectune.training.tasks.reinforce.policy_trainer import PolicyTrainer
from spectune.training.tasks.reinforce.rewards import Reward, load_rewards
from spectune.training.tasks.reinforce.rollout import completion_logits, lay_out, sample
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWERS = ("answer", "completion")  # columns that an exact match is with


@dataclass(frozen=True)  # no tuple: what moves batches to devices would look into it
class Problem:
    """A record with the tokens of its prompt."""

    record: Record
    tokens: list[int]


class Reinforce(Task):
    """Mean reward of sampled completions, less kl times the KL divergence to the base, by REINFORCE.

    Every step draws `samples` completions of each prompt from the model as it is, weighs each by how much better than
    the others it is, and takes one gradient step: on-policy, with no ratio to clip.
    """

    options_type: ClassVar[type[TaskOptions]] = ReinforceOptions
    forms: ClassVar[str] = "'prompt', as text or messages, and what the reward takes"
    unit = "completion"
    curve = "reward"
    dropout = False
    follows = ("held_out",)
    best_metric = "eval_reward"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._tokenizer: Any = None  # until the model is loaded
        self.outcomes: list[dict[str, object]] = []  # of an evaluation, problem by problem
        self._has_answers = False  # of what is held out, in every process alike
        self.environment: Environment | None = None
        options = self.options
        if options.environment is not None:
            self.environment = Environment(
                options.environment, options.environment_options, options.problems, config.seed
            )
        if options.reward is not None:
            self.reward = load_rewards(options.reward, options.reward_weights)
        else:
            assert self.environment is not None  # or the configuration was not checked
            self.reward = Reward(f"of the environment {options.environment}", self.environment.score)

    def read(self) -> tuple[Sequence[Record], Sequence[Record]]:
        if self.environment is None:
            return super().read()
        return split(self.environment.records(), self.config.held_out, self.config.seed)

    @property
    def options(self) -> ReinforceOptions:
        """The task's own part of the configuration."""
        assert isinstance(self.config, ReinforceOptions)  # or it was made for another task
        return self.config

    def problem(self, record: Record) -> str | None:
        prompt = record.get("prompt")
        if prompt is None:
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}"
        if isinstance(prompt, str):
            return None if prompt else "prompt is empty"
        if not is_conversation(prompt):
            return "prompt must be text, or a list of messages with role and content, both text"
        return None

    def load(
        self, records: Sequence[Record], held: Sequence[Record]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if processes.wants_shards(self.config.fsdp):
            raise SpectuneError(
                "fsdp does not go with task: reinforce, whose processes draw completions of different lengths; without "
                "it every process holds the whole base"
            )
        return super().load(records, held)

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        self._tokenizer = tokenizer
        self.reward.check_columns(records)
        room = limit - self.options.max_new_tokens
        raw = self.environment is None or self.options.raw
        found = []
        for record in records:
            prompt, options = (
                record["prompt"],
                {"tools": record.get("tools"), "variables": record.get("chat_template_kwargs")},
            )
            with of(record):
                found.append(
                    Problem(record, prompt_tokens(tokenizer, prompt, raw=raw and isinstance(prompt, str), **options))
                )
        kept = [problem for problem in found if 0 < len(problem.tokens) <= room]
        if not kept:
            raise SpectuneError(
                f"no prompt leaves room for {self.options.max_new_tokens} new tokens within {limit}; lower "
                "max_new_tokens, raise max_length, or shorten the prompts"
            )
        return Encoded(kept, 0, len(found) - len(kept))

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        def collate(problems: Sequence[Problem]) -> dict[str, Any]:
            # the items of a step are its completions
            return {"labels": torch.zeros(len(problems), self.options.samples), "problems": list(problems)}

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
        problems: list[Problem] = inputs["problems"]
        if not model.training:
            return self._greedy(model, problems)
        options, own = self.options, getattr(model, "module", model)
        own.eval()  # what is drawn and what is learned from are one distribution: no dropout
        prompts = [problem.tokens for problem in problems]
        groups = self._sample(own, prompts, options.samples, options.temperature)
        rewards = torch.tensor(self._rewards(problems, groups), device=own.device).view(len(problems), -1)
        rollout = lay_out(own, prompts, groups, padding(self._tokenizer))
        # which transformers does in training mode only
        _without_dropout(own, self.config.gradient_checkpointing is True)
        reference = None
        if options.kl or options.log_kl:
            with base_alone(own, compared=True), torch.no_grad():
                reference = completion_logits(own, rollout)
        logits = completion_logits(model, rollout)
        _without_dropout(own, True)
        loss, divergence = policy_loss(
            logits,
            reference,
            rollout.tokens,
            rollout.owner,
            self._advantages(rewards).flatten(),
            kl=options.kl,
            temperature=options.temperature or 1.0,
        )
        sums = {
            "loss": loss * rewards.numel(),
            "items": torch.tensor(rewards.numel()),
            "tokens": torch.tensor(sum(map(len, prompts)) + len(rollout.tokens)),
            "reward": rewards.sum(),
            "length": torch.tensor(len(rollout.tokens)),
            "signal": self._advantages(rewards).any(1).sum(),
        }
        if divergence is not None:
            sums["kl"] = divergence * rewards.numel()
        return {key: value.to(own.device) for key, value in sums.items()}

    def _advantages(self, rewards: Tensor) -> Tensor:
        if self.options.reward_baseline == "none":
            return rewards
        return advantages(rewards, self.options.normalize_rewards)

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        known = ("reward", "exact_match", "kl", "length")
        return {key: float(sums[key] / sums["items"]) for key in known if key in sums}

    def trainer(self, **kwargs: Any) -> AdapterTrainer:
        kwargs["args"].per_device_eval_batch_size *= self.options.samples  # as many completions at once as in training
        if kwargs["eval_dataset"] is not None:  # prompts of about one length, for little padding
            kwargs["eval_dataset"] = sorted(kwargs["eval_dataset"], key=lambda problem: len(problem.tokens))
            self._has_answers = any(_answer(problem.record) is not None for problem in kwargs["eval_dataset"])
        return PolicyTrainer(task=self, **kwargs)

    def _greedy(self, model: PreTrainedModel, problems: Sequence[Problem]) -> dict[str, Tensor]:
        groups = self._sample(getattr(model, "module", model), [p.tokens for p in problems], 1, 0.0)
        texts, rewards = self._texts(groups), self._rewards(problems, groups)
        length = sum(len(completion) for group in groups for completion in group)
        total = torch.tensor(sum(rewards))
        sums = {"loss": -total, "items": torch.tensor(len(problems)), "reward": total, "length": torch.tensor(length)}
        answers = [_answer(problem.record) for problem in problems]
        if self._has_answers:
            right = [text == answer for text, answer in zip(texts, answers, strict=True)]
            sums["exact_match"] = torch.tensor(sum(right))
        prompts = [problem.record["prompt"] for problem in problems]
        for prompt, text, answer, reward in zip(prompts, texts, answers, rewards, strict=True):
            self.outcomes.append({"prompt": prompt, "completion": text, "answer": answer, "reward": reward})
        return {key: value.to(model.device) for key, value in sums.items()}

    def _sample(
        self, model: PreTrainedModel, prompts: list[list[int]], samples: int, temperature: float
    ) -> list[list[list[int]]]:
        return sample(
            model,
            prompts,
            samples,
            max_new_tokens=self.options.max_new_tokens,
            temperature=temperature,
            pad=padding(self._tokenizer),
            ends=stop_tokens(model, self._tokenizer),
            fused=self.config.fused,
        )

    def _texts(self, groups: Sequence[Sequence[list[int]]]) -> list[str]:
        return [self._tokenizer.decode(c, skip_special_tokens=True).strip() for group in groups for c in group]

    def _rewards(self, problems: Sequence[Problem], groups: Sequence[Sequence[list[int]]]) -> list[float]:
        records = [problem.record for problem, group in zip(problems, groups, strict=True) for _ in group]
        return self.reward(records, self._texts(groups))


def _without_dropout(model: PreTrainedModel, training: bool) -> None:
    """Set a model's mode but its adapters', whose dropout stays off, in the backward pass of a checkpoint too."""
    model.train(training)
    for layer in adapted_layers(model).values():
        layer.adapters.eval()


def _answer(record: Record) -> str | None:
    return next((record[key].strip() for key in _ANSWERS if isinstance(record.get(key), str)), None)
