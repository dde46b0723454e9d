"""A tiny random model of every architecture that transformers has, and a batch for it, made from its config alone."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import configuration_auto, modeling_auto

# one class of each model type: the first of these tasks that it has
TASKS = {
    "causal": "CAUSAL_LM",
    "masked": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "vision": "IMAGE_CLASSIFICATION",
    "audio": "CTC",
    "audio ": "AUDIO_CLASSIFICATION",
    "multimodal": "IMAGE_TEXT_TO_TEXT",
    "multimodal ": "MULTIMODAL_LM",
    "vision ": "SEMANTIC_SEGMENTATION",
    "vision  ": "OBJECT_DETECTION",
    "vision   ": "DEPTH_ESTIMATION",
    "base": "",
}

VOCABULARY, SIDE, LENGTH, LARGEST = 120, 32, 6, 30_000_000
_BINS = ("num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size")
_SIZES: list[tuple[str, Any]] = [  # the first pattern that a field's whole name matches gives its value
    (r"(.*_)?vocab_size|(src|tgt)_vocab_size|.*_vocab_size_.*", VOCABULARY),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|(.*_)?head_dim|d_kv|kv_channels|attention_head_size)", 8),
    (r"rotary_dim|rotary_ndims", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|.*_lora_rank|.*_low_rank_dim)", 16),
    (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|n_head_kv|.*_key_value_heads)", 2),
    (r"(.*_)?(num_)?attention_heads|(.*_)?n_heads?|(.*_)?num_heads|(.*_)?num_.*_heads|.*_heads", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|num_selected_experts|moe_k", 2),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts|num_.*_experts|n_shared_experts", 4),
    (r"n_group|topk_group|num_expert_group.*", 1),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim|ffn_size)",
        48,
    ),
    (r"intermediate_dim|dim_feedforward|(.*_)?feedforward_dim|dim_ff|mlp_hidden_size|.*_intermediate_size", 48),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|layers|num_blocks)", 2),
    (r"num_.*_layers|.*_num_layers|.*_depth|num_hidden_groups|num_.*_blocks", 2),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|hidden_dim|projection_dim|model_dim)", 32),
    (r"(dim|d_embed|feature_size|encoder_dim|decoder_dim|out_hidden_size|output_dim|.*_hidden_size|.*_embed_dim)", 32),
    (r"(.*_)?dim|.*_projection_size|.*_output_size|conv_dim|lru_width|hidden_channels", 32),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|seq_length|.*_positions|n_ctx)", 128),
    (r"max_source_positions|max_target_positions|max_length", 128),
    (r"(.*_)?image_size|img_size|input_size", SIDE),
    (r"(.*_)?patch_size", 8),
    (r"num_mel_bins|n_mels|feature_extractor_dim|num_mels|input_feat_per_channel|input_feature_size", 16),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups|conv_groups|num_groups|n_groups", 2),
    (r"sliding_window|attention_window|window_size|attn_window|local_attention", 8),
    (r"num_queries|num_query_tokens|num_latents|num_prompt_tokens", 8),
    (r"attention_chunk_size|chunk_size|mamba_chunk_size", 8),
    (r"num_labels", 3),
    (r"(state_size|mamba_d_state|ssm_state_size|d_state|linear_.*_head_dim)", 8),
    (r"mamba_n_heads|linear_num_.*_heads|mamba_num_heads", 4),
    (r"dropout|.*_dropout|.*_dropout_.*|.*_drop_rate|layerdrop|drop_path_rate", 0.0),
]
_KEEP = re.compile(
    r"(num_channels|in_channels|.*_kernel.*|.*_stride.*|.*theta|.*_token_id|.*factor|torch_dtype|.*ratio)"
)

_UNSET = {"head_dim": 8, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "n_group": 1, "topk_group": 1}

# what the names of fields do not say
FIXES: dict[str, dict[str, Any]] = {
    "wav2vec2": {"conv_dim": (16, 16), "conv_kernel": (4, 2), "conv_stride": (4, 2), "num_feat_extract_layers": 2},
    "swin": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "patch_size": 2, "window_size": 4},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "patch_size": 2, "window_size": 4},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "fsmt": {"langs": ["en", "de"]},
    "xlm": {"n_langs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "hidden_size": 32, "embedding_size": 32},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "patch_size": 2, "window_size": 4},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "mistral4": {"num_key_value_heads": 4},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}
# what turns times, rows and columns is together half of a head
for _kind in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text"):
    FIXES[_kind] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
for _kind in ("hubert", "unispeech", "unispeech-sat", "wavlm", "data2vec-audio", "wav2vec2-conformer", "sew", "sew-d"):
    FIXES[_kind] = FIXES["wav2vec2"]


def classes() -> dict[str, tuple[str, str]]:
    """Return for each model type the task and the name of its class."""
    found: dict[str, tuple[str, str]] = {}
    for task, suffix in TASKS.items():
        name = f"MODEL_FOR_{suffix}_MAPPING_NAMES" if suffix else "MODEL_MAPPING_NAMES"
        for kind, cls in getattr(modeling_auto, name).items():
            found.setdefault(kind, (task.strip(), cls if isinstance(cls, str) else cls[0]))
    for kind, cls in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        if found[kind][0] != "encoder-decoder":  # it has a decoder of its own, too
            found[f"{kind} (whole)"] = "encoder-decoder", cls if isinstance(cls, str) else cls[0]
    return found


def build(kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a model of a type, in evaluation mode, and a batch of two rows."""
    torch.manual_seed(0)
    _, name = classes()[kind]
    kind = kind.removesuffix(" (whole)")
    cls: Any = getattr(tf, name)
    config = _shrunk(cls.config_class or _config_class(kind), kind)
    _check_size(cls, config)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():  # far enough from zero for every layer to matter
            if parameter.dim() > 1 and parameter.is_floating_point() and parameter.requires_grad:
                if parameter.std() == 0:
                    parameter.normal_(0, 0.02)
                if "norm" not in parameter_name.lower():
                    parameter.mul_(3)
    first: Exception | None = None
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for inputs in batches(model):
        try:
            with torch.no_grad():
                # as trained ones have them: with statistics of nothing, what comes through many layers is rounding
                for norm in norms:
                    norm.train().momentum = None
                model(**inputs)
                model.eval()
                model(**inputs)
            return model, inputs
        except Exception as error:  # it wants more, or something else
            first = first or error
    raise first or ValueError("it takes nothing that is made here")


def _check_size(cls: Any, config: Any) -> None:
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    except Exception:  # what is no meta device's
        return
    if count > LARGEST:
        raise ValueError(f"its smallest form has {count:,} parameters")


def _config_class(kind: str) -> Any:
    return getattr(tf, configuration_auto.CONFIG_MAPPING_NAMES[kind])


def _shrunk(cls: Any, kind: str) -> Any:
    whole = cls()
    values: dict[str, Any] = {}
    nested = {k: v for k, v in vars(whole).items() if isinstance(v, tf.PretrainedConfig)}
    for name, sub in nested.items():
        values[name] = _shrunk(type(sub), getattr(sub, "model_type", ""))
    for name, value in vars(whole).items():
        if value is None and name in _UNSET:
            values[name] = _UNSET[name]
        if name.startswith("_") or name in nested or isinstance(value, (str, bool)) or value is None:
            continue
        if isinstance(value, (int, float)) and not _KEEP.fullmatch(name):
            for pattern, size in _SIZES:
                if re.fullmatch(pattern, name):
                    if isinstance(value, type(size)):
                        values[name] = min(value, size) if value > 0 else size
                    break
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            values[name] = 2 if name != "pad_token_id" else 0
    if "kv_lora_rank" in values:  # keys and values of every head come from one vector
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= FIXES.get(kind, {})
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in values), None)
    for name, value in vars(whole).items():
        if isinstance(value, list) and layers and name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            kinds = list(dict.fromkeys(value))
            values[name] = (kinds * layers)[:layers]
    config = cls(**values)
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, name, 2 if name != "pad_token_id" else 0)
    return config


def batches(model: Any) -> Iterator[dict[str, Any]]:
    """Yield two rows of what a model's forward takes, the likeliest first."""
    taken, main = inspect.signature(model.forward).parameters, model.main_input_name
    whole = {name: make for name, make in _parts(model).items() if name in taken}
    more = {"use_cache": False} if "use_cache" in taken else {}
    for names in dict.fromkeys(
        tuple(n for n in chosen if n in whole)
        for chosen in (
            (main, "attention_mask", "decoder_input_ids", "bbox")
            if main == "input_ids"
            else (main, "decoder_input_ids"),
            ("input_ids", "attention_mask", "decoder_input_ids", "bbox"),
            ("input_ids", "attention_mask", "pixel_values", "decoder_input_ids", "bbox"),
            ("input_ids", "attention_mask", "input_features"),
            ("input_ids", "attention_mask", "input_values"),
            ("pixel_values", "decoder_input_ids"),
            ("input_features", "decoder_input_ids"),
            ("input_values",),
        )
    ):
        if names:
            yield {name: whole[name] for name in names} | more


def _parts(model: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    config = model.config
    text = getattr(config, "text_config", None) or config
    size = min(VOCABULARY, getattr(text, "vocab_size", None) or VOCABULARY)
    ids = torch.randint(10, size - 10, (2, LENGTH), generator=g)
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None) or SIDE
    sides = list(side) if isinstance(side, (list, tuple)) else [side, side]
    pixels = [2, getattr(vision, "num_channels", None) or 3, *sides]
    if getattr(vision, "num_frames", None):
        pixels.insert(1, vision.num_frames)
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = next((v for n in _BINS if isinstance(v := getattr(audio, n, None), int)), 80)
    positions = getattr(audio, "max_source_positions", None)
    frames = 2 * positions if positions else 64
    swapped = positions is not None and not hasattr(audio, "input_feat_per_channel")
    spectrogram = type(config).__name__ == "ASTConfig"
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids.flip(1),
        "bbox": torch.randint(0, 50, (2, LENGTH, 4), generator=g).sort(-1).values,
        "pixel_values": torch.randn(pixels, generator=g),
        "input_values": torch.randn(2, *((config.max_length, bins) if spectrogram else (800,)), generator=g),
        "input_features": torch.randn(2, *((bins, frames) if swapped else (frames, bins)), generator=g),
    }
