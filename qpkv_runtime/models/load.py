"""Load a model and its tokenizer for running plans: by name, in a number type this machine is fast at, with our
attention. Unless asked, only safetensors and only transformers' own model code, never a checkpoint's pickle or Python
files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qpkv_runtime.errors import InputError, ModelNotFoundError, UnsupportedModelError, is_out_of_memory
from qpkv_runtime.host_memory import keep_freed_blocks
from qpkv_runtime.models.identity import model_shape
from qpkv_runtime.models.quiet import quiet_transformers
from qpkv_runtime.models.resolve import ModelSource, resolve

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    *,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode with `attn_implementation="qpkv"`, and its tokenizer.

    name: see `resolve`. dtype: float32, float16, bfloat16, or auto (`choose_dtype`). device: a torch device, or auto
    (cuda when there is one, else cpu). device_map: in place of a device, transformers' own: auto, balanced, sequential
    or module -> device (cpu and disk included), through accelerate. revision: branch, tag or commit of a model on the
    hub. trust_remote_code: run the Python files beside the weights. allow_pickle: take .bin files where there are no
    safetensors. A model that is not on this machine is downloaded from the hub; one that is loads without asking the
    network.

    Raises ModelNotFoundError (no such name, or weights that cannot be had), UnsupportedModelError (a family whose
    cache we do not know, an incomplete or damaged checkpoint, or no tokenizer) and InputError (dtype, device or
    revision).
    """
    import qpkv_runtime.attention  # noqa: F401  (registers the attention function "qpkv")

    place, _ = place_and_dtype(device, dtype)
    if place.type == "cpu":
        keep_freed_blocks()
    source = resolve(name)
    common = {"revision": _revision(source, revision), "trust_remote_code": trust_remote_code}
    config = _from_pretrained(AutoConfig, source, **common)
    model_shape(config)  # an unsupported family ends here, before its weights are read
    own_dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
    model, report = _from_pretrained(
        AutoModelForCausalLM,
        source,
        config=config,
        dtype=choose_dtype(place, own_dtype) if dtype == "auto" else DTYPES[dtype],
        device_map=device_map or place,
        attn_implementation="qpkv",
        use_safetensors=None if allow_pickle else True,
        output_loading_info=True,
        **common,
    )
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{source.path_or_id} lacks {len(missing)} of the model's weights ({missing[0]}, ...)"
        )
    return model.eval(), _tokenizer(source, **common)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`; arguments and errors as of `load_model`."""
    source = resolve(name)
    return _tokenizer(source, revision=_revision(source, revision), trust_remote_code=trust_remote_code)


def _tokenizer(source: ModelSource, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, **options)
    if not tokenizer("a", add_special_tokens=False).input_ids:  # what transformers makes of a folder without its files
        raise UnsupportedModelError(
            f"a tokenizer must encode text, and that of {source.path_or_id} makes nothing of 'a': a model directory "
            "holds tokenizer.json"
        )
    return tokenizer


def place_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where and in which number type a model would load that does not say its own. Raises InputError."""
    place = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return place, choose_dtype(place) if dtype == "auto" else DTYPES[dtype]


def load_config(name: str) -> PreTrainedConfig:
    """The config of the model `name`; errors as of `load_model`."""
    config: PreTrainedConfig = _from_pretrained(AutoConfig, resolve(name), trust_remote_code=False)
    return config


def _revision(source: ModelSource, revision: str | None) -> str:
    if revision is not None and source.kind != "hub":
        raise InputError(f"a revision is one of a model on the hub, and {source.name} is a {source.kind} model")
    return revision or "main"


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a model on the hub whose files load under this name and revision, once they are on this machine;
    None for a model that does not come from there."""
    source = resolve(name)
    if source.kind != "hub":
        return None
    config = try_to_load_from_cache(source.path_or_id, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else None


def choose_dtype(device: torch.device, own: torch.dtype | None = None) -> torch.dtype:
    """The number type to run in on `device`, for a checkpoint stored as `own` (None: not said).

    CUDA: the checkpoint's own 16-bit type, bfloat16 when it has none. CPU: bfloat16 where there are AMX tiles, else
    float32. Measured on 2 Sapphire Rapids cores with AVX512-BF16 but AMX masked (torch 2.13, weights 576 x 1536):
    bf16 takes 2.0, 0.8 and 1.7 times as long as fp32 at 1, 16 and 1024 tokens; SmolLM2's prefill of 1024 takes 2.3 s
    against 1.7, a decode step 72 ms against 60. So AVX512-BF16 alone does not count, nor does ARM's, unmeasured.
    """
    if device.type != "cpu":
        return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    return torch.bfloat16 if _has_amx() else torch.float32


def _has_amx() -> bool:
    """Whether the CPU has AMX tiles and torch's oneDNN can use them."""
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.backends.mkldnn.is_available() and has_tiles is not None and bool(has_tiles())


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    num_gpus = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= num_gpus:
        raise InputError(
            f"torch {torch.__version__} sees {num_gpus} CUDA GPUs, got device {device!r}; choose auto or cpu"
        )
    return place


def _from_pretrained(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    """`auto_class.from_pretrained` with its errors as ours, in one line."""
    try:
        with quiet_transformers():
            return _local_first(auto_class, source, **options)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{source.path_or_id} needs its own Python files to load: read them, then add --trust-remote-code"
            ) from None
        raise UnsupportedModelError(f"transformers cannot load {source.path_or_id}: {_first_line(error)}") from None
    except OSError as error:
        advice = "a model directory holds config.json, safetensors (.bin: --allow-pickle) and tokenizer.json"
        if source.kind == "hub":
            advice = f"run `hf download {source.path_or_id}` where the hub can be reached, or name a local directory"
        raise ModelNotFoundError(f"cannot load {source.name}: {_first_line(error)}; {advice}") from None
    except Exception as error:  # whatever the readers of safetensors, configs and tokenizers meet in a damaged file
        if is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnsupportedModelError(
            f"transformers cannot load {source.path_or_id} ({what[:200]}): are its files whole, and of one model?"
        ) from error


def _local_first(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    """From this machine when it is here, else from the hub.

    Asking the hub first, as transformers does, costs a user without a network half a minute of retries per call.
    """
    try:
        return auto_class.from_pretrained(source.path_or_id, local_files_only=True, **options)
    except (OSError, ValueError):
        if source.kind != "hub":
            raise
    print(f"{source.path_or_id} is not in the Hugging Face cache, asking the hub", file=sys.stderr)
    return auto_class.from_pretrained(source.path_or_id, **options)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
