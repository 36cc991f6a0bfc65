"""Compiles every CUDA kernel for every supported architecture, and fails on register spills and stray float64.

    python .ci/compile_gate.py [name of a kernel file ...]

The flags are CMake's own, from its compile commands. A kernel may use float64 arithmetic if float64 is among its
template arguments or parameters, or if FLOAT64 below says why it needs it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import lossmeta_toolchain as toolchain  # noqa: E402

# PTX of an architecture -> those that it is assembled for. That of 86 and 89 is the same as that of 80.
ARCHITECTURES = {"80": ["80", "86", "89"], "90": ["90"], "100": ["100"], "120": ["120"]}

# Kernels that use float64 on purpose whatever their input: file -> (pattern of the demangled name, reason).
FLOAT64 = {
    "class_confusion": (r".", "sums over a whole validation set stream into float64"),
    "pwl_penalty": (
        r"table|penalty",
        "one sum over all parameters of a model, of one addition for each 16 bytes of them",
    ),
    "pwl_statistics": (r".", "sums over all parameters of a model stream into float64"),
}

# Arithmetic and conversions, not loads, stores and moves. In PTX, which every toolkit can write; nothing that ptxas
# does turns it into float32.
FLOAT64_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?!ld|st|mov)[a-z0-9]+\.\S*f64\S*)", re.MULTILINE)


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture."""

    file: str
    architecture: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    float64: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of register spills")
        if self.float64 and not self.may_use_float64:
            found.append(f"float64 arithmetic: {', '.join(sorted(set(self.float64)))}")
        return found

    @property
    def may_use_float64(self) -> bool:
        pattern = FLOAT64.get(self.file, ("(?!)", ""))[0]
        return bool(re.search(r"\bdouble\b", self.name) or re.search(pattern, self.name))


def compile_commands(tree: Path) -> dict[str, list[str]]:
    """The command that CMake has for each kernel file."""
    plan = toolchain.plan_build(os.environ | {"FORCE_CUDA": "1", "LOSSMETA_CUDA": ""})
    options = [*plan.cmake_options(), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure = [str(plan.cmake), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    entries = json.loads((tree / "compile_commands.json").read_text())
    return {
        Path(entry["file"]).stem: shlex.split(entry["command"])
        for entry in entries
        if entry["file"].endswith(".cu")
    }


def without_output(command: list[str]) -> list[str]:
    """The same command, but for what it is to make."""
    kept, arguments = [], iter(command)
    for argument in arguments:
        if argument == "-o":
            next(arguments)
        elif not re.match(r"--generate-code|-gencode|-c$", argument) and Path(argument).name != "ccache":
            kept.append(argument)
    return kept


def compile_kernels(file: str, command: list[str], virtual: str, tree: Path) -> list[Kernel]:
    """Compiles to PTX once, which takes as long as ptxas, and assembles it for each architecture."""
    command, ptx = without_output(command), tree / f"{file}.{virtual}.ptx"
    run([*command, "-ptx", f"-arch=compute_{virtual}", "-o", str(ptx)], tree)
    float64 = float64_instructions(ptx.read_text())
    kernels = []
    for architecture in ARCHITECTURES[virtual]:
        target = f"-gencode=arch=compute_{virtual},code=sm_{architecture}"
        cubin = str(tree / f"{file}.{architecture}.cubin")
        report = run([command[0], str(ptx), "-cubin", target, "-Xptxas", "-v", "-o", cubin], tree)
        kernels += read_report(file, architecture, report, float64)
    return kernels


def run(command: list[str], tree: Path) -> str:
    """What a compiler reports."""
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{result.stderr}")
    return result.stderr


def read_report(file: str, architecture: str, report: str, float64: dict[str, list[str]]) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    properties_of = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels[match[1]] = Kernel(file, architecture, match[1])
            properties_of = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            properties_of = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # A function that was not inlined counts for itself.
            kernel = kernels.setdefault(properties_of, Kernel(file, architecture, properties_of))
            kernel.stack, kernel.spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel = kernels[properties_of]
            kernel.registers = int(match[1])
            kernel.shared = int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", line)) else 0
    for name, instructions in float64.items():
        kernels.setdefault(name, Kernel(file, architecture, name)).float64 = instructions
    names = demangle(list(kernels))
    for mangled, kernel in kernels.items():
        kernel.name = names[mangled]
    return list(kernels.values())


def float64_instructions(ptx: str) -> dict[str, list[str]]:
    """Float64 instructions of each function that has some."""
    functions = re.split(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", ptx)[1:]
    found = {
        n: FLOAT64_INSTRUCTION.findall(body) for n, body in zip(functions[::2], functions[1::2], strict=True)
    }
    return {name: instructions for name, instructions in found.items() if instructions}


def demangle(names: list[str]) -> dict[str, str]:
    if not names or not (program := shutil.which("c++filt")):
        return {name: name for name in names}
    answer = subprocess.run([program, *names], capture_output=True, text=True, check=True).stdout
    return {name: shorten(text) for name, text in zip(names, answer.splitlines(), strict=True)}


def shorten(name: str) -> str:
    name = re.sub(r"lossmeta::|cuda::|\(anonymous namespace\)::|_(?:GLOBAL|INTERNAL)_\w+::|^void ", "", name)
    return re.sub(r"\((?:bool|int|long|unsigned int)\)", "", name)


def main() -> int:
    wanted = {Path(name).stem for name in sys.argv[1:]}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        commands = {f: c for f, c in compile_commands(tree).items() if not wanted or f in wanted}
        if not commands:
            print("compile gate: no CUDA kernels in csrc/cuda")
            return 1
        tasks = [(f, c, a, tree) for f, c in commands.items() for a in ARCHITECTURES]
        with ThreadPoolExecutor(toolchain.parallel_jobs()[0]) as pool:
            kernels = [k for result in pool.map(lambda task: compile_kernels(*task), tasks) for k in result]

    print(f"{'file':26} {'sm':>4} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for k in kernels:
        print(
            f"{k.file:26} {k.architecture:>4} {k.registers:9} {k.shared:7} {k.stack:6} {k.spills:6}  {k.name[:150]}"
        )
    problems = [f"{k.file}, sm_{k.architecture}, {k.name}: {p}" for k in kernels for p in k.problems]
    print(f"\ncompile gate: {len(kernels)} kernels, {len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
