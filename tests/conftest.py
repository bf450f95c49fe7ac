"""Settings that all tests share."""

import os
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from pairs import cover

# The first example of a fresh clone builds Unicode tables, and a busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every row of each matrix")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("full"):
        os.environ["VTR_FULL_MATRIX"] = "1"  # for the processes that tests start


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that start processes, and keep of each matrix marked `pairs` the rows that `cover` chooses.

    These are the rows in which every two values of its parameters meet.
    """
    # They take longest, and a long file at the end would leave the other workers idle.
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)
    if config.getoption("full"):
        return
    matrices = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairs"):
            matrices[item.path, item.originalname].append(item)
    left = set()
    for rows in matrices.values():
        # By identity, since values may have no hash; a value is the same object in all of its rows.
        values = [[id(value) for value in row.callspec.params.values()] for row in rows]
        left |= set(rows) - {rows[at] for at in cover(values)}
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
