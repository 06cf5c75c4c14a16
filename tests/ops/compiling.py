"""What Triton's kernels become on a Hopper card, found out on a machine without one.

Triton compiles for a card that is not there, but finds out what to compile from tensors that are. Here an operation is
called with tensors of torch's device "meta", which have a size and no memory; what it would launch is noted instead,
compiled for compute capability 9.0, and taken apart again. So it is the operation's own launch that is looked at: its
types, its block sizes, what the sizes let the compiler assume.

Run as a program, because within the tests the kernels are defined for Triton's interpreter: each line of input names a
case of `tests.ops.test_compiles_for_hopper`, each line of output is what `compiled` gives for it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
DISASSEMBLER = "backends/nvidia/bin/cuobjdump"


def no_memory(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def compiled(operation: Callable[[], object]) -> list[dict[str, Any]]:
    """Of each kernel that the operation launches, in order: its name, "registers" of a thread, bytes of "shared" memory
    of a program, and its "instructions", how many of each there are: "LDG.E.128" and so on. A wait for tensor cores
    stands among them with what it waits for, "gsb0, 0x1" being all but the last product asked for."""
    return [compile_for_hopper(*launch) for launch in launches(operation)]


def launches(operation: Callable[[], object]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that are launched, with what they are given."""
    from triton.runtime.jit import JITFunction

    noted = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *given, grid, warmup, **named: noted.append((kernel, given, named))
    try:
        operation()
    finally:
        JITFunction.run = run
    return noted


def compile_for_hopper(kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, given, strict=False)) | named
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr else type_of(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = disassembled(binary.asm["cubin"], "--dump-sass")
    return {
        "kernel": kernel.__name__,
        "registers": int(re.findall(r"REG:(\d+)", disassembled(binary.asm["cubin"], "--dump-resource-usage"))[-1]),
        "shared": binary.metadata.shared,
        "instructions": Counter(
            re.findall(
                r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(WARPGROUP.DEPBAR.LE gsb0, 0x[01]|[A-Z][A-Z0-9_.]+)",
                code,
                re.M,
            )
        ),
    }


def type_of(value: Any) -> str:
    """As Triton's launcher has it: 1 and None are compiled in."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return "fp32"


def disassembled(cubin: bytes, what: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(triton.__file__).parent / DISASSEMBLER), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Compiler:
    """The program, asked by name; the kernels are compiled once for all tests of a file."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ops.compiling"],
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, case: str) -> list[dict[str, Any]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the compiling process has ended; its message is above"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


if __name__ == "__main__":
    from tests.ops.test_compiles_for_hopper import CASES

    for line in sys.stdin:
        print(json.dumps(compiled(CASES[line.strip()])), flush=True)
