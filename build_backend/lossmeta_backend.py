"""The in-tree PEP 517 backend: setuptools', but torch, CMake and Ninja are required only where they are missing.

`pip install .` builds in an isolated environment, which would download a second torch. The headers of the one that the
target environment already has serve as well, so it is asked for first.
"""

from __future__ import annotations

from typing import Any

import lossmeta_toolchain as toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _missing() -> list[str]:
    missing = []
    if toolchain.find_torch() is None:
        missing.append("torch>=" + ".".join(map(str, toolchain.MINIMUM_TORCH)))
    if toolchain.find_tool("cmake", toolchain.MINIMUM_CMAKE) is None:
        missing.append("cmake>=" + ".".join(map(str, toolchain.MINIMUM_CMAKE)))
    if toolchain.find_tool("ninja", ()) is None:
        missing.append("ninja")
    return missing


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _missing()
