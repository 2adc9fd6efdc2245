"""A family's config.json as a `TransformerConfig` and back, by the table in `families.py`.

`from_json` reads the keys of old and of current releases of transformers, `to_json` writes keys that both load.
"""

import dataclasses
import math

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import RopeScaling, TransformerConfig
from rlhf_jax.models.families import FAMILIES, SOFTCAPS, SUPPORTED, Family, Json, family_of

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ENCODERS = ("bert", "electra", "deberta", "mpnet", "xlm", "longformer")  # parts of their model types
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def from_json(json: Json, where: str) -> TransformerConfig:
    """The decoder's shape from a config.json, computed and kept in float32.

    Args:
      json: the file's contents.
      where: its path, for messages.

    Raises:
      UserError: another family, or a variant the decoder does not compute; it is named.
    """
    family = _supported(json, where)
    values = {**family.defaults, **json}
    fields = {field: values[key] for field, key in family.keys.items() if values.get(key) is not None}
    for field in ("vocab_size", "layers", "width", "heads", "context"):
        if field not in fields:
            raise UserError(f"{where} has no {family.keys[field]}: add it, the model's {field.replace('_', ' ')}")
    fields.setdefault("kv_heads", fields["heads"])
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    if "ffn" not in fields:
        if json["model_type"] != "gpt2":
            raise UserError(f"{where} has no {family.keys['ffn']}: add it, the width of the feed-forward layers")
        fields["ffn"] = 4 * fields["width"]
    fields.update(family.fixed)
    fields["activation"] = _activation(family, json, where)
    if family.scaled_embedding:
        fields["embedding_scale"] = fields["width"] ** 0.5
    if family.query_scalar:
        fields["query_scale"] = values.get("query_pre_attn_scalar", 256) ** -0.5
    elif json.get("scale_attn_weights") is False:
        fields["query_scale"] = 1.0
    fields["windows"] = _windows(family, values, where)
    if fields.get("positions") != "learned":
        fields.update(_rope(family, values, fields["head_dim"], where))
    try:
        return TransformerConfig(family=json["model_type"], **fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _supported(json: Json, where: str) -> Family:
    """The family of a config.json, after all that refuses it."""
    kind = json.get("model_type")
    mend = f"give a checkpoint of one of {SUPPORTED}"
    if not kind:
        raise UserError(f"{where} has no model_type: {mend}")
    if json.get("quantization_config"):
        how = json["quantization_config"].get("quant_method", "quantized")
        raise UserError(
            f"{where} has a quantization_config ({how}): give the checkpoint in float32, float16 or bfloat16"
        )
    if kind not in FAMILIES:
        raise UserError(f'{where}: model_type "{kind}" is {_what(json)}: {mend}')
    family = FAMILIES[kind]
    for name in json.get("architectures") or ():
        bare = family.classifier.removesuffix("ForSequenceClassification") + "Model"
        if name not in (family.causal, family.classifier, bare):
            raise UserError(
                f"{where}: architecture {name} is not supported: give {family.causal}, or {family.classifier} "
                "with one label for a reward model"
            )
    for flag in family.refused:
        if json.get(flag):
            raise UserError(f"{where}: {flag} is {json[flag]}, which the decoder does not compute: {mend}")
    return family


def _what(json: Json) -> str:
    """Why a model type is not one of ours, in words."""
    kind = json["model_type"]
    if kind == "mixtral" or "moe" in kind or any(json.get(key) for key in EXPERTS):
        return "a mixture of experts, which is not supported"
    if json.get("is_encoder_decoder"):
        return "an encoder-decoder, which is not supported"
    if "vision_config" in json or "audio_config" in json:
        return "a multimodal model, which is not supported (only its text decoder may be, in a folder of its own)"
    if any(name in kind for name in ENCODERS):
        return "an encoder, which is not supported"
    return "not supported"


def _activation(family: Family, json: Json, where: str) -> str:
    key, default = family.activation
    name = json.get(key) or json.get("hidden_act") or default
    if family.scaled_embedding and name == "gelu":  # the first Gemma files say so and mean the tanh form
        name = default
    if name not in ACTIVATIONS:
        raise UserError(f'{where}: {key} "{name}" is not supported: it must be one of {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


def _windows(family: Family, values: Json, where: str) -> tuple[int, ...]:
    """Each layer's sliding window, () where no layer has one."""
    layers = values[family.keys["layers"]]
    types = values.get("layer_types")
    known = {"sliding_attention", "full_attention"}
    if types is not None and family.windows != "none":
        if set(types) - known:
            raise UserError(f'{where}: layer_types has "{min(set(types) - known)}": the decoder has {sorted(known)}')
        if len(types) != layers:
            raise UserError(f"{where}: layer_types has {len(types)} entries for {layers} layers: give one a layer")
    window = values.get("sliding_window") or 0
    kind = values["model_type"]
    if family.windows == "none" or not window:
        return ()
    if family.windows == "all":
        if types is not None and len(set(types)) > 1:
            raise UserError(f"{where}: layer_types mixes windows, which {kind} does not: give all layers one type")
        return (window,) * layers
    if kind in ("qwen2", "qwen3") and not values.get("use_sliding_window", False):
        return ()
    if types is not None:
        sliding = [name == "sliding_attention" for name in types]
    elif kind in ("qwen2", "qwen3"):
        sliding = [layer >= values.get("max_window_layers", 28) for layer in range(layers)]
    else:
        default = 2 if kind == "gemma2" else 6
        every = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or default
        sliding = [(layer + 1) % every > 0 for layer in range(layers)]
    return tuple(window if here else 0 for here in sliding) if any(sliding) else ()


def _rope(family: Family, values: Json, head_dim: int, where: str) -> Json:
    """The fields of rotary positions, from `rope_parameters` or from the older keys."""
    given: Json = values.get("rope_parameters") or {}
    local: Json = {}
    if any(isinstance(value, dict) for value in given.values()):  # by the layers' type
        if values["model_type"] != "gemma3_text":
            raise UserError(
                f"{where}: rope_parameters differ by layer type, which {values['model_type']} does not have"
            )
        local, given = given.get("sliding_attention") or {}, given.get("full_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise UserError(
                f'{where}: rope type "{local["rope_type"]}" in layers with a window is not supported: "default" is'
            )
    if values.get("rope_scaling"):  # the older key, which says all but the base
        given = {key: given.get(key) for key in ("rope_theta", "partial_rotary_factor")} | values["rope_scaling"]
    theta = given.get("rope_theta") or values.get(family.theta) or values.get("rope_theta") or 10_000.0
    out: Json = {"rope_theta": float(theta), "rope_scaling": None}
    try:
        out["rope_scaling"] = _scaling(given, values, where)
    except KeyError as error:
        raise UserError(f"{where}: the rotary scaling has no {error}: add it, or take the scaling out") from error
    if values["model_type"] == "gemma3_text":
        out["local_rope_theta"] = float(local.get("rope_theta") or values["rope_local_base_freq"])
    neox = values["model_type"] == "gpt_neox"
    default = values.get("rotary_pct", 0.25) if neox else 1.0
    part = float(given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or default)
    if part != 1.0 and not neox:
        raise UserError(f"{where}: partial_rotary_factor {part} is not supported for {values['model_type']}: 1.0 is")
    out["rotary_dims"] = 0 if part == 1.0 else int(head_dim * part)
    return out


def _scaling(given: Json, values: Json, where: str) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    own = "original_max_position_embeddings"
    context = values.get(own) or given.get(own) or values["max_position_embeddings"]
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(given["factor"]))
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        return RopeScaling("llama3", float(given["factor"]), context, float(low), float(high))
    if kind == "yarn":
        factor = float(given.get("factor") or values["max_position_embeddings"] / context)
        return RopeScaling(
            "yarn",
            factor,
            context,
            float(given.get("beta_slow") or 1),
            float(given.get("beta_fast") or 32),
            _yarn_attention(given, factor),
            bool(given.get("truncate", True)),
        )
    raise UserError(f'{where}: rope type "{kind}" is not supported: default, linear, llama3 and yarn are')


def _yarn_attention(given: Json, factor: float) -> float:
    """What YaRN multiplies sine and cosine by: given, or 1 + 0.1 ln factor (arXiv 2309.00071, equation 22)."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 1.0 + 0.1 * by * math.log(factor)

    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(given["mscale"]) / grown(given["mscale_all_dim"])
    return grown(1.0)


def to_json(config: TransformerConfig) -> Json:
    """The decoder's part of a config.json.

    Raises:
      UserError: the family's format can't say what `config` does; the fields are named.
    """
    family = family_of(config)
    out: Json = {"model_type": config.family}
    out.update({key: getattr(config, field) for field, key in family.keys.items()})
    out.update({key: out[key] or None for field, key in family.keys.items() if field in SOFTCAPS})
    key, default = family.activation
    names = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    out[key] = default if ACTIVATIONS[default] == config.activation else names[config.activation]
    if config.family == "gemma":
        out["hidden_act"] = out[key]
    if family.query_scalar:
        out["query_pre_attn_scalar"] = round(config.scale**-2)
    if config.family == "gpt2":
        out["scale_attn_weights"] = config.scale != 1.0 or config.head_dim == 1
    out.update(_windows_json(config, family))
    if config.positions == "rotary":
        out.update(_rope_json(config, family))
    back = from_json(out, "config.json")
    wrong = [f"{field}={value!r}" for field, value in _meaning(config).items() if value != _meaning(back)[field]]
    if wrong:
        raise UserError(
            f'the family "{config.family}" has no checkpoint with model.{" and model.".join(wrong)}: change them, or '
            f"model.family (one of {SUPPORTED})"
        )
    return out


def _meaning(config: TransformerConfig) -> Json:
    """A config's fields, one spelling for what means the same; not how it is computed."""
    fields = dataclasses.replace(
        config, dtype="float32", param_dtype="float32", remat="none", attention="auto"
    ).to_dict()
    fields["windows"] = list(config.windows) if any(config.windows) else []
    fields["query_scale"] = config.scale
    if config.positions == "learned":
        return {**fields, "rope_theta": 0, "rope_scaling": None, "rotary_dims": 0, "local_rope_theta": 0}
    fields["rotary_dims"] = config.rotary_dims or config.head_dim
    same = not config.local_rope_theta and not config.rope_scaling
    fields["local_rope_theta"] = config.rope_theta if same else config.local_rope_theta
    if not any(config.windows):
        fields["local_rope_theta"] = 0
    return fields


def _windows_json(config: TransformerConfig, family: Family) -> Json:
    window = max(config.windows, default=0) or None
    sliding = [config.window(layer) > 0 for layer in range(config.layers)]
    if family.windows == "none":
        return {}
    if family.windows == "all":
        return {"sliding_window": window}
    out: Json = {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in sliding],
    }
    if config.family in ("qwen2", "qwen3"):
        first = sliding.index(True) if any(sliding) else config.layers
        out.update(use_sliding_window=any(sliding), max_window_layers=first)
    elif config.family == "gemma3_text":
        for every in range(1, config.layers + 2):
            if sliding == [(layer + 1) % every > 0 for layer in range(config.layers)]:
                out["sliding_window_pattern"] = every
                break
    return out


def _rope_json(config: TransformerConfig, family: Family) -> Json:
    """Rotary positions in the current key and in the older ones."""
    scaling: Json | None = None
    if config.rope_scaling is not None:
        s = config.rope_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind != "linear":
            scaling["original_max_position_embeddings"] = s.original_context
        if s.kind == "llama3":
            scaling.update(low_freq_factor=s.low, high_freq_factor=s.high)
        if s.kind == "yarn":
            scaling.update(beta_slow=s.low, beta_fast=s.high, attention_factor=s.attention_factor, truncate=s.truncate)
    given = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    out: Json = {family.theta: config.rope_theta, "rope_scaling": scaling, "rope_parameters": given}
    if config.family == "gemma3_text":
        local = config.local_rope_theta or config.rope_theta
        out["rope_local_base_freq"] = local
        out["rope_parameters"] = {
            "full_attention": given,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    if config.family == "gpt_neox":
        dims = config.rotary_dims or config.head_dim
        part = dims / config.head_dim
        if int(config.head_dim * part) != dims:  # lost in rounding
            part = (dims + 0.5) / config.head_dim
        out["rotary_pct"] = given["partial_rotary_factor"] = part
    return out
