"""Fixtures shared by all tests: pools of gloo ranks that live as long as the session, and one thread for torch."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from pool import Pool

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # A busy machine makes any example slow: what takes how long is no test's business.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "nightly: too slow for every run")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no device; where several processes share the tests, each has whole groups."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _group(item: pytest.Item) -> str:
    """Tests that share what is dear to make: pools of ranks and captured models, or what a file keeps."""
    shares_ranks = "parity" in item.path.parts or {"ranks2", "ranks4"} & set(getattr(item, "fixturenames", ()))
    return "ranks" if shares_ranks else item.path.name


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
