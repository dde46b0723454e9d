"""What the tests of this folder share: tiny models and tokenizers, adapters on a shelf, and a server to talk to."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import spectune
from spectune.model.names import adapter_names
from spectune.serving.batch import Row
from spectune.serving.engine import Engine
from spectune.serving.jobs import Event, Job
from spectune.serving.run import Settings, build, http_config
from spectune.serving.sampling import Sampler, Sampling
from spectune.serving.shelf import Shelf
from spectune.serving.text import TextStream, _byte_letters
from training.folder import TEMPLATE, make_model, make_tokenizer
from transformer2.cases import adapter

METHODS = ("svf", "lora:rank=2", "pissa:rank=2", "dora:rank=2", "svft:width=1", "lora_xs:rank=2", "svf", "lora:rank=2")
SPECIAL = ["<pad>", "<s>", "</s>"]
SAID = "Ahoy, café ⚓ in the wind: 🏴‍☠️ STOP and no more"  # characters of one to four bytes


def tiny(**changes: Any) -> Any:
    """Return a two-layer Llama that never ends a reply by itself."""
    model = make_model(max_position_embeddings=256, **changes).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def words() -> Any:
    """Return a tokenizer whose tokens are words, which takes none for an end."""
    tokenizer = make_tokenizer(TEMPLATE.replace("</s>", ""))
    tokenizer.eos_token = None
    return tokenizer


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *_byte_letters()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


class Scripted(LlamaForCausalLM):
    """A model that says what it is told to: at each place of a text the token that a script has there."""

    script: ClassVar[list[int]] = []
    seconds = 0.0

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        time.sleep(self.seconds)
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if self.script:
            places = torch.arange(input_ids.shape[1]).expand_as(input_ids) if position_ids is None else position_ids
            said = torch.tensor(self.script)[(places + 1) % len(self.script)]
            out.logits = torch.nn.functional.one_hot(said, out.logits.shape[-1])[:, -out.logits.shape[1] :] * 20.0
        return out


def scripted(text: str = SAID, begin: int = 4, seconds: float = 0.0) -> tuple[Any, Any]:
    """Return a model that says a text behind prompts of so many tokens, and its tokenizer."""
    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096).eval()
    model.__class__ = Scripted
    model.script = [5] * begin + tokenizer(text, add_special_tokens=False)["input_ids"] + [2]
    model.seconds = seconds
    return model, tokenizer


def shelf_of(model: Any, count: int = 8) -> Shelf:
    """Return a shelf with adapters "a0", "a1", ..., one of each method."""
    shelf = Shelf(model)
    for i in range(count):
        shelf.put(f"a{i}", adapter(METHODS[i % len(METHODS)], seed=i + 1), "made")
    return shelf


def greedy(model: Any, prompt: list[int], limit: int, mixture: Any = None) -> list[int]:
    """Return what `generate` alone makes of a prompt with a mixture of adapters on the model."""
    if adapter_names(model):
        spectune.activate(model, mixture or None)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


class Asked:
    """A request to an engine, without HTTP."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: list[int],
        limit: int,
        weights: Any = None,
        n: int = 1,
        seconds: float | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        how = sampling or Sampling(temperature=0)
        self.rows = [
            Row(prompt, Sampler(model, how, prompt, i), TextStream(tokenizer, prompt), limit) for i in range(n)
        ]
        self.events: list[Event] = []
        self.begun, self.done = threading.Event(), threading.Event()
        self.job = Job(self.rows, weights or {}, self._take, seconds)

    def _take(self, events: list[Event]) -> None:
        self.events += events
        self.begun.set()
        if events[-1].error or sum(event.finish is not None for event in self.events) == len(self.rows):
            self.done.set()

    @property
    def error(self) -> Exception | None:
        return self.events[-1].error

    def wait(self) -> "Asked":
        assert self.done.wait(60)
        return self


def settled(engine: Engine) -> bool:
    """Wait until nothing runs or waits any more; say whether that came."""
    for _ in range(600):
        if not engine.rows and not engine.waiting and not engine._running.jobs:
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def served(model: Any, tokenizer: Any, shelf: Shelf | None = None, two: Any = None, **settings: Any) -> Iterator[Any]:
    """Serve a model on a port of this machine; yield an object with its `url`, `engine` and `shelf`."""
    shelf = shelf or Shelf(model, ["tiny"], auto=two is not None)
    app, engine = build(model, tokenizer, shelf, name="tiny", settings=Settings(**settings), two=two)
    server = uvicorn.Server(http_config(app, port=0, timeout_graceful_shutdown=5, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield _Served(f"http://127.0.0.1:{port}", engine, shelf, server)
    finally:
        server.should_exit = True
        thread.join()


class _Served:
    def __init__(self, url: str, engine: Engine, shelf: Shelf, server: Any) -> None:
        self.url, self.engine, self.shelf, self.server = url, engine, shelf, server
