"""Settings that all tests share."""

import os
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from pairs import cover, share

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
    """Begin with the files that start processes, and keep of each marked matrix the rows that are chosen.

    Of one marked `pairs` these are the rows in which every two values of its parameters meet, of one marked `shared`
    every third, another one for each backbone.
    """
    # They take longest, and a long file at the end would leave the other workers idle.
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)
    if config.getoption("full"):
        return
    matrices = defaultdict(list)
    for item in items:
        for marker in ("pairs", "shared"):
            if item.get_closest_marker(marker):
                matrices[marker, item.path, item.originalname].append(item)
    left = set()
    for (marker, path, _), rows in matrices.items():
        # By identity, since values may have no hash; a value is the same object in all of its rows.
        values = [[id(value) for value in row.callspec.params.values()] for row in rows]
        chosen = share(rows, path.parent.name) if marker == "shared" else [rows[at] for at in cover(values)]
        left |= set(rows) - set(chosen)
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
