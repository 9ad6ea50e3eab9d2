"""Owns the list of causal-LM architectures that use transformers' experts interface, and a tiny
seeded model of each.

Does not know the runtime: everything here is plain transformers, found by introspection of the
release that is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HIDDEN = 32
HEADS = 4
HEAD_DIM = 16
EXPERTS = 16
TOP_K = 4
LAYERS = 4
VOCAB = 96
# Ids below FIRST_TEXT_ID are pad, bos, eos; ids from LAST_TEXT_ID on mark images, audio and so on.
FIRST_TEXT_ID = 3
LAST_TEXT_ID = 64

# Auto classes in the order in which a class is attributed to them.
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}

_DECORATED = re.compile(r"^@use_experts_implementation[^\n]*\nclass (\w+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureCase:
    """A model class of the installed transformers, named `name`, whose file uses the interface.

    ``excluded`` is empty, or says why no tiny model of it can run as a causal language model.
    """

    name: str
    auto_class: str
    config_class: str
    excluded: str = ""

    @property
    def model_type(self) -> type[PreTrainedModel]:
        return typing.cast("type[PreTrainedModel]", getattr(transformers, self.name))

    @property
    def auto_type(self) -> Any:
        return getattr(transformers, self.auto_class)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that plain transformers itself can run it in."""
        if transformers.__version__.startswith(_NO_BFLOAT16.get(self.name, ("-",))):
            return (torch.float32,)
        return (torch.float32, torch.bfloat16)

    def config(self) -> PreTrainedConfig:
        """A fresh tiny valid config."""
        return tiny_config(typing.cast("type[PreTrainedConfig]", self.model_type.config_class))


@functools.cache
def experts_classes_of_release() -> dict[str, str]:
    """Every experts class behind the interface in the installed release -> its module's name."""
    found: dict[str, str] = {}
    root = Path(inspect.getfile(transformers)).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        for name in _DECORATED.findall(file.read_text(encoding="utf-8")):
            found[name] = module
    return found


@functools.cache
def cases() -> tuple[ArchitectureCase, ...]:
    """Every model class of an auto class above that is defined in a file with such experts."""
    modules = set(experts_classes_of_release().values())
    found: dict[str, ArchitectureCase] = {}
    for auto_class, mapping_name in _AUTO_CLASSES.items():
        mapping: Mapping[str, str | tuple[str, ...]] = getattr(modeling_auto, mapping_name, {})
        for names in mapping.values():
            for name in (names,) if isinstance(names, str) else names:
                model_type = getattr(transformers, name, None)
                if model_type is None or model_type.__module__ not in modules or name in found:
                    continue
                found[name] = ArchitectureCase(
                    name=name,
                    auto_class=auto_class,
                    config_class=model_type.config_class.__name__,
                    excluded=_why_excluded(name),
                )
    return tuple(sorted(found.values(), key=lambda case: case.name))


def _why_excluded(name: str) -> str:
    if name == "InklingForConditionalGeneration" and not importlib.util.find_spec("scipy"):
        return "its vision tower needs scipy, which is not installed"
    return _EXCLUDED.get(name, "")


# Releases whose own forward pass fails in bfloat16 ("expected m1 and m2 to have the same dtype").
_NO_BFLOAT16: dict[str, tuple[str, ...]] = {"DeepseekV4ForCausalLM": ("5.17.",)}

# Classes that are found and yet cannot be run as a causal language model.
_EXCLUDED: dict[str, str] = {
    "DiffusionGemmaForBlockDiffusion": "denoises blocks of tokens; it is no causal language model",
    "Qwen3OmniMoeForConditionalGeneration": (
        "a container of the thinker (a case of its own) and a speech generator, without a forward"
    ),
}

# Experts classes that no case above can reach, with the reason.
UNREACHED: dict[str, str] = {
    "DiffusionGemmaTextExperts": _EXCLUDED["DiffusionGemmaForBlockDiffusion"],
    "OpenAIPrivacyFilterExperts": "only a token classifier uses it",
    "Qwen3OmniMoeTalkerTextExperts": "the speech generator has no auto class of its own",
}

# --- tiny models ---------------------------------------------------------------------------------


def build(case: ArchitectureCase, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised tiny model in eval mode, its parameters in ``dtype``.

    Made to be saved and loaded: parts that an architecture computes in float32 whatever the dtype
    are cast too here, and a forward pass may fail until ``from_pretrained`` has put them right.

    The default initialisation makes nearly dead experts and flat routing, and leaves some
    parameters empty: every matrix is drawn again so that a layer keeps its input's scale.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = case.model_type(case.config())
    generator = torch.Generator().manual_seed(seed)
    transposed = {
        id(parameter)
        for module in experts_modules(model).values()
        if module.is_transposed
        for parameter in module.parameters(recurse=False)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, generator, transposed=id(parameter) in transposed)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # a table of token id -> its experts, all zero at first
                keys = torch.rand(buffer.shape[0], EXPERTS, generator=generator)
                buffer.copy_(keys.argsort(dim=1)[:, : buffer.shape[1]])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.train(False)
    return model


def _draw(
    name: str, parameter: torch.Tensor, generator: torch.Generator, *, transposed: bool
) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2 or "norm" in name.rsplit(".", 2)[-2]:
        # Gains and biases, decay rates, sinks: near where the architecture puts them.
        start = parameter if bool(parameter.isfinite().all()) else torch.ones_like(parameter)
        parameter.copy_(start + 0.1 * noise)
    elif "bias" in name.rsplit(".", 1)[-1]:
        parameter.copy_(0.1 * noise)
    elif "embed" in name:
        parameter.copy_(noise)
    else:
        fan_in = parameter.shape[-2 if transposed else -1]
        if parameter.dim() > 3:  # convolutions
            fan_in = parameter[0].numel()
        parameter.copy_(noise * 1.5 / fan_in**0.5)


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> module, for every module whose class is behind the experts interface."""
    names = set(experts_classes_of_release())
    return {
        path: module for path, module in model.named_modules() if type(module).__name__ in names
    }


def inputs(*, padded: bool) -> dict[str, torch.Tensor]:
    """Two rows of eight text tokens; ``padded`` has the first row padded on the left by three."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- tiny configs -------------------------------------------------------------------------------

# One value per attribute name; a name that the config class does not declare is skipped.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    # mixture of experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "router_jitter_noise": 0.0,
    # latent attention and its indexer
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "index_n_heads": 2,
    "index_head_dim": HEAD_DIM,
    "index_topk": 8,
    # linear attention and state space
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "use_mamba_kernels": False,
    "moe_hidden_size": 24,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": HEAD_DIM,
    "sliding_window_size": 8,
    "rel_extent": 16,
    # vision and audio towers: never run here, only carried along
    "depth": 1,
    "output_channels": 16,
    "projector_hidden_size": HIDDEN,
    "projection_hidden_dim": HIDDEN,
    "projection_intermediate_size": HIDDEN,
    "position_embedding_size": 64,
    "num_position_embeddings": 64,
    "output_proj_dims": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "mel_vocab_size": 8,
    "mlp_dim": HIDDEN,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": HIDDEN,
    "d_model": HIDDEN,
    "output_dim": HIDDEN,
    "downsample_hidden_size": 16,
    "num_heads": 2,
    "image_size": 32,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
}


def _declared(config_type: type[PreTrainedConfig]) -> dict[str, Any]:
    """Attribute name -> default of every field that the class declares beyond the base config."""
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {
        field.name: field.default
        for field in dataclasses.fields(config_type)
        if field.name not in base or field.name in _SIZES
    }


def tiny_config(config_type: type[PreTrainedConfig], *, tower: bool = False) -> PreTrainedConfig:
    """A small valid config of a class: the rules by attribute name, then the class's own table.

    ``tower`` marks a vision or audio part, which gets a single layer.
    """
    values: dict[str, Any] = {}
    marker = VOCAB
    for name in _declared(config_type):
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif name.endswith(("_token_id", "_token_index")):
            marker -= 1
            values[name] = marker
        elif name in _SIZES:
            values[name] = _SIZES[name]
        elif name == "mlp_layer_types":
            values[name] = ["dense"] + ["sparse"] * (LAYERS - 1)
    if "kv_lora_rank" in values:  # latent attention has no grouped heads
        values["num_key_value_heads"] = HEADS
    if tower:
        values.pop("mlp_layer_types", None)
        if "num_hidden_layers" in values:
            values["num_hidden_layers"] = 1
    for name, sub_type in (config_type.sub_configs or {}).items():
        sub_config_type = sub_type
        if sub_type is transformers.AutoConfig:
            sub_config_type = type(getattr(config_type(), name))
        if sub_config_type is type(None):
            continue
        values[name] = tiny_config(sub_config_type, tower=name != "text_config")
    overrides = _OVERRIDES.get(config_type.__name__, {})
    return config_type(**{**values, **overrides})


_HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)

# Where the rules above do not give a valid config, or would leave fewer than two MoE layers.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_types": _HYBRID},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [16, HIDDEN]},
    "DeepseekOcr2TextConfig": {"num_key_value_heads": HEADS},
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [24, 12],  # text experts, vision experts
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "Dots3NoteAudioConfig": {"adapter_input_size": HIDDEN},
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    # Vision experts too: they never run here, and they must survive loading and saving.
    "Dots3NoteVisionConfig": {
        "num_hidden_layers": 2,
        "pyramid_num_routed": [-1, 4],
        "adapter_in_dim": HIDDEN,
    },
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": HEAD_DIM,
        "vocab_size_per_layer_input": VOCAB,
    },
    "Glm4vMoeTextConfig": {
        "head_dim": HEAD_DIM,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "Gemma4AudioConfig": {"subsampling_conv_channels": [8, 4]},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2},
    "GraniteMoeHybridConfig": {"layer_types": _HYBRID},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "KimiLinearConfig": {"layer_types": _HYBRID},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 1,
        "patch_sizes": (16,),
        "hidden_sizes": (16,),
        "depths": (1,),
    },
    "NemotronHConfig": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_latent_size": 16,
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": VOCAB - 10},
    "UnlimitedOcrSamVisionConfig": {"downsample_channels": (16, HIDDEN)},
    # The architecture allows one expert a token and no other number.
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
