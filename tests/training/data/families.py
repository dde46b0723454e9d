"""Chat templates of the known families, faithful in their joints, and small tokenizers of every kind."""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_ROLE = "{% for m in messages %}"
_END = "{% endfor %}"


def _if(prompt: str, otherwise: str = "") -> str:
    return "{% if add_generation_prompt %}" + prompt + (f"{{% else %}}{otherwise}" if otherwise else "") + "{% endif %}"


_SYSTEM_IN_FIRST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set messages = messages[1:] if system else messages %}"
)
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "chatml": _ROLE
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + _END
    + _if("<|im_start|>assistant\n"),
    "llama2": _SYSTEM_IN_FIRST + _ROLE + "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and system %}"
    "<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]{% else %}"
    " {{ m.content | trim }} {{ eos_token }}{% endif %}" + _END,
    "llama3": "{{ bos_token }}"
    + _ROLE
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    + _END
    + _if("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral-v1": _ALTERNATE + "{{ bos_token }}" + _ROLE + "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}" + _END,
    "mistral-v3": _SYSTEM_IN_FIRST
    + "{{ bos_token }}"
    + _ROLE
    + "{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}" + _END,
    "mistral-v7": "{{ bos_token }}" + _ROLE + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}" + _END,
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + _ALTERNATE
    + _ROLE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    + _END
    + _if("<start_of_turn>model\n"),
    "phi3": _ROLE
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    + _END
    + _if("<|assistant|>\n", "{{ eos_token }}"),
    "phi4": _ROLE
    + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
    + _END
    + _if("<|im_start|>assistant<|im_sep|>"),
    "qwen2.5": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    + _ROLE
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + _END
    + _if("<|im_start|>assistant\n"),
    "qwen3": "{% set ns = namespace(last=-1) %}"
    + _ROLE
    + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    + _END
    + _ROLE
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content.lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n"
    + _END
    + _if("<|im_start|>assistant\n"),
    "qwen3-thinking": _ROLE
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n" + _END + _if("<|im_start|>assistant\n<think>\n"),
    "glm4": "[gMASK]<sop>" + _ROLE + "<|{{ m.role }}|>\n{{ m.content }}" + _END + _if("<|assistant|>"),
    "deepseek-v2": "{{ bos_token }}" + _ROLE + "{% if m.role == 'user' %}User: {{ m.content }}\n\n{% elif m.role == "
    "'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n{% endif %}"
    + _END
    + _if("Assistant:"),
    "deepseek-r1": "{{ bos_token }}" + _ROLE + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% else %}{{ m.content }}{% endif %}"
    + _END
    + _if("<|Assistant|><think>\n"),
    "zephyr": _ROLE + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n" + _END + _if("<|assistant|>\n"),
    "vicuna": _ROLE + "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}" + _END + _if("ASSISTANT:"),
    "vicuna-no-end": _ROLE + "{{ m.role | upper }}: {{ m.content }}\n" + _END + _if("ASSISTANT:"),
    "alpaca": _ROLE + "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% elif m.role == 'assistant' %}"
    "### Response:\n{{ m.content }}{{ eos_token }}\n\n{% else %}{{ m.content }}\n\n{% endif %}" + _END
    + _if("### Response:\n"),
    "command-r": "{{ bos_token }}"
    + _ROLE
    + "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}_TOKEN|>"
    "{{ m.content | trim }}<|END_OF_TURN_TOKEN|>" + _END + _if("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    "granite": _ROLE
    + "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}</s>\n"
    + _END
    + _if("<|start_of_role|>assistant<|end_of_role|>"),
    "olmo": "{{ eos_token }}" + _ROLE + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}" + _END + _if("<|assistant|>"),
    "falcon": _ROLE + "{% if not loop.first %}\n{% endif %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
    "{{ m.role | title }}: {{ m.content }}{% endif %}" + _END + _if("\nAssistant:"),
    "minicpm": _ROLE + "{% if m.role == 'assistant' %}{{ m.content | trim }}{% else %}<user>{{ m.content | trim }}<AI>"
    "{% endif %}" + _END,
    "nemotron": "{{ '<extra_id_0>System' }}" + _ROLE + "{% if m.role == 'system' %}\n{{ m.content | trim }}{% endif %}"
    + _END + "{{ '\n\n' }}" + _ROLE + "{% if m.role != 'system' %}<extra_id_1>{{ m.role | title }}\n"
    "{{ m.content | trim }}\n{% endif %}" + _END + _if("<extra_id_1>Assistant\n"),
    "deepseek-v3.1": "{{ bos_token }}" + _ROLE + "{% if m.role == 'assistant' %}<|Assistant|></think>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}" + _END + _if("<|Assistant|></think>"),
    "gemma3": _SYSTEM_IN_FIRST + "{{ bos_token }}" + _ALTERNATE + _ROLE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first and system %}"
    "{{ system }}\n\n{% endif %}{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{{ part.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n" + _END + _if("<start_of_turn>model\n"),
    "space": _ROLE + "{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer: {% else %}{{ m.content }}"
    "{{ eos_token }}\n{% endif %}" + _END,
    "header-always": _ROLE + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + _END,
    "no-tokens": _ROLE + "[{{ m.role }}] {{ m.content }} [end]\n" + _END + _if("[assistant]"),
    "marked": _ROLE + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n" + _END + _if("<|im_start|>assistant\n"),
}  # fmt: skip

SPECIALS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>"),
    *("<|User|>", "<|Assistant|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<AI>"),
    *("<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>", "<user>"),
    *("<extra_id_0>", "<extra_id_1>"),
)
_CORPUS = [
    "what is two plus two the answer is four Yes No hello world and so on",
    "Question: Answer: USER: ASSISTANT: User: Assistant: ### Instruction: ### Response: [INST] [/INST] system user",
    "assistant model You are helpful. <think> </think> [end] [user] [assistant] multi line",
    "code def f(x): return 1 , . ( )",
] * 20


def _fast(tokenizer: Tokenizer, specials: Iterable[AddedToken], **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", **names
    )


def _byte_level(prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return tokenizer


def _bytes() -> list[str]:
    return [f"<0x{i:02X}>" for i in range(256)]


def _metaspace(legacy: bool) -> Tokenizer:
    """Return a tokenizer as Llama 2 has it: a space before the text, and bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    alphabet = sorted({c for text in _CORPUS for c in text.replace(" ", "▁")} | {"\n"})
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", *_bytes()], initial_alphabet=alphabet)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words = [word for text in _CORPUS for word in text.split()]  # the joints of whole texts are too long to be learned
    tokenizer.train_from_iterator(words, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({c for text in _CORPUS for c in text} | set("\n"))
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level": _byte_level,
    "byte-level with a space": lambda: _byte_level(prefix=True),
    "metaspace": lambda: _metaspace(legacy=False),
    "metaspace of old": lambda: _metaspace(legacy=True),
    "unigram": _unigram,
    "word-piece": _word_piece,
}


@cache
def _trained(kind: str) -> str:
    return TOKENIZERS[kind]().to_str()


STRIPS = {"": (), "rstrip": ("rstrip",), "lstrip": ("lstrip",), "both": ("lstrip", "rstrip")}
LOSSY = ("word-piece", "unigram")  # they do not give every text back


def make(template: str | None, kind: str = "byte-level", strips: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind with a template, whose special tokens take in the space beside them."""
    sides = dict.fromkeys(STRIPS[strips], True)
    specials = [AddedToken(s, special=True, normalized=False, **sides) for s in SPECIALS]
    names = {} if kind.startswith("byte") else {"unk_token": "<unk>"}
    tokenizer = _fast(Tokenizer.from_str(_trained(kind)), specials, **names)
    tokenizer.chat_template = TEMPLATES.get(template, template) if template is not None else None
    return tokenizer


def published() -> dict[str, str]:
    """Return the chat templates that TRL comes with, as their models have them, by name."""
    spec = find_spec("trl")
    folder = Path((spec.submodule_search_locations or ["."])[0] if spec else ".") / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
