"""What requests may say, in OpenAI's words: read with bounds, and one sentence for whatever is not understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectune.errors import SpectuneError, nearest
from spectune.reading import parse_json

M = TypeVar("M", bound=BaseModel)
MOST_REPLIES = 128  # to one request
# said by clients, and without an effect on what the answer is
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "priority", "request_id", "reasoning_effort", "verbosity", "modalities",
}  # fmt: skip


class Refused(SpectuneError):
    """A request that is not understood; `param` is the part of it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: object) -> object:
        """Take a key whose value is null for one that is not there."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(_Strict):
    """How a reply is streamed."""

    include_usage: bool = False


class AdapterParameters(_Strict):
    """A mixture as LoRAX's clients give it."""

    ids: list[str]
    weights: list[float] = []
    merge_strategy: str = "linear"


class _Generation(_Strict):
    """What chats and completions have in common."""

    model: Annotated[str, Field(max_length=4096)] = ""
    adapter_weights: dict[str, object] = {}
    adapter_parameters: AdapterParameters | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = []
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    response_format: dict[str, object] = {"type": "text"}

    @property
    def limit(self) -> int | None:
        """Tokens that a reply may have, None where nothing is said."""
        return self.max_tokens

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens are to be told with each token; None tells nothing of them."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        """The strings that end a reply."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(_Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, object]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: list[dict[str, object]] = []
    tool_choice: str | dict[str, object] = "auto"
    chat_template_kwargs: dict[str, object] = {}

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def told(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] = 1
    suffix: str = ""

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        one = bool(self.prompt) and isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", [self.prompt] if one else self.prompt)


class LoadRequest(_Strict):
    """The body of /v1/load_lora_adapter, as vLLM's."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(_Strict):
    """The body of /v1/unload_lora_adapter."""

    lora_name: str


def read_body(body: bytes, kind: type[M]) -> M:
    """Return what the body of a request says.

    Raises:
        Refused: it is no JSON, or not what is understood.
    """
    try:
        values = parse_json(body.decode(), "the body of the request")
    except UnicodeDecodeError:
        raise Refused("the body of the request is no UTF-8") from None
    except SpectuneError as error:
        raise Refused(str(error)) from None
    if not isinstance(values, dict):
        raise Refused("the body of the request must be a JSON object")
    known = list(kind.model_fields)
    for name, value in values.items():
        if name not in known and name not in _HARMLESS and value is not None:
            raise Refused(f"{name[:80]!r} is not understood here{nearest(name, known)}", name[:80])
    try:
        found = kind.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None
    if isinstance(found, _Generation):
        _check_support(found)
    return found


def _told(error: ValidationError) -> Refused:
    """Return a validation's first error as a sentence."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(errors, key=lambda e: len(e["loc"])) if errors[0]["loc"][:1] == ("prompt",) else errors[0]
    where = str(first["loc"][0]) if first["loc"] else "the body"
    if where == "prompt" and first["type"] != "missing":
        return Refused("'prompt' must be a text, a list of texts, a list of tokens or a list of lists of tokens", where)
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    return Refused(f"{path[:200]!r}: {first['msg'][:1].lower()}{first['msg'][1:]}", where)


def _check_support(asked: _Generation) -> None:
    """Raise where something is asked for that would make another answer and that is not there."""
    if asked.response_format.get("type", "text") != "text":
        raise Refused("'response_format' can be text alone: replies are not held to a schema", "response_format")
    if any(token < 0 for token in asked.stop_token_ids):
        raise Refused("'stop_token_ids' must be tokens of the model", "stop_token_ids")
    if isinstance(asked, CompletionRequest):
        for name, default in (("echo", False), ("suffix", ""), ("best_of", 1)):
            given = getattr(asked, name)
            if given != default and not (name == "best_of" and given == asked.n):
                raise Refused(f"{name!r} is not supported", name)
        return
    assert isinstance(asked, ChatRequest)
    if asked.tool_choice not in ("auto", "none"):
        raise Refused("'tool_choice' can be 'auto' or 'none': a call cannot be enforced", "tool_choice")
    if asked.top_logprobs and not asked.logprobs:
        raise Refused("'top_logprobs' needs 'logprobs': true", "top_logprobs")


def checked_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Return messages whose contents are text, or lists of parts that are.

    Raises:
        Refused: one has no role, or a content of another kind.
    """
    found = []
    for i, message in enumerate(messages):
        where, content = f"messages[{i}]", message.get("content")
        if not isinstance(message.get("role"), str):
            raise Refused(f"{where} has no role", "messages")
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, str):
                continue
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind != "text":
                raise Refused(
                    f"{where} has a part of type {str(kind)[:40]!r}, and the model reads text alone", "messages"
                )
            if not isinstance(part.get("text"), str):
                raise Refused(f"{where} has a part without text", "messages")
        if content is not None and not isinstance(content, (str, list)):
            raise Refused(f"the content of {where} must be a text or a list of parts", "messages")
        if content is None and message["role"] != "assistant":
            raise Refused(f"{where} has no content", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        found.append({**message, "role": role})
    return found
