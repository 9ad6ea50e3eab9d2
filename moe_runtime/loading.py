"""Load a checkpoint through transformers, everything but the experts.

A subclass made for one load drops the expert tensors right after the model is built on the meta
device; transformers then loads what is left as always. Knows no cache and no budget.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.expert_tensors import drop_expert_tensors
from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.safetensors_index import HUB_OPTIONS

__all__ = ["Structure", "build_structure", "load_without_experts", "resolve_class"]

# In this order: the class that `AutoModelForCausalLM` would give comes first.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
)
_CONFIG_OPTIONS = (*HUB_OPTIONS, "trust_remote_code", "code_revision")


@dataclass(kw_only=True)
class Structure:
    """What a model looked like before its experts were dropped.

    Attributes:
        spec: MoE layers and experts.
        keys: names of all parameters and buffers, experts included.
        ignored: patterns of keys that the model itself does not miss.
    """

    spec: MoESpec | None = None
    keys: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def of(self) -> MoESpec:
        """The spec, which is there once the model has been built."""
        assert self.spec is not None, "the model has been built"
        return self.spec


def read_config(path_or_id: str, options: dict[str, Any]) -> PreTrainedConfig:
    """The checkpoint's configuration, through the usual hub options."""
    given = options.get("config")
    if isinstance(given, PreTrainedConfig):
        return given
    chosen = {name: options[name] for name in _CONFIG_OPTIONS if options.get(name) is not None}
    return AutoConfig.from_pretrained(given or path_or_id, **chosen)  # type: ignore[no-any-return]


def resolve_class(config: PreTrainedConfig, auto_class: str | None) -> type[PreTrainedModel]:
    """The model class for a configuration.

    Args:
        auto_class: name of a transformers auto class, or None for the first that knows it.

    Raises:
        UnsupportedModelError: no auto class knows the configuration, or it is quantised.
    """
    _refuse_quantised(config)
    names = (auto_class,) if auto_class else _AUTO_CLASSES
    for name in names:
        auto = getattr(transformers, name, None)
        if auto is None:
            continue
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            candidates = found if isinstance(found, (tuple, list)) else (found,)
            named = [c for c in candidates if c.__name__ in (config.architectures or ())]
            return (named or list(candidates))[0]  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"no model class among {', '.join(names)} for {type(config).__name__} "
        f"(model_type {config.model_type!r})"
    )


def _refuse_quantised(config: PreTrainedConfig) -> None:
    places = [config]
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            places.append(inner)
    for place in places:
        found = getattr(place, "quantization_config", None)
        if found is not None:
            as_dict = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
            method = as_dict.get("quant_method", "unknown")
            method = getattr(method, "value", method)
            raise UnsupportedModelError(
                f"the checkpoint is quantised (quant_method {method!r}); the runtime reads "
                "float32, float16 and bfloat16 experts. Use the unquantised checkpoint."
            )


def _lean_class(cls: type[PreTrainedModel], structure: Structure) -> type[PreTrainedModel]:
    """`cls`, but instances lose their expert tensors as soon as they are built."""

    def build(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        structure.spec = read_spec(self)
        structure.keys = list(self.state_dict())
        # There is nothing of them to initialise, and their classes, or those of the blocks around
        # them, would try.
        for owner in drop_expert_tensors(self, structure.spec):
            owner._is_hf_initialized = True  # type: ignore[assignment]
        ignored = [
            _key_pattern(self, key)
            for layer in structure.spec.layers
            for param in layer.params
            for key in layer.keys(param)
        ]
        structure.ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = structure.ignored | set(ignored)

    # The module stays the original's: transformers reads the class's source from it.
    return type(
        cls.__name__,
        (cls,),
        {"__init__": build, "__module__": cls.__module__, "__qualname__": cls.__qualname__},
    )


def _key_pattern(model: PreTrainedModel, key: str) -> str:
    """Matches exactly this expert tensor's key, with or without the base model's prefix."""
    short = key.removeprefix(f"{model.base_model_prefix}.")
    return rf"(^|\.){re.escape(short)}$"


def load_without_experts(
    cls: type[PreTrainedModel], path_or_id: str, options: dict[str, Any]
) -> tuple[Any, Structure]:
    """`cls.from_pretrained` without the experts.

    Returns:
        What `from_pretrained` returned (a model, or a pair with loading info), and the structure.
    """
    structure = Structure()
    lean = _lean_class(cls, structure)
    try:
        result = lean.from_pretrained(path_or_id, **options)
    except SafetensorError as error:
        raise CheckpointError(f"{path_or_id}: a shard cannot be read ({error})") from error
    model = result[0] if isinstance(result, tuple) else result
    model.__class__ = cls
    model._keys_to_ignore_on_load_unexpected = structure.ignored
    return result, structure


def build_structure(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: Any
) -> tuple[PreTrainedModel, Structure]:
    """The model on the meta device, for its structure alone: no memory, no files."""
    before = torch.get_default_dtype()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    structure = Structure(spec=read_spec(model), keys=list(model.state_dict()))
    return model, structure
