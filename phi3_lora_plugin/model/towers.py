"""Shapes of what Phi-4-multimodal has next to its text model: the towers that see and hear, and their projections.

From `transformers.models.phi4_multimodal`. A test holds them to the real modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, log2
from typing import Any

from phi3_lora_plugin.model.families import TOWERS

Shapes = dict[str, tuple[int, ...]]
#: What transformers takes where a config.json leaves a size out; those of the published model.
_VISION = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_channels=3, image_size=448, patch_size=14
)
_AUDIO = dict(
    hidden_size=1024, intermediate_size=1536, num_blocks=24, num_attention_heads=16, ext_pw_out_channel=1024,
    depthwise_separable_out_channel=1024, depthwise_multiplier=1, kernel_size=3, input_size=80, time_reduction=8,
    bias_max_distance=1000, bias_symmetric=False, nemo_conv_channels=1024, downsample_rate=1,
)  # fmt: skip
#: As transformers before 5 spells it.
_RENAMED = {"depthwise_seperable_out_channel": "depthwise_separable_out_channel"}


def tower_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the weights below `families.TOWERS`, from the content of a config.json."""
    text = int(config["hidden_size"])
    vision = _VISION | dict(config.get("vision_config") or {})
    audio = _AUDIO | {_RENAMED.get(key, key): value for key, value in (config.get("audio_config") or {}).items()}
    shapes = _vision(vision, text) | _audio(audio, text)
    return {f"{TOWERS}.{name}": shape for name, shape in shapes.items()}


def _layer(name: str, *shape: int) -> Shapes:
    """Weight and bias of a linear layer [out, in], a convolution or a norm, by the shape of the weight."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _vision(vision: Mapping[str, Any], text: int) -> Shapes:
    size, inner, patch = int(vision["hidden_size"]), int(vision["intermediate_size"]), int(vision["patch_size"])
    at = "image_embed.img_processor"
    patches = (int(vision["image_size"]) // patch) ** 2
    shapes: Shapes = {
        "image_embed.global_img_feature_extensor": (1, 1, size),
        "image_embed.sub_img_feature_extensor": (1, 1, 1, size),
        f"{at}.embeddings.position_embedding.weight": (patches, size),
        f"{at}.head.probe": (1, 1, size),
        f"{at}.head.attention.in_proj_weight": (3 * size, size),
        f"{at}.head.attention.in_proj_bias": (3 * size,),
    }
    shapes |= _layer(f"{at}.embeddings.patch_embedding", size, int(vision["num_channels"]), patch, patch)
    for layer in range(int(vision["num_hidden_layers"])):
        here = f"{at}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{here}.self_attn.{name}", size, size)
        shapes |= _layer(f"{here}.mlp.fc1", inner, size) | _layer(f"{here}.mlp.fc2", size, inner)
        shapes |= _layer(f"{here}.layer_norm1", size) | _layer(f"{here}.layer_norm2", size)
    shapes |= _layer(f"{at}.head.attention.out_proj", size, size) | _layer(f"{at}.head.layernorm", size)
    shapes |= _layer(f"{at}.head.mlp.fc1", inner, size) | _layer(f"{at}.head.mlp.fc2", size, inner)
    shapes |= _layer(f"{at}.post_layernorm", size)
    shapes |= _layer("image_embed.img_projection_up", text, size)
    return shapes | _layer("image_embed.img_projection_down", text, text)


def _audio(audio: Mapping[str, Any], text: int) -> Shapes:
    size, inner, wide = int(audio["hidden_size"]), int(audio["intermediate_size"]), int(audio["ext_pw_out_channel"])
    channels, at = int(audio["nemo_conv_channels"]), "audio_embed.encoder"
    halvings, bands = int(log2(audio["time_reduction"])), int(audio["input_size"])
    shapes = _layer(f"{at}.embed.conv.0", channels, 1, 3, 3)
    for place in range(2, 3 * halvings - 1, 3):  # depthwise, then pointwise, then an activation
        shapes |= _layer(f"{at}.embed.conv.{place}", channels, 1, 3, 3)
        shapes |= _layer(f"{at}.embed.conv.{place + 1}", channels, channels, 1, 1)
    for _ in range(halvings):
        bands = floor((bands - 1) / 2 + 1)
    shapes |= _layer(f"{at}.embed.out", size, channels * bands)
    distances = int(audio["bias_max_distance"]) * (1 if audio["bias_symmetric"] else 2)
    shapes[f"{at}.relative_attention_bias_layer.bias_values.weight"] = (distances, int(audio["num_attention_heads"]))
    for block in range(int(audio["num_blocks"])):
        shapes |= _conformer(f"{at}.encoders.{block}", size, inner, wide, audio)
    for mode in ("speech", "vision_speech"):
        shapes |= _layer(f"audio_embed.up_proj_for_{mode}", text, size * int(audio["downsample_rate"]))
        shapes |= _layer(f"audio_embed.down_proj_for_{mode}", text, text)
    return shapes


def _conformer(at: str, size: int, inner: int, wide: int, audio: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {f"{at}.conv.glu.b1": (1, wide, 1), f"{at}.conv.glu.b2": (1, wide, 1)}
    for part in ("feed_forward_in", "feed_forward_out"):
        shapes |= _layer(f"{at}.{part}.gate_up_proj", 2 * inner, size) | _layer(f"{at}.{part}.down_proj", size, inner)
        shapes |= _layer(f"{at}.{part}.layer_norm", size)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes |= _layer(f"{at}.self_attn.{name}", size, size)
    depth = size * int(audio["depthwise_multiplier"])
    separable = int(audio["depthwise_separable_out_channel"])
    shapes |= _layer(f"{at}.conv.glu.ext_pw_conv_1d", 2 * wide, size, 1)
    shapes |= _layer(f"{at}.conv.dw_sep_conv_1d.dw_conv", depth, 1, int(audio["kernel_size"]))
    shapes |= _layer(f"{at}.conv.dw_sep_conv_1d.pw_conv", separable, depth, 1)
    shapes |= _layer(f"{at}.conv.ext_pw_conv_1d", wide, size, 1)
    for name in ("conv.layer_norm", "layer_norm_att", "layer_norm"):
        shapes |= _layer(f"{at}.{name}", size)
    return shapes
