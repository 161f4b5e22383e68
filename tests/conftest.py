"""Fixtures shared by all tests: pools of gloo ranks that live as long as the session, and one thread for torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from pool import Pool
from xdist.scheduler.loadscope import LoadScopeScheduling

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # A busy machine makes any example slow: what takes how long is no test's business.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "nightly: too slow for every run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


class Shares(LoadScopeScheduling):  # type: ignore[misc]
    """Tests by process: files go whole, and those in folders (parity) with their folder, as they share captured models."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, name = nodeid.partition("::")[0].rpartition("/")
        return name if folder.endswith("tests") else folder


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares:
    return Shares(config, log)


def _pool(world_size: int) -> Iterator[Pool]:
    pool = Pool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Pool]:
    """Two gloo ranks."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Pool]:
    """Four gloo ranks."""
    yield from _pool(4)


@pytest.fixture
def pools(ranks2: Pool, ranks4: Pool) -> dict[int, Pool]:
    """Both, by their number."""
    return {2: ranks2, 4: ranks4}
