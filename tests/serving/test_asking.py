"""What a request comes to: rows with prompts, limits and ends, how tokens are chosen, and which adapters answer."""

import pytest

from serving.servers import shelf_of, tiny, words
from spectune.errors import SpectuneError
from spectune.serving.asking import Reader, weights_of
from spectune.serving.protocol import ChatRequest, CompletionRequest, Refused
from spectune.serving.shelf import Shelf, UnknownAdapter

TALK = [{"role": "user", "content": "say ahoy"}]


@pytest.fixture
def model():
    return tiny()


def completion(**said):
    return CompletionRequest(**{"prompt": [5, 6, 7], **said})


def read(model, tokenizer=None, **said):
    return Reader(model, tokenizer or words()).completion(completion(**said))


def test_each_prompt_has_its_replies_one_after_the_other(model):
    asked = read(model, prompt=[[5, 6, 7], [8]], n=2, max_tokens=4, seed=3)
    assert [row.prompt for row in asked.rows] == [[5, 6, 7], [5, 6, 7], [8], [8]]
    assert asked.prompt_tokens == 4  # each prompt is read once
    assert {row.limit for row in asked.rows} == {4}
    seeds = [row.sampler._generator.initial_seed() for row in asked.rows]
    assert seeds == [3, 4, 5, 6]


def test_texts_are_read_as_the_tokenizer_has_them(model):
    tokenizer = words()
    (row,) = read(model, tokenizer, prompt="say ahoy").rows
    assert row.prompt == tokenizer("say ahoy")["input_ids"]
    (row,) = Reader(model, tokenizer).chat(ChatRequest(messages=TALK)).rows
    text = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert row.prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_reply_is_as_long_as_is_asked_for_as_far_as_the_context_goes(model):
    def limit(most=None, **said):
        return Reader(model, words(), most).completion(completion(**said)).rows[0].limit

    assert limit() == 256 - 3
    assert limit(max_tokens=9) == 9
    assert limit(max_tokens=9999) == 253
    assert limit(most=20) == limit(most=20, max_tokens=90) == 20
    assert limit(prompt=[5] * 255) == 1
    vars(model.config)["max_position_embeddings"] = None  # as of models that know no limit
    assert limit() == 4096
    assert limit(most=20) == 20


def test_the_tokens_that_end_a_reply(model):
    model.generation_config.eos_token_id = [2, 9]
    assert read(model, stop_token_ids=[7]).rows[0].ends == {2, 7, 9}
    assert read(model, stop_token_ids=[7], ignore_eos=True).rows[0].ends == {7}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"prompt": []}, "'prompt' and 'n' must make between 1 and 128 replies"),
        ({"prompt": ["a"] * 65, "n": 2}, "'prompt' and 'n' must make between 1 and 128 replies"),
        ({"prompt": [[]]}, "the prompt has no token, and a reply must have one to begin with"),
        ({"prompt": [5, 40]}, "a prompt has tokens that the model has not; they go to 39"),
        ({"prompt": [-1]}, "a prompt has tokens that the model has not; they go to 39"),
        ({"prompt": [5] * 256}, "the prompt has 256 tokens and the model's context holds 256; shorten the prompt"),
        ({"logit_bias": {"40": 1.0}}, "'logit_bias' names '40', which is no token of the model"),
        ({"logit_bias": {"-1": 1.0}}, "'logit_bias' names '-1', which is no token of the model"),
        ({"logit_bias": {"say": 1.0}}, "'logit_bias' names 'say', which is no token of the model"),
        ({"logit_bias": {"9" * 5000: 1.0}}, f"'logit_bias' names '{'9' * 20}', which is no token of the model"),
    ],
)
def test_what_is_refused(model, said, message):
    with pytest.raises(Refused) as refused:
        read(model, **said)
    assert str(refused.value) == message
    assert refused.value.param in said


def test_chats_that_the_template_cannot_write_are_refused(model):
    reader = Reader(model, words())
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(Refused, match="the model's chat template knows no tools") as refused:
        reader.chat(ChatRequest(messages=TALK, tools=tools))
    assert refused.value.param == "tools"
    assert reader.chat(ChatRequest(messages=TALK, tools=tools, tool_choice="none")).rows
    tokenizer = words()
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(Refused, match="only users") as refused:
        Reader(model, tokenizer).chat(ChatRequest(messages=TALK))
    assert refused.value.param == "messages"


def test_tokens_are_chosen_as_the_request_says_else_as_the_model_does(model):
    def sampling(**said):
        return read(model, **said).rows[0].sampler.sampling

    model.generation_config.temperature, model.generation_config.top_k = 0.3, 7
    found = sampling()  # the model does not sample by itself, so that these say nothing
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (1.0, None, None, None)
    model.generation_config.do_sample, model.generation_config.top_p = True, 0.8
    found = sampling()
    assert (found.temperature, found.top_k, found.top_p) == (0.3, 7, 0.8)
    found = sampling(temperature=0.5, top_k=-1, top_p=0.5, min_p=0.0)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.5, None, 0.5, None)
    assert sampling(top_k=0).top_k is None
    assert sampling(temperature=1e-6).temperature == 0.0
    found = sampling(seed=4, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-1.0, logprobs=3)
    assert (found.seed, found.repetition_penalty, found.logprobs) == (4, 1.5, 3)
    assert (found.presence_penalty, found.frequency_penalty) == (1.0, -1.0)
    assert dict(sampling(logit_bias={"5": 2.0, "39": -1.0}).bias) == {5: 2.0, 39: -1.0}


@pytest.fixture(scope="module")
def shelf():
    return shelf_of(tiny(), 3)


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        ({"model": "base"}, {}),
        ({"model": "a0"}, {"a0": 1.0}),
        ({"model": "a0:0.5+a1:-2"}, {"a0": 0.5, "a1": -2.0}),
        ({"model": "base", "adapter_weights": {"a0": 0.5, "a1": "0.25"}}, {"a0": 0.5, "a1": 0.25}),
        ({"adapter_weights": {"a2": 3}}, {"a2": 3.0}),
        ({"adapter_parameters": {"ids": ["a0", "a1"]}}, {"a0": 0.5, "a1": 0.5}),
        ({"adapter_parameters": {"ids": ["a0", "a1"], "weights": [1.0, 3.0]}}, {"a0": 1.0, "a1": 3.0}),
    ],
)
def test_the_adapters_that_are_asked_for(shelf, said, weights):
    assert weights_of(completion(**said), shelf) == weights


@pytest.mark.parametrize(
    ("said", "message", "kind"),
    [
        ({}, "'model' is not given: an adapter, a mixture such as pirate:0.7+chef:0.3, or base", Refused),
        ({"model": "a9"}, "there is no adapter 'a9'", UnknownAdapter),
        ({"adapter_weights": {"a9": 1}}, "there is no adapter 'a9'", UnknownAdapter),
        ({"adapter_weights": {"a0": "much"}}, "the weight of 'a0' must be a number such as", SpectuneError),
        ({"model": "a0", "adapter_weights": {"a1": 1}}, "give the mixture as 'model' or beside 'model'", Refused),
        (
            {"adapter_parameters": {"ids": ["a0"], "weights": [1.0, 2.0]}},
            "'adapter_parameters' has another number of weights than of ids", Refused,
        ),
        ({"adapter_parameters": {"ids": []}}, "'adapter_parameters' has no ids; the base alone is 'model'", Refused),
        ({"adapter_parameters": {"ids": ["a0", "a0"]}}, "'adapter_parameters' takes each adapter once", Refused),
        (
            {"adapter_parameters": {"ids": ["a0"], "merge_strategy": "ties"}},
            "'adapter_parameters' takes each adapter once", Refused,
        ),
        (
            {"adapter_parameters": {"ids": ["a0"]}, "adapter_weights": {"a1": 1}},
            "'adapter_parameters' takes each adapter once", Refused,
        ),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_had(shelf, said, message, kind):
    with pytest.raises(kind) as refused:
        weights_of(completion(**said), shelf)
    assert str(refused.value).startswith(message)


def test_a_library_chooses_for_auto():
    assert weights_of(completion(model="auto"), Shelf(tiny(), auto=True)) is None
