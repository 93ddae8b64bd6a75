"""Who a model is: the shape of its cache, and hashes that tell whether a plan was made for these very weights.

The hashes are of what the files say, not of how they happen to be loaded: number type (but float16, see
`ModelIdentity`), device, folder, attention and transformers version do not matter. (Converting a GGUF file is another
matter: transformers 5.17 and 5.23 write tokenizers from it that encode alike but differ in form, so their hashes
differ.)
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qpkv_runtime.errors import UnsupportedModelError
from qpkv_runtime.models.aliases import KnownModel
from qpkv_runtime.models.quiet import quiet_transformers
from qpkv_runtime.models.shape import ModelShape

_SLIDES_NOWHERE = ("llama", "gemma")
_SLIDES_EVERYWHERE = ("mistral",)  # where sliding_window is set at all
_SLIDES_BY_LAYER = ("qwen2", "qwen3", "gemma2", "gemma3_text")
SUPPORTED_FAMILIES = (*_SLIDES_NOWHERE, *_SLIDES_EVERYWHERE, *_SLIDES_BY_LAYER)

# How a model was loaded or is being used, not which model it is. So is every key that begins with an underscore.
_VOLATILE_KEYS = ("architectures", "dtype", "output_attentions", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class ModelIdentity:
    """Three hashes, each written "sha256:<64 hex digits>".

    weights_hash: "float16:<64 hex digits>" where loading rounded the weights to float16, in which small ones vanish:
    what the files say can then not be told.
    """

    config_hash: str
    tokenizer_hash: str
    weights_hash: str


def model_shape(model: PreTrainedModel | PreTrainedConfig) -> ModelShape:
    """The shape of a model's cache, from its (text) config.

    Raises UnsupportedModelError for families other than SUPPORTED_FAMILIES and for attention that is not causal.
    """
    config = _text_config(model if isinstance(model, PreTrainedConfig) else model.config)
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(f"model_type must be one of {', '.join(SUPPORTED_FAMILIES)}, got {family!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"a decoder attends to the past only, and this {family} looks both ways")
    return ModelShape(
        model_type=family,
        num_layers=_whole(config, "num_hidden_layers"),
        num_query_heads=_whole(config, "num_attention_heads"),
        num_kv_heads=_whole(config, "num_key_value_heads"),
        head_size=getattr(config, "head_dim", None) or config.hidden_size // (config.num_attention_heads or 1),
        max_context_tokens=config.max_position_embeddings,
        sliding_windows=_sliding_windows(config),
    )


def known_model(model: PreTrainedModel | PreTrainedConfig) -> KnownModel:
    """What `aliases` says of a model, from any (text) config. Raises UnsupportedModelError as `model_shape`."""
    config = _text_config(model if isinstance(model, PreTrainedConfig) else model.config)
    return KnownModel(
        None, model_shape(config), config.hidden_size, config.intermediate_size, config.vocab_size,
        bool(config.tie_word_embeddings),
    )  # fmt: skip


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """Hash config, tokenizer and weights; reads every weight once (about a second per GB).

    Raises UnsupportedModelError for a tokenizer without a `tokenizers` backend, whose rules cannot be written down.
    """
    return ModelIdentity(_config_hash(model.config), _tokenizer_hash(tokenizer), _weights_hash(model))


def are_unlike(one: str, other: str) -> bool:
    """Whether two hashes say that what they are of is not the same; of weights and their roundings none can tell."""
    return one != other and one.partition(":")[0] == other.partition(":")[0]


def weights_warning(planned: str | None, name: str, identity: ModelIdentity) -> str | None:
    """What to say where the model `name` has other weights than those of a plan's hash, None where it names none."""
    if planned is None or not are_unlike(planned, identity.weights_hash):
        return None
    return f"warning: the plan was made on other weights than those of {name}: what it measured may not hold"


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _whole(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise UnsupportedModelError(
            f"every layer must have the same key-value heads: {name} must be one whole number, got {value!r}"
        )
    return value


def _sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    num_layers: int = config.num_hidden_layers
    if config.model_type in _SLIDES_NOWHERE:
        return (None,) * num_layers
    window: int | None = config.sliding_window
    if config.model_type in _SLIDES_EVERYWHERE:
        return (window,) * num_layers
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in config.layer_types:
        if kind not in windows:
            raise UnsupportedModelError(f"a layer's type must be one of {', '.join(windows)}, got {kind!r}")
    return tuple(windows[kind] for kind in config.layer_types)


def _config_hash(config: PreTrainedConfig) -> str:
    # to_diff_dict, not to_dict: it leaves out transformers' generic settings, which come and go with its versions.
    settings = _text_config(config).to_diff_dict()
    kept = {key: value for key, value in settings.items() if key not in _VOLATILE_KEYS and not key.startswith("_")}
    return _sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")))


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(f"a tokenizer needs a `tokenizers` backend; {type(tokenizer).__name__} has none")
    rules = json.loads(backend.to_str())
    rules.pop("padding")  # these two are left behind by the last call, not part of the tokenizer
    rules.pop("truncation")
    return _sha256(json.dumps([rules, tokenizer.chat_template], sort_keys=True))


def _weights_hash(model: PreTrainedModel) -> str:
    """Over name, shape and bfloat16 bytes of every parameter, in name order; tied parameters count once."""
    is_rounded = model.dtype == torch.float16 and _stored_dtype(model.config) != "float16"
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        module, _, own_name = name.rpartition(".")
        owner = model.get_submodule(module)
        with _in_memory(owner) if parameter.is_meta else nullcontext():
            rounded = getattr(owner, own_name).detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(-1).view(torch.uint8).numpy().data)
    return f"{'float16' if is_rounded else 'sha256'}:{digest.hexdigest()}"


def _stored_dtype(config: PreTrainedConfig) -> str | None:
    """The number type of the checkpoint that a model was loaded from, as its config file says it."""
    if not config.name_or_path:
        return None
    revision = getattr(config, "_commit_hash", None) or "main"
    try:
        with quiet_transformers():
            stored = AutoConfig.from_pretrained(config.name_or_path, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    dtype = getattr(_text_config(stored), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """A module's parameters in memory, for a while, where a device map keeps them elsewhere."""
    from accelerate.utils import align_module_device

    brought: AbstractContextManager[None] = align_module_device(module, "cpu")
    return brought


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
