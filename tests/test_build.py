"""Decisions of the build, symbols of the libraries that it made, and what importing them brings in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lossmeta
from lossmeta import _build

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(lossmeta.__file__).resolve().parent
LIBRARIES = sorted(PACKAGE.glob("_c*.so"))


def run_python(code: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- Decisions of the build.


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import lossmeta_toolchain

    return lossmeta_toolchain


def make_torch(directory: Path, version: str, cuda: str | None) -> Path:
    (directory / "include/torch/csrc").mkdir(parents=True)
    (directory / "__init__.py").touch()
    (directory / "version.py").write_text(
        f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip = None\n"
    )
    return directory


def make_nvcc(home: Path, release: str | None) -> Path:
    """A toolkit that holds nothing but an nvcc, which does not run where it has no release."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    answer = f"echo 'Cuda compilation tools, release {release}, V{release}.48'" if release else "exit 1"
    nvcc.write_text(f"#!/bin/sh\n{answer}\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def machine(toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine without CUDA, until a test makes some: its torch, its system folder and its PATH."""
    monkeypatch.setattr(toolchain, "SYSTEM_TOOLKITS", tmp_path / "local")

    def torch(cuda: str | None) -> Any:
        return toolchain.Torch(tmp_path / "site-packages/torch", "2.14.0", cuda)

    path = f"{tmp_path / 'old/bin'}{os.pathsep}{tmp_path / 'new/bin'}"
    return SimpleNamespace(torch=torch, environ={"PATH": path}, folder=tmp_path)


def test_no_operator_uses_streams() -> None:
    """They take the locale of whichever C++ library is loaded: one of another compiler made every message a crash."""
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in ("iostream", "sstream", "fstream", "ostream", "iomanip", "locale"):
            assert f"#include <{header}>" not in path.read_text(encoding="utf-8"), path


def test_named_torch_is_described_without_import(toolchain: Any, tmp_path: Path) -> None:
    directory = make_torch(tmp_path / "torch", "2.12.1+cu130", "13.0")
    torch = toolchain.find_torch({"LOSSMETA_TORCH_DIR": str(directory)})
    assert (torch.directory, torch.version, torch.cuda) == (directory, "2.12.1+cu130", "13.0")


def test_named_torch_must_be_one_and_new_enough(toolchain: Any, tmp_path: Path) -> None:
    with pytest.raises(toolchain.BuildError, match="is not a torch package"):
        toolchain.find_torch({"LOSSMETA_TORCH_DIR": str(tmp_path)})
    old = make_torch(tmp_path / "torch", "2.9.1", None)
    with pytest.raises(toolchain.BuildError, match=r"holds torch 2\.9\.1; lossmeta needs 2\.10"):
        toolchain.find_torch({"LOSSMETA_TORCH_DIR": str(old)})


def test_target_torch_is_found_from_an_isolated_build(toolchain: Any, tmp_path: Path) -> None:
    import torch

    isolation = "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('-packages')]"
    (tmp_path / "sitecustomize.py").write_text(isolation)
    child = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert toolchain._probe_torch(child, isolated=True) is None
    assert toolchain.find_torch(child).directory == Path(torch.__file__).resolve().parent


def test_an_older_torch_in_the_target_is_not_used(toolchain: Any, tmp_path: Path) -> None:
    make_torch(tmp_path / "torch", "2.9.0", None)
    old = toolchain._probe_torch(os.environ | {"PYTHONPATH": str(tmp_path)}, isolated=True)
    assert old.version == "2.9.0"
    assert not old.is_supported


@pytest.mark.parametrize("torch_found", [True, False])
def test_torch_is_required_only_where_there_is_none(
    toolchain: Any, torch_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setuptools")
    import lossmeta_backend

    monkeypatch.setattr(toolchain, "find_torch", lambda: object() if torch_found else None)
    monkeypatch.setattr(toolchain, "find_tool", lambda name, minimum: None if name == "cmake" else Path(name))
    assert lossmeta_backend._missing() == ([] if torch_found else ["torch>=2.10"]) + ["cmake>=3.22"]


@pytest.mark.parametrize(
    ("torch_cuda", "environ", "builds", "reason"),
    [
        (None, {}, False, "torch 2.14.0 is built without CUDA; to have them, install again"),
        (None, {"FORCE_CUDA": "1"}, True, "FORCE_CUDA=1; nvcc 13.2"),
        ("13.0", {}, True, "torch 2.14.0 is built with CUDA 13.0; nvcc 13.2"),
        ("13.0", {"LOSSMETA_CUDA": "0"}, False, "LOSSMETA_CUDA=0"),
        ("12.8", {"LOSSMETA_CUDA": "0", "FORCE_CUDA": "1"}, False, "LOSSMETA_CUDA=0"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_cuda_is_chosen_by_torch_and_toolkit(
    toolchain: Any,
    machine: Any,
    torch_cuda: str | None,
    environ: dict[str, str],
    builds: bool,
    reason: str,
    named: bool,
) -> None:
    nvcc = make_nvcc(machine.folder / "new", "13.2")
    names = {"CUDA_HOME": str(machine.folder / "new"), "PATH": "/nowhere"} if named else machine.environ
    choice = toolchain.choose_cuda(machine.torch(torch_cuda), environ | names)
    assert choice.compiler == (nvcc if builds else None)
    assert not choice.missed
    assert reason in choice.reason


# Where an nvcc may lie, in the order in which they are tried.
PLACES = ["old", "new", "local/cuda", "local/cuda-13.10", "local/cuda-13.9", "site-packages/nvidia/cu13"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("torch_cuda", ["13.0", None])
def test_the_first_toolkit_that_fits_is_taken(
    toolchain: Any, machine: Any, place: str, torch_cuda: str | None
) -> None:
    at = PLACES.index(place)
    for before in PLACES[:at:2]:
        make_nvcc(machine.folder / before, None)
    for before in PLACES[1:at:2]:
        make_nvcc(machine.folder / before, "12.8" if torch_cuda else None)
    expected = make_nvcc(machine.folder / place, "13.1")
    for after in PLACES[at + 1 :]:
        make_nvcc(machine.folder / after, "13.0")
    environ = machine.environ | ({} if torch_cuda else {"FORCE_CUDA": "1"})
    assert toolchain.choose_cuda(machine.torch(torch_cuda), environ).compiler == expected


def test_a_toolkit_is_tried_once_whatever_it_is_called(toolchain: Any, machine: Any) -> None:
    make_nvcc(machine.folder / "local/cuda-12.8", "12.8")
    (machine.folder / "local/cuda").symlink_to("cuda-12.8")
    (machine.folder / "old").symlink_to("local/cuda-12.8")
    assert toolchain.find_nvccs(machine.torch("13.0"), machine.environ) == [machine.folder / "old/bin/nvcc"]


@pytest.mark.parametrize("forced", [{}, {"FORCE_CUDA": "1"}])
def test_without_a_fitting_toolkit_the_cpu_build_goes_on_unless_cuda_is_forced(
    toolchain: Any, machine: Any, forced: dict[str, str]
) -> None:
    old = make_nvcc(machine.folder / "old", "12.4")
    broken = make_nvcc(machine.folder / "new", None)
    other = make_nvcc(machine.folder / "local/cuda", None)
    other.write_text("#!/bin/sh\necho clang version 20\n")
    reason = f"""torch 2.14.0 is built with CUDA 13.0, but nvcc of CUDA 13 was not found; tried:
  {old}: CUDA 12.4
  {broken}: does not run
  {other}: --version names no CUDA release
Name a CUDA 13 toolkit in CUDA_HOME or pip install "cuda-toolkit[nvcc]==13.0.*", and install again; \
LOSSMETA_CUDA=0 builds without the CUDA operators."""
    if forced:
        with pytest.raises(toolchain.BuildError) as error:
            toolchain.choose_cuda(machine.torch("13.0"), machine.environ | forced)
        assert str(error.value) == f"FORCE_CUDA=1, but {reason}"
    else:
        choice = toolchain.choose_cuda(machine.torch("13.0"), machine.environ)
        assert (choice.compiler, choice.missed, choice.reason) == (None, True, reason)


@pytest.mark.parametrize("torch_cuda", ["12.8", None])
def test_without_any_toolkit_the_places_are_named(
    toolchain: Any, machine: Any, torch_cuda: str | None
) -> None:
    places = (
        f"none on PATH, in {machine.folder}/local/cuda\\* or beside torch\\.\nName a CUDA (12 )?toolkit in"
    )
    with pytest.raises(
        toolchain.BuildError, match=rf"FORCE_CUDA=1, but .*nvcc.* was not found: there is {places} "
    ):
        toolchain.choose_cuda(machine.torch(torch_cuda), machine.environ | {"FORCE_CUDA": "1"})


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_is_not_replaced_by_another(toolchain: Any, machine: Any, variable: str) -> None:
    make_nvcc(machine.folder / "new", "13.0")
    nvcc = make_nvcc(machine.folder / "named", "12.4")
    value = str(nvcc if variable == "CUDACXX" else machine.folder / "named")
    environ = machine.environ | {variable: value}
    choice = toolchain.choose_cuda(machine.torch("13.0"), environ)
    assert (choice.compiler, choice.missed) == (None, True)
    assert f"CUDA 13 was not found; {variable}={value} names:\n  {nvcc}: CUDA 12.4\n" in choice.reason
    assert f"\nCorrect or unset {variable}, and install again" in choice.reason
    with pytest.raises(toolchain.BuildError, match=rf"FORCE_CUDA=1, but .* {variable}={value} names"):
        toolchain.choose_cuda(machine.torch("13.0"), environ | {"FORCE_CUDA": "1"})


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_must_be_one(toolchain: Any, machine: Any, variable: str) -> None:
    make_nvcc(machine.folder / "new", "13.0")
    value = str(machine.folder / ("missing/bin/nvcc" if variable == "CUDACXX" else "missing"))
    missing = "is no program" if variable == "CUDACXX" else "has no program bin/nvcc"
    with pytest.raises(toolchain.BuildError, match=f"^{variable}={value} {missing}; correct it or unset it$"):
        toolchain.choose_cuda(machine.torch("13.0"), machine.environ | {variable: value})
    nvcc = make_nvcc(machine.folder / "missing", None)
    with pytest.raises(toolchain.BuildError, match=f"^{variable}={value}: {nvcc} does not run; correct it"):
        toolchain.choose_cuda(machine.torch("13.0"), machine.environ | {variable: value})


def test_a_compiler_named_without_its_folder_is_looked_for_on_path(toolchain: Any, machine: Any) -> None:
    nvcc = make_nvcc(machine.folder / "new", "13.0")
    named = machine.environ | {"CUDACXX": "nvcc"}
    assert toolchain.choose_cuda(machine.torch("13.0"), named).compiler == nvcc


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, "80-real;90-real;100;120-real"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0 9.0a", "80-real;90a-real"),
        ("Hopper", "90"),
        ("8.0, 8.0;Ampere", "80-real;86"),
    ],
)
def test_architectures_are_read_in_torch_syntax(toolchain: Any, listed: str | None, expected: str) -> None:
    assert toolchain.cuda_architectures(listed) == expected


def test_default_architectures_are_those_that_nvcc_knows(toolchain: Any) -> None:
    assert toolchain.cuda_architectures(None, "12.6") == "80-real;90"
    assert toolchain.cuda_architectures("12.0", "12.6") == "120-real"
    assert toolchain.cuda_architectures(None, "12.8") == toolchain.cuda_architectures(None, "13.0")


def test_unknown_architecture_is_refused(toolchain: Any) -> None:
    with pytest.raises(toolchain.BuildError, match=r"TORCH_CUDA_ARCH_LIST: .* got 'sm_80'"):
        toolchain.cuda_architectures("sm_80")


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """Runs setup.py in a folder of its own, with a CMake that does nothing, beside a torch with CUDA 13."""
    pytest.importorskip("setuptools")
    for tool in ("cmake", "ninja"):
        program = tmp_path / "bin" / tool
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho version 9.9\n")
        program.chmod(0o755)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/pybind11.py").write_text("def get_cmake_dir(): return ''\n")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "build_backend", tmp_path / "build_backend")
    environ = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "modules"),
        "LOSSMETA_TORCH_DIR": str(make_torch(tmp_path / "torch", "2.14.0", "13.0")),
        "CUDACXX": "",
        "FORCE_CUDA": "",
        "LOSSMETA_CUDA": "",
    }

    def run(toolkit: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        home = {"CUDA_HOME": str(toolkit)}
        return subprocess.run(
            command, cwd=tmp_path, env=environ | home, capture_output=True, text=True, check=True
        )

    return run


def test_a_build_that_misses_cuda_warns_and_keeps_the_reason(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = make_nvcc(tmp_path / "old", "12.4")
    make_nvcc(tmp_path / "new", "13.0")
    warning = build(tmp_path / "old").stderr
    rule, title, _, *reason, end = warning.strip().splitlines()[-7:]
    assert rule == end == "=" * len(title)
    assert title.startswith(
        "WARNING: lossmeta was built WITHOUT its CUDA operators, although torch 2.14.0 has CUDA"
    )
    assert f"  {nvcc}: CUDA 12.4" in reason

    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "lossmeta")])
    monkeypatch.setattr(_build.util, "find_spec", lambda name: package)
    kept = "\n".join(reason)
    assert _build._load_cuda() == f"lossmeta was built without its CUDA operators: {kept}"

    assert "WARNING" not in build(tmp_path / "new").stderr
    assert kept not in (_build._load_cuda() or "")


@pytest.mark.slow
def test_the_cuda_toolkit_of_python_packages_can_be_linked(toolchain: Any, tmp_path: Path) -> None:
    """Their libraries lie in lib instead of lib64, and the runtime has no other name than libcudart.so.13."""
    pytest.importorskip("pybind11")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    top = re.search(r"TOP=(.+)", toolchain._output(["sh", "-c", f"{nvcc} --dryrun x.cu 2>&1"]))
    if not top or not (system := Path(top.group(1)).resolve() / "lib64").exists():
        pytest.skip("no CUDA toolkit with a folder lib64 here")
    home = tmp_path / "cu13"
    for folder in ("bin", "include", "nvvm"):
        shutil.copytree(system.parent / folder, home / folder, copy_function=os.symlink)
    (home / "bin/nvcc").unlink()  # it looks for the others beside its own file
    shutil.copy2(system.parent / "bin/nvcc", home / "bin/nvcc")
    (home / "lib").mkdir()
    for library in (*system.glob("libcudart_static.a"), *system.glob("libcudadevrt.a")):
        (home / "lib" / library.name).symlink_to(library)
    (home / "lib/libcudart.so.13").symlink_to((system / "libcudart.so").resolve())

    plan = toolchain.plan_build(os.environ | {"FORCE_CUDA": "1", "CUDACXX": str(home / "bin/nvcc")})
    configure = [str(plan.cmake), "-S", str(ROOT), "-B", str(tmp_path / "tree"), "-G", "Ninja"]
    subprocess.run([*configure, *plan.cmake_options()], capture_output=True, check=True)
    assert f"LINK_LIBRARIES = {home}/lib/libcudart.so.13" in (tmp_path / "tree/build.ninja").read_text()


def test_jobs_are_capped_by_memory(toolchain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for gib, jobs in ((1, 1), (9, 4), (1000, 64)):
        monkeypatch.setattr(toolchain, "_available_memory", lambda gib=gib: gib * 2**30)
        assert toolchain.parallel_jobs({})[0] == jobs
    assert toolchain.parallel_jobs({"MAX_JOBS": "7"})[0] == 7
    with pytest.raises(toolchain.BuildError, match="MAX_JOBS: expected a positive number, got '0'"):
        toolchain.parallel_jobs({"MAX_JOBS": "0"})


# ---- The libraries.


def nm(library: Path, *options: str) -> list[tuple[str, str]]:
    """Types and names of the symbols of an object file."""
    program = shutil.which("nm")
    if program is None:
        pytest.skip("nm of binutils is not installed")
    output = subprocess.run(
        [program, "-P", *options, str(library)], capture_output=True, text=True, check=True
    ).stdout
    lines = (line.split() for line in output.splitlines())
    return [(line[1], line[0].split("@")[0]) for line in lines if len(line) > 1]


def test_the_core_library_is_installed() -> None:
    assert any(library.name.startswith("_core") for library in LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name.split(".")[0])
def test_libraries_need_nothing_that_torch_2_10_lacks(library: Path) -> None:
    listed = (ROOT / "tests/torch_2.10_symbols.txt").read_text().split("\n")
    exported = {name for name in listed if name and not name.startswith("#")}
    undefined = {name for _, name in nm(library, "-D", "--undefined-only")}
    used = {name for name in undefined if name.startswith(("aoti_torch_", "torch_"))}
    assert used, "the library uses no torch at all?"
    assert used <= exported, f"not in torch 2.10: {sorted(used - exported)}"
    # C++ symbols of torch belong to no stable interface at all.
    unstable = {name for name in undefined if re.match(r"_Z\w*?(3c10|2at|5torch)", name)}
    assert not unstable, f"C++ symbols of torch: {sorted(unstable)}"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name.split(".")[0])
def test_libraries_remember_no_folder_of_the_build(library: Path) -> None:
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("readelf of binutils is not installed")
    dynamic = subprocess.run([program, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in dynamic
    assert not re.search("RPATH|RUNPATH", dynamic)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets_share_no_symbol(isa: str) -> None:
    """The linker keeps one of several weak symbols of a name: it must not be the one that an older processor lacks."""
    trees = [*ROOT.glob("build/temp*")]
    objects = [
        object_file
        for tree in trees
        for source in (ROOT / "csrc/cpu").glob("*.cpp")
        if (object_file := tree / f"CMakeFiles/cpu_{isa}.dir/csrc/cpu/{source.name}.o").exists()
    ]
    if not objects:
        assert os.environ.get("CI") != "true", "no build tree"
        pytest.skip("no build tree in build/: install from this folder first")
    namespace = re.compile(f"(8lossmeta|NS_){len(isa)}{isa}")
    for object_file in objects:
        defined = {name for _, name in nm(object_file, "--defined-only", "--extern-only")}
        defined.discard("DW.ref.__gxx_personality_v0")  # the same pointer in all of them
        assert defined, f"{object_file.name} defines nothing"
        shared = sorted(name for name in defined if not namespace.search(name))
        assert not shared, f"{object_file.name}, {isa}: {shared}"


# ---- The import.

HEAVY = ["cvxpy", "osqp", "sklearn", "matplotlib", "scipy", "typer", "rich"]


def test_import_brings_in_no_heavy_dependency(tmp_path: Path) -> None:
    code = "import json, sys, torch; before = set(sys.modules); import lossmeta; "
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    new = {name.split(".")[0] for name in json.loads(result.stdout)}
    assert "lossmeta" in new
    assert not new & set(HEAVY)


def test_operators_work_where_heavy_dependencies_are_missing(tmp_path: Path) -> None:
    code = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # importing it raises
import torch, lossmeta
loss = lossmeta.ops.parametric_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2]), torch.eye(3))
assert loss.isfinite()
assert lossmeta.info()["operators"]["parametric_cross_entropy"]["cpu"] == "compiled"
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_works_from_the_root_of_the_repository() -> None:
    result = run_python("import lossmeta; print(lossmeta.__file__)", ROOT)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve().parent == PACKAGE


@pytest.fixture
def bare_source(tmp_path: Path) -> Path:
    """A folder with a copy of the Python source, as a checkout has it."""
    if PACKAGE == ROOT / "lossmeta":
        pytest.skip("lossmeta is installed editable: there is no second copy to lead to")
    shutil.copytree(
        ROOT / "lossmeta", tmp_path / "lossmeta", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_bare_source_folder_leads_to_the_installed_package(bare_source: Path) -> None:
    code = "import lossmeta, lossmeta.cli; from lossmeta import losses; print(lossmeta.__file__, losses.__file__)"
    result = run_python(code, bare_source)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for file in result.stdout.split():
        assert Path(file).resolve().is_relative_to(PACKAGE)


def test_bare_source_folder_of_another_version_warns(bare_source: Path) -> None:
    init = bare_source / "lossmeta/__init__.py"
    init.write_text(re.sub('__version__ = ".*"', '__version__ = "0.0.1"', init.read_text()))
    result = run_python("import lossmeta", bare_source)
    assert result.returncode == 0, result.stderr
    assert "holds another version: run `python -m pip install .` again" in result.stderr


def test_bare_source_folder_without_an_installed_package_says_what_to_do(bare_source: Path) -> None:
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name == "lossmeta" and path is not None else find(name, path, target))
import lossmeta
"""
    result = run_python(code, bare_source)
    assert result.returncode != 0
    assert result.stderr.rstrip().endswith(
        "ImportError: lossmeta is not built here: its compiled core is missing; install it with "
        "`python -m pip install .` from its source folder"
    )
    assert "partially initialized" not in result.stderr


def test_a_wrong_instruction_set_is_no_missing_build(tmp_path: Path) -> None:
    result = run_python("import lossmeta", tmp_path, LOSSMETA_CPU_ISA="sse4")
    assert result.returncode != 0
    message = "ImportError: lossmeta: LOSSMETA_CPU_ISA must be generic, avx2 or avx512, got sse4"
    assert result.stderr.splitlines()[-1] == message
    assert "Install it" not in result.stderr


def test_an_instruction_set_that_the_processor_lacks_is_no_missing_build(tmp_path: Path) -> None:
    """The core's own words, as on a processor without AVX2."""
    words = "LOSSMETA_CPU_ISA=avx2: this processor supports generic at most; choose that or less, or unset the variable"
    code = f"""
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "lossmeta._core":
            raise ImportError({words!r})
sys.meta_path.insert(0, Finder)
import lossmeta
"""
    result = run_python(code, tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"ImportError: lossmeta: {words}"
    assert "Install it" not in result.stderr


def test_a_newer_torch_that_is_missing_fails_unless_it_is_waived(tmp_path: Path) -> None:
    """An interpreter that makes an environment whose pip installs nothing."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nmkdir -p "$3/bin"; printf "#!/bin/sh\\necho no such torch; exit 1" > "$3/bin/pip"\n'
    )
    python.write_text(python.read_text() + 'chmod +x "$3/bin/pip"\n')
    python.chmod(0o755)
    command = [str(ROOT / ".ci/wheel_compatibility.sh"), "some.whl", str(tmp_path / "environment")]
    environ = os.environ | {
        "PYTHON": str(python),
        "LOSSMETA_NEWER_TORCH": "9.9.9",
        "LOSSMETA_SKIP_NEWER_TORCH": "",
    }
    failed = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "torch 9.9.9 could not be installed: no such torch" in failed.stderr
    assert "LOSSMETA_SKIP_NEWER_TORCH=1" in failed.stderr
    environ["LOSSMETA_SKIP_NEWER_TORCH"] = "1"
    skipped = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert skipped.stdout.startswith("SKIPPED: LOSSMETA_SKIP_NEWER_TORCH=1")


def test_versions_agree() -> None:
    assert importlib.metadata.version("lossmeta") == lossmeta.__version__
