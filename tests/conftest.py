"""Settings of every test: hypothesis profiles, random numbers, threads, and tests that need a CUDA device."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from lossmeta import _build

_slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=_slow_is_fine)
settings.register_profile("ci", max_examples=2000, deadline=None, suppress_health_check=_slow_is_fine)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "default")
)


@pytest.fixture(autouse=True)
def _own_random_numbers_and_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test gives the same result alone, in any order and on any machine."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.split("/")[-1].encode()))
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    if os.environ.get("LOSSMETA_CUDA_DRY") == "1":  # a rehearsal on CPU tensors, see tests/cuda/on_device.py
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here" if torch.version.cuda else "this torch is built without CUDA")
    if _build.why_no_cuda is not None:
        pytest.skip(_build.why_no_cuda)
