"""Decides what is built and with what: torch, CMake, CUDA, jobs. Standard library only, and torch is never imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_CMAKE = (3, 22)
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX;12.0"
ARCHITECTURES_BEFORE_12_8 = "8.0;9.0+PTX"  # CUDA 12.8 brought Blackwell
SYSTEM_TOOLKITS = Path("/usr/local")
GIB_PER_JOB = 2

# torch's names for families of architectures.
_FAMILIES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class BuildError(RuntimeError):
    """The build cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, as its own version.py describes it."""

    directory: Path
    version: str
    cuda: str | None

    @property
    def is_supported(self) -> bool:
        return _numbers(self.version) >= MINIMUM_TORCH


@dataclass(frozen=True)
class CudaChoice:
    """Whether the CUDA operators are built, and why."""

    reason: str
    compiler: Path | None = None
    release: str = ""  # of the compiler
    missed: bool = False  # torch could run them, but no toolkit fits


@dataclass(frozen=True)
class Plan:
    """All decisions of one build."""

    torch: Torch
    cmake: Path
    ninja: Path
    cuda: CudaChoice
    architectures: str
    jobs: int
    why_jobs: str

    def describe(self) -> list[str]:
        lines = [
            f"torch {self.torch.version} in {self.torch.directory}",
            f"CUDA operators: {'yes' if self.cuda.compiler else 'no'}: {self.cuda.reason}",
            f"parallel jobs: {self.jobs} ({self.why_jobs})",
        ]
        if self.cuda.compiler:
            lines.insert(2, f"CUDA architectures: {self.architectures}")
        return lines

    def warning(self) -> str:
        """What must not be overlooked in the output of a build; empty where there is nothing."""
        if not self.cuda.missed:
            return ""
        title = f"WARNING: lossmeta was built WITHOUT its CUDA operators, although torch {self.torch.version} has CUDA"
        rule = "=" * len(title)
        return "\n".join(("", rule, title, "", self.cuda.reason, rule, ""))

    def cmake_options(self) -> list[str]:
        import pybind11  # a build requirement of pyproject.toml, not needed to decide

        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": self.ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": self.torch.directory,
            "LOSSMETA_BUILD_CUDA": "ON" if self.cuda.compiler else "OFF",
        }
        if self.cuda.compiler:
            options["CMAKE_CUDA_COMPILER"] = self.cuda.compiler
            options["CMAKE_CUDA_ARCHITECTURES"] = self.architectures
        return [f"-D{name}={value}" for name, value in options.items()]


def plan_build(environ: Mapping[str, str] = os.environ) -> Plan:
    torch = find_torch(environ)
    if torch is None:
        raise BuildError(
            "torch 2.10 or later was not found: install it, or name its folder in LOSSMETA_TORCH_DIR"
        )
    cmake, ninja = find_tool("cmake", MINIMUM_CMAKE), find_tool("ninja", ())
    if cmake is None or ninja is None:
        raise BuildError('CMake 3.22 or later and Ninja were not found: pip install "cmake>=3.22" ninja')
    cuda = choose_cuda(torch, environ)
    architectures = cuda_architectures(environ.get("TORCH_CUDA_ARCH_LIST"), cuda.release)
    return Plan(torch, cmake, ninja, cuda, architectures, *parallel_jobs(environ))


def find_torch(environ: Mapping[str, str] = os.environ) -> Torch | None:
    """The torch to build against: LOSSMETA_TORCH_DIR, else the target environment's, else this process's own."""
    named = environ.get("LOSSMETA_TORCH_DIR")
    if named:
        torch = _read_torch(Path(named))
        if torch is None:
            raise BuildError(
                f"LOSSMETA_TORCH_DIR={named} is not a torch package: expected version.py and include/ in that folder"
            )
        if not torch.is_supported:
            raise BuildError(
                f"LOSSMETA_TORCH_DIR={named} holds torch {torch.version}; lossmeta needs 2.10 or later"
            )
        return torch
    for isolated in (False, True):
        torch = _probe_torch(environ, isolated)
        if torch is not None and torch.is_supported:
            return torch
    return None


def find_tool(name: str, minimum: tuple[int, ...]) -> Path | None:
    """The program `name` on PATH, if it runs and is new enough.

    It is run rather than looked at: under build isolation a Python wrapper of the target environment is found on PATH
    but cannot import its own package.
    """
    path = shutil.which(name)
    if path is None:
        return None
    answer = _output([path, "--version"])
    version = re.search(r"\d+\.\d+(\.\d+)?", answer)
    return Path(path) if version and _numbers(version.group()) >= minimum else None


def named_nvcc(environ: Mapping[str, str] = os.environ) -> tuple[str, Path | None]:
    """The first setting of CUDACXX, CUDA_HOME and CUDA_PATH, as "CUDA_HOME=/opt/cuda", and the nvcc that it names."""
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        value = environ.get(variable)
        if not value:
            continue
        path = value if variable == "CUDACXX" else os.path.join(value, "bin", "nvcc")
        nvcc = shutil.which(path, path=environ.get("PATH"))
        if nvcc is None:
            missing = "is no program" if variable == "CUDACXX" else "has no program bin/nvcc"
            raise BuildError(f"{variable}={value} {missing}; correct it or unset it")
        return f"{variable}={value}", Path(nvcc).absolute()
    return "", None


def find_nvccs(torch: Torch, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Every nvcc on PATH, then of /usr/local/cuda, of /usr/local/cuda-*, the newest first, and of NVIDIA's Python
    packages beside torch."""
    folders = [Path(folder) for folder in environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    versions = sorted(SYSTEM_TOOLKITS.glob("cuda-*"), key=lambda home: _numbers(home.name), reverse=True)
    folders += [home / "bin" for home in (SYSTEM_TOOLKITS / "cuda", *versions)]
    folders += sorted((torch.directory.parent / "nvidia").glob("*/bin"))
    found: dict[Path, Path] = {}
    for folder in folders:
        nvcc = folder.absolute() / "nvcc"
        if os.path.isfile(nvcc):
            found.setdefault(nvcc.resolve(), nvcc)
    return list(found.values())


def nvcc_release(nvcc: Path) -> tuple[str | None, str]:
    """The CUDA release that nvcc is of, as "13.0", and the same in words; None and why not where that is unknown."""
    answer = _output([str(nvcc), "--version"])
    release = re.search(r"release (\d+\.\d+)", answer)
    if release is None:
        return None, "--version names no CUDA release" if answer else "does not run"
    return release.group(1), f"CUDA {release.group(1)}"


def choose_cuda(torch: Torch, environ: Mapping[str, str] = os.environ) -> CudaChoice:
    """Whether to build the CUDA operators, and with which nvcc: the first that is of torch's major version, or of any
    where torch has none. A compiler that was named is the only candidate. Never asks whether this machine has a GPU.
    """
    if environ.get("LOSSMETA_CUDA") == "0":
        return CudaChoice("LOSSMETA_CUDA=0; to have them, install again without it")
    forced = environ.get("FORCE_CUDA") == "1"
    if torch.cuda is None and not forced:
        return CudaChoice(
            f"torch {torch.version} is built without CUDA; to have them, install again beside a CUDA build of torch, "
            "or with FORCE_CUDA=1"
        )
    setting, named = named_nvcc(environ)
    tried = []
    for nvcc in [named] if named else find_nvccs(torch, environ):
        release, words = nvcc_release(nvcc)
        if named and release is None:
            raise BuildError(f"{setting}: {nvcc} {words}; correct it or unset it")
        if release and (torch.cuda is None or _major(release) == _major(torch.cuda)):
            why = "FORCE_CUDA=1" if forced else f"torch {torch.version} is built with CUDA {torch.cuda}"
            return CudaChoice(f"{why}; nvcc {release} at {nvcc}", nvcc, release)
        tried.append(f"  {nvcc}: {words}")
    reason = _why_no_toolkit(torch, setting, tried)
    if forced:
        raise BuildError(f"FORCE_CUDA=1, but {reason}")
    return CudaChoice(reason, missed=True)


def _why_no_toolkit(torch: Torch, setting: str, tried: list[str]) -> str:
    """What was looked for, what was there instead, and what to do."""
    reason, remedy = "nvcc was not found", "Name a CUDA toolkit in CUDA_HOME"
    if torch.cuda:
        major = _major(torch.cuda)
        reason = (
            f"torch {torch.version} is built with CUDA {torch.cuda}, but nvcc of CUDA {major} was not found"
        )
        remedy = f"Name a CUDA {major} toolkit in CUDA_HOME"
        if int(major) >= 13:  # NVIDIA's Python packages of earlier releases have no nvcc
            remedy += f' or pip install "cuda-toolkit[nvcc]=={torch.cuda}.*"'
    if setting:
        reason += f"; {setting} names"
        remedy = f"Correct or unset {setting.partition('=')[0]}"
    elif tried:
        reason += "; tried"
    else:
        reason += f": there is none on PATH, in {SYSTEM_TOOLKITS}/cuda* or beside torch"
    remedy += ", and install again; LOSSMETA_CUDA=0 builds without the CUDA operators."
    return "\n".join((reason + (":" if tried else "."), *tried, remedy))


def cuda_architectures(listed: str | None, release: str = "") -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "Hopper") as CMAKE_CUDA_ARCHITECTURES ("80-real;90"); by default those that
    nvcc of this release knows."""
    if not listed:
        old = release and _numbers(release) < (12, 8)
        listed = ARCHITECTURES_BEFORE_12_8 if old else DEFAULT_ARCHITECTURES
    for family, members in _FAMILIES.items():
        listed = re.sub(rf"\b{family}\b", members, listed)
    chosen = []
    for item in re.split(r"[;,\s]+", listed.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise BuildError(
                f'TORCH_CUDA_ARCH_LIST: expected items like "8.0", "9.0a" or "9.0+PTX", or one of '
                f"{', '.join(_FAMILIES)}, got {item!r}"
            )
        major, minor, suffix, ptx = match.groups()
        chosen.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(dict.fromkeys(chosen))


def parallel_jobs(environ: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many compilers run at once, and why: one per core, and 2 GiB of memory for each. MAX_JOBS overrides."""
    if environ.get("MAX_JOBS"):
        try:
            jobs = int(environ["MAX_JOBS"])
        except ValueError:
            jobs = 0
        if jobs < 1:
            raise BuildError(f"MAX_JOBS: expected a positive number, got {environ['MAX_JOBS']!r}")
        return jobs, "MAX_JOBS"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_memory()
    if memory is None:
        return cores, f"{cores} cores"
    gib = memory / 2**30
    jobs = max(1, min(cores, int(gib / GIB_PER_JOB)))
    return jobs, f"{cores} cores, {gib:.1f} GiB of memory, {GIB_PER_JOB} GiB a job"


def _available_memory() -> int | None:
    """Bytes that are free, or left in this control group."""
    limits = []
    with suppress(OSError):
        limits += [
            1024 * int(n) for n in re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        ]
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limits.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return min(limits, default=None)


_PROBE = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"


def _probe_torch(environ: Mapping[str, str], isolated: bool) -> Torch | None:
    """Where a child interpreter finds torch. pip isolates a build by PYTHONPATH alone: without it the child sees the
    environment that pip installs into."""
    child = dict(environ)
    if not isolated:
        for variable in ("PYTHONPATH", "PYTHONNOUSERSITE"):
            child.pop(variable, None)
    # Not from the current folder: `-c` would search it for a package named torch.
    origin = _output([sys.executable, "-c", _PROBE], env=child, cwd=os.path.sep).strip()
    return _read_torch(Path(origin).parent) if origin else None


def _read_torch(directory: Path) -> Torch | None:
    try:
        text = (directory / "version.py").read_text()
    except OSError:
        return None
    if not (directory / "include" / "torch" / "csrc").is_dir():
        return None
    value = {
        name: re.search(rf"^{name}\s*(?::[^=]+)?=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        for name in ("__version__", "cuda")
    }
    version, cuda = value["__version__"], value["cuda"]
    return Torch(directory.resolve(), version.group(1), cuda.group(1) if cuda else None) if version else None


def _major(release: str) -> str:
    return release.partition(".")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _output(command: list[str], **options: object) -> str:
    """Standard output of a command that succeeds, else nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    except OSError:
        return ""
    return str(result.stdout) if result.returncode == 0 else ""
