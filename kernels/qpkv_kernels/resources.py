"""What the kernels compile to, without a GPU: registers, spills, shared memory, instructions per byte.

    python -m qpkv_kernels.resources --arch 80 90 100      one JSON line for each kernel and architecture

Triton compiles for any NVIDIA architecture wherever it is installed; the numbers are read from the machine code with
the cuobjdump and nvdisasm that it brings. Instructions per byte are those of the longest loop, times all lanes of a
program, over the bytes of keys and values that one pass reads.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qpkv_kernels import append, decode, quantize, score
from qpkv_kernels.block import BlockLayout, Segment, Side
from qpkv_kernels.decode import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NUMBERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS = {
    "TRANSFORMED": "*fp32", "BIAS": "*fp32", "BLOCK": "*u8", "PLACES": "*i32", "WORK": "*i32", "PROMPT": "*i32",
    "APPENDED": "*i32", "PROBLEMS": "*i32", "ACC": "*fp32", "STATE": "*fp32", "ROWS": "*i64", "COUNTS": "*i64",
    "POSITIONS": "*i32", "OFFSETS": "*i32", "PARTIAL": "*fp64", "PADDING": "*i32", "OUT": "*fp32",
}  # fmt: skip
SCALARS = {
    "block_stride": "i64", "num_runs": "i32", "scaling": "fp32", "softcap": "fp32", "window": "i32", "vectors": "i32",
    "offset": "i32", "limit": "fp32", "key_row": "i32", "key_head": "i32", "value_row": "i32", "value_head": "i32",
    "num_slots": "i32", "first_run": "i32", "num_queries": "i32", "num_tokens": "i32",
    **{f"{whose}{what}_stride": "i64" for whose in ("", "query_", "key_") for what in ("row", "head", "token")},
}  # fmt: skip


def side(name: str) -> Side:
    """ "16bit", or a scheme and bits: "channel4", "token2", "rotated4"."""
    if name == "16bit":
        return Side(16, "none")
    scheme, bits = name[:-1], int(name[-1])
    return Side(bits, scheme, 0 if scheme == "rotated" else 64)  # type: ignore[arg-type]


def make_layout(keys: str, values: str, head_size: int, dtype: torch.dtype) -> BlockLayout:
    """A tier of 8 KV heads in the given format, and a reserve of rotated 4-bit codes in the same launch."""
    tier = Segment(side(keys), side(values), 512)
    reserve = Segment(side("rotated4"), side("rotated4"), 64)
    return BlockLayout((tier, reserve), 8, head_size, 64, 0, 2, None, str(dtype).removeprefix("torch."))


def compile_decode(
    keys: str, values: str, arch: int, head_size: int = 128, dtype: torch.dtype = torch.float16, gqa: int = 4,
    launch: Launch | None = None, with_reserve: bool = True,
) -> tuple[Any, int]:  # fmt: skip
    """(the compiled `_decode`, bytes of keys and values in a tile of the tier). Needs TRITON_INTERPRET unset."""
    layout = make_layout(keys, values, head_size, dtype)
    if not with_reserve:
        layout = replace(layout, segments=layout.segments[:1])
    launch = launch or decode.default_launch(layout, arch)
    constants = {**decode.constants(layout, dtype, gqa, launch, is_interpreted=False), "SOFTCAP": False}
    query = NUMBERS[dtype]
    compiled = _compile(
        decode._decode,
        {"QUERY": query, **POINTERS},
        constants,
        arch,
        {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    tile = constants["SEGMENTS"][0][3]
    tier = layout.segments[0]
    return compiled, tile * head_size * (tier.keys.bits + tier.values.bits) // 8


def compile_merge(arch: int) -> Any:
    constants = {
        "ROTATED": 2, "TILE_GROUPS": 1, "ROWS": 16, "GQA": 4, "D": 128, "D_PADDED": 128, "D_BLOCK": 128, "RUNS": 16,
    }  # fmt: skip
    return _compile(decode._merge, {**POINTERS, "OUT": "*fp16"}, constants, arch, {"num_warps": 1})


def compile_transform(arch: int) -> Any:
    constants = {
        "VECTORS": (0, 1), "STORED_VECTORS": 2, "ROTATED": True, "HEADS": 8, "GQA": 4, "D": 128, "D_PADDED": 128,
        "D_BLOCK": 128, "NUMBER": decode.TRITON_DTYPES[torch.float16],
    }  # fmt: skip
    return _compile(decode._transform_query, {"QUERY": "*fp16", **POINTERS}, constants, arch, {"num_warps": 1})


def compile_append(reserve: str, arch: int, head_size: int = 128, dtype: torch.dtype = torch.float16) -> Any:
    """The compiled `_append` to a reserve of this format, keys and values alike."""
    layout = make_layout(reserve, reserve, head_size, dtype)
    layout = replace(layout, segments=layout.segments[:1])
    query = NUMBERS[dtype]
    pointers = {"KEY": query, "VALUE": query, **POINTERS}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return _compile(append._append, pointers, append.constants(layout, CLIPS), arch, options)


def compile_write(
    name: str, is_value: bool, arch: int, head_size: int = 128, source: torch.dtype = torch.float16
) -> Any:
    """The kernel that writes one side of a prompt's tokens in this format."""
    sides = ("16bit", name) if is_value else (name, "16bit")
    layout = make_layout(*sides, head_size, torch.bfloat16 if source == torch.bfloat16 else torch.float16)
    _, constants = quantize.write_launch(layout, 0, int(is_value), CLIPS, is_interpreted=False)
    kernel = quantize._write_channels if name.startswith("channel") else quantize._write_tokens
    constants["POSITIONED"] = not is_value
    options = {"num_warps": quantize.NUM_WARPS, "enable_fp_fusion": False}
    return _compile(kernel, {**POINTERS, "SOURCE": NUMBERS[source]}, constants, arch, options)


def compile_moments(arch: int) -> Any:
    constants = {
        "HEADS": 8, "D": 128, "CHANNELS": quantize.CHANNELS, "RUN": quantize.MOMENT_TOKENS, "TILE": quantize.TILE,
        "NUMBER": decode.TRITON_DTYPES[torch.float16],
    }  # fmt: skip
    options = {"num_warps": quantize.NUM_WARPS, "enable_fp_fusion": False}
    return _compile(quantize._key_moments, {**POINTERS, "SOURCE": "*fp16"}, constants, arch, options)


def compile_score(
    kernel: Any,
    arch: int,
    head_size: int = 128,
    dtype: torch.dtype = torch.float16,
) -> Any:
    constants = score.constants(8, 4, 16, head_size, dtype, is_interpreted=False)
    constants |= {"WINDOW": False, "SOFTCAP": False}
    constants |= {"RUN": score.RUN} if kernel is score._statistics else {"RUNS": score.RUNS_PER_STEP}
    options = {"num_warps": score.num_warps(dtype), "num_stages": score.NUM_STAGES}
    return _compile(kernel, {**POINTERS, "QUERY": NUMBERS[dtype], "KEY": NUMBERS[dtype]}, constants, arch, options)


def _compile(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], arch: int, options: dict[str, Any]
) -> Any:
    types = {**pointers, **SCALARS, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    signature = {name: types[name] for name in names}
    is_aligned = [name for name in names if signature[name].startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in is_aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """registers per thread, bytes of local memory (spills) and stack per thread, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _run("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_bytes": local,
        "shared_bytes": compiled.metadata.shared,
    }


def loop_instructions(compiled: Any) -> int:
    """Machine instructions in the body of the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        lines = _run("nvdisasm", "-c", file.name).splitlines()
    count, labels, longest = 0, {}, 0
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if (branch := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def inexact_operations(compiled: Any) -> int:
    """Fused multiply-adds and approximate divisions in the PTX: none may be where bits must equal the reference's."""
    return len(re.findall(r"\b(?:fma|mad)\.rn\.f|div\.(?:full|approx)\.", compiled.asm["ptx"]))


def tiles_through_shared_memory(compiled: Any) -> list[str]:
    """Stores to shared memory of unpacked codes, in TTGIR: two-dimensional float16 tiles other than weights and query.

    A tile that the pipeline copies is a word (i16); what is stored as f16 and is larger than the padded rows is not.
    """
    stores = re.findall(r"ttg\.local_(?:alloc|store) .*?tensor<(\d+)x(\d+)xf16", compiled.asm["ttgir"])
    return [f"{rows}x{columns}" for rows, columns in stores if min(int(rows), int(columns)) > 16]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


ORDINARY = (("16bit", "16bit", 128), ("rotated4", "rotated4", 128), ("channel4", "token4", 128))
OTHERS = (
    ("channel8", "token8", 128),
    ("token4", "token4", 64),
    ("channel2", "token2", 128),
    ("rotated4", "rotated2", 64),
    ("rotated3", "rotated3", 64),
    ("channel1", "token1", 128),
    ("token4", "token4", 96),
    ("rotated4", "rotated4", 256),
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
WRITTEN = (("rotated4", False, 128, F16), ("channel4", False, 128, F16), ("token4", True, 128, F16))
WRITTEN_OTHERS = (
    ("rotated1", True, 256, BF16),
    ("rotated3", False, 80, F32),
    ("rotated2", True, 64, F32),
    ("channel3", False, 96, BF16),
    ("channel1", False, 256, F32),
    ("token2", False, 64, F32),
    ("token8", True, 256, BF16),
    ("16bit", True, 128, F32),
)
SCORED = ((128, F16),)
SCORED_OTHERS = ((64, F16), (80, BF16), (96, F16), (256, BF16), (64, F32), (128, F32))


CLIPS = {4: (1.0, 0.9, 0.8, 0.7), 1: (1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)}  # as the runtime's
RESERVES = ("token4", "rotated4", "16bit", "token3", "rotated1")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="80 is sm_80")
    parser.add_argument("--all", action="store_true", help="formats and head sizes that are built the same way, too")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for keys, values, head_size in ORDINARY + (OTHERS if arguments.all else ()):
            row: dict[str, Any] = {"kernel": "decode", "keys": keys, "values": values, "head_size": head_size}
            compiled, tile_bytes = compile_decode(keys, values, arch, head_size, with_reserve=arguments.all)
            row |= {"arch": arch, **resources(compiled), "unpacked_tiles": tiles_through_shared_memory(compiled)}
            if not arguments.all:
                lanes = 32 * compiled.metadata.num_warps
                row["instructions_per_byte"] = round(lanes * loop_instructions(compiled) / tile_bytes, 2)
            print(json.dumps(row), flush=True)
        for name, make in (("merge", compile_merge), ("transform_query", compile_transform)):
            print(json.dumps({"kernel": name, "arch": arch, **resources(make(arch))}), flush=True)
        for reserve in RESERVES if arguments.all else RESERVES[:1]:
            row = {"kernel": "append", "arch": arch, "reserve": reserve, **resources(compile_append(reserve, arch))}
            print(json.dumps(row), flush=True)
        for format, is_value, head_size, source in WRITTEN + (WRITTEN_OTHERS if arguments.all else ()):
            compiled = compile_write(format, is_value, arch, head_size, source)
            row = {"kernel": "write", "format": format, "head_size": head_size, "arch": arch, **resources(compiled)}
            print(json.dumps({**row, "inexact_operations": inexact_operations(compiled)}), flush=True)
        compiled = compile_moments(arch)
        row = {"kernel": "key_moments", "arch": arch, **resources(compiled)}
        print(json.dumps({**row, "inexact_operations": inexact_operations(compiled)}), flush=True)
        for head_size, dtype in SCORED + (SCORED_OTHERS if arguments.all else ()):
            for name, kernel in (("statistics", score._statistics), ("received", score._received)):
                row = {"kernel": name, "arch": arch, "head_size": head_size, "dtype": str(dtype)}
                print(json.dumps({**row, **resources(compile_score(kernel, arch, head_size, dtype))}), flush=True)


if __name__ == "__main__":
    main()
