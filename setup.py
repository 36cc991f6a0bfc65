"""Drives CMake. Everything else that packaging needs is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import lossmeta_toolchain as toolchain  # noqa: E402

NATIVE_SOURCES = ["CMakeLists.txt", "build_backend/*.py", "csrc/**/*", "tests/native/*"]


class CleanBuild(build):
    """Starts from an empty folder: a wheel must not hold files that the source no longer has."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds the libraries and lays them into the package: beside its source when editable."""

    def run(self) -> None:
        plan = toolchain.plan_build()
        for line in plan.describe():
            print(f"lossmeta build: {line}", flush=True)
        tree = Path(self.build_temp).resolve()
        subprocess.run([plan.cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *plan.cmake_options()], check=True)
        subprocess.run([plan.cmake, "--build", tree, "--parallel", str(plan.jobs)], check=True)

        package = ROOT / "lossmeta" if self.inplace else Path(self.build_lib, "lossmeta")
        package.mkdir(parents=True, exist_ok=True)
        why_no_cuda = package / "_why_no_cuda.txt"
        for stale in [*package.glob("_c*.so"), why_no_cuda]:
            stale.unlink(missing_ok=True)
        for library in [*tree.glob("_core*.so"), *(tree.glob("_cuda.so") if plan.cuda.compiler else ())]:
            shutil.copy2(library, package)
        if plan.cuda.compiler is None:  # lossmeta._build tells it at run time
            why_no_cuda.write_text(plan.cuda.reason, encoding="utf-8")
        if warning := plan.warning():  # after all that the compilers print
            print(warning, file=sys.stderr, flush=True)

    def get_source_files(self) -> list[str]:
        """What a source distribution needs besides the Python package."""
        files = (file for pattern in NATIVE_SOURCES for file in ROOT.glob(pattern) if file.is_file())
        return sorted(os.path.relpath(file, ROOT) for file in files)


setup(
    ext_modules=[Extension("lossmeta._core", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
