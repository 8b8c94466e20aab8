"""Fields of config.json outside the architecture: fixed, harmless, or neutral by their kind."""

import re
from typing import Any

# Fields with one value that lorax computes, and why no other.
FIXED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the gated MLP is SwiGLU"),
    "attention_dropout": ((0,), "lorax drops nothing in attention"),
    "hidden_dropout": ((0,), "lorax drops nothing in the residual stream"),
    "resid_pdrop": ((0,), "lorax drops nothing in the residual stream"),
    "embd_pdrop": ((0,), "lorax drops nothing in the embedding"),
    "pretraining_tp": ((1,), "products are not split as in pretraining"),
    "partial_rotary_factor": ((1,), "lorax rotates whole heads"),
    "rope_interleaved": ((False,), "pairs are half a head apart"),
    "use_mrope": ((False,), "text has one position per token"),
    "compression_config": ((), "lorax reads 16- and 32-bit weights only; decompress it first"),
    "auto_map": ((), "lorax runs no code from checkpoints"),
    "parallel_residual": ((False,), "the MLP reads what attention added"),
    "use_parallel_residual": ((False,), "the MLP reads what attention added"),
    "parallel_attn": ((False,), "the MLP reads what attention added"),
    "embedding_multiplier": ((1,), "embeddings are taken as they are"),
    "residual_multiplier": ((1,), "what a block adds is added as it is"),
    "logits_scaling": ((1,), "logits are taken as they are"),
    "logit_scale": ((1,), "logits are taken as they are"),
    "per_layer_config": ((), "every layer has the same shape"),
    "pruned_heads": (({},), "no head is pruned"),
    "is_encoder_decoder": ((False,), "lorax has decoders only"),
    "add_cross_attention": ((False,), "lorax has decoders only"),
    "tie_encoder_decoder": ((False,), "lorax has decoders only"),
}

# Fields that cannot change what the forward pass computes, by reason.
HARMLESS_FIELDS: dict[str, tuple[str, ...]] = {
    "who wrote the file, and for which class": (
        "architectures", "model_type", "_name_or_path", "name_or_path", "_commit_hash",
        "transformers_version", "tokenizer_class", "is_llama_config", "transformers.js_config",
        "unsloth_version", "unsloth_fixed", "model_name",
    ),
    "dtype of the run that wrote the file; tensors carry theirs": ("use_bfloat16",),
    "how transformers computes the same thing": (
        "use_cache", "_attn_implementation", "_attn_implementation_autoset",
        "attn_implementation", "_flash_attn_2_enabled", "chunk_size_feed_forward", "torchscript",
        "tf_legacy_loss", "return_dict", "output_attentions", "output_hidden_states",
        "is_decoder", "cross_attention_hidden_size", "experts_implementation",
        "_experts_implementation", "tie_last_hidden_states", "keys_to_ignore_at_inference",
        "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "flash_attention",
        "_use_flash_attention_2", "use_sdpa", "use_xformers", "use_memory_efficient_attention",
        "gradient_checkpointing", "use_gradient_checkpointing",
    ),
    "initialisation, before the weights are loaded": ("initializer_range",),
    "limits for tokenizers; lorax has data.max_seq_length": (
        "max_sequence_length", "model_max_length", "tokenizer_model_max_length",
        "tokenizer_padding_side",
    ),
    "heads for classification": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params",
    ),
    "generation, whose settings lorax takes from its caller": (
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate",
        "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "prefix",
        "sep_token_id", "decoder_start_token_id", "max_new_tokens", "min_new_tokens", "max_time",
        "stop_strings", "use_mtp", "cache_implementation", "cache_config", "max_cache_len", "min_p",
        "top_h", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
        "renormalize_logits", "sequence_bias", "token_healing", "guidance_scale",
        "watermarking_config", "output_logits", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type", "compile_config", "disable_compile", "continuous_batching_config",
        "low_memory", "penalty_alpha", "dola_layers", "constraints", "force_words_ids",
        "prefill_chunk_size", "_from_model_config",
    ),
}  # fmt: skip

# Words in names of fields that choose between computations: their text may name an algorithm.
_COMPUTED = re.compile(
    r"(act$|activ|alibi|arch|attention|attn|backbone|bias|block|caus|cross|depth|dim|drop|emb|"
    r"expert|feed|ffn|fn$|form|func|gat(e|ing)|glu|head|hidden|impl|kernel|kind|kv|layer|linear|"
    r"logit|lora|mask|method|mix|mlp|mode$|moe|mup|multipl|nonlin|norm|pos$|posit|qk|quant|relat|"
    r"resid|rms|rope|rot|rout|scal|schem|skip|slid|soft(cap|max)|spars|ssm|state|strat|style|swi|tie|type|"
    r"variant|window|yarn)"
)

# Words for what the decoder always does: switching it off would change the result.
_ALWAYS_ON = re.compile(
    r"(caus|full|gat(e|ing)|glu|layernorm|mask|norm|posit|resid|rms|rope|rot|scal|silu|slid|"
    r"softmax|swiglu|window)"
)

# Words for what a decoder on one device, without experts, does not do or need: switching it off
# does not change the result. Other switches may choose between computations (prenorm).
_OFF_ANYWAY = re.compile(
    r"(audio|cach|checkpoint|compil|debug|deepspeed|distribut|expert|flash|fsdp|fus(e|ion)|image|jit|"
    r"lora$|moe|mtp|offload|parallel|profil|quanti|return|router|sdpa|torchscript|train|verbos|"
    r"video|vision|xformers)"
)

# Words for what some families have: without it the result differs.
_WEIGHTS = re.compile(r"(bias|mlp|proj|tie|tied|tying)")

# Words in names of fields with a note, or with the origin of a model.
_IDENTITY = re.compile(
    r"(author|by$|citation|comment|commit|company|copyright|creat|dataset|date|descr|develop|"
    r"framework|hash|homepage|info|lang|licen[cs]e|maintain|name|note|organi|origin|owner|path|"
    r"project|publish|releas|repo|revision|sha$|sha256|source|tag|team|time|title|tokens?$|updat|"
    r"url|uuid|version|web)"
)


def neutral_kind(name: str, value: Any) -> str | None:
    """Returns why a field that lorax does not know cannot change the result of a decoder.

    Such a field is neutral by its kind: null; the id of a token; a dropout of 0; a switch that is
    off, if its name is about what lorax does not do or need (caches, parallelism, experts) and not
    about what it always does (``use_rope``); an empty value; text with the origin of the model, or
    prose, unless its name is about the computation (``norm_type``).

    Args:
        name: The field's name.
        value: Its value.

    Returns:
        The reason in words, or None if it may change something.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])|\d+", name)]

    def speaks_of(pattern):
        return any(pattern.match(word) for word in words)

    if value is None:
        return "null"
    if words[-2:] in (["token", "id"], ["token", "ids"]) and _are_token_ids(value):
        return "a token id"
    if speaks_of(re.compile("dropout|pdrop|drop$")) and value == 0:
        return "a dropout of 0"
    if value is False and (speaks_of(_WEIGHTS) or not speaks_of(_OFF_ANYWAY)):
        return None
    if value is False or value in ("", [], {}):
        return None if speaks_of(_ALWAYS_ON) else "switched off"
    texts = value if isinstance(value, list) else [value]
    if all(isinstance(text, str) for text in texts) and not speaks_of(_COMPUTED):
        if speaks_of(_IDENTITY) or all(len(text.split()) > 2 for text in texts):
            return "text that names no computation"
    return None


def _are_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
