"""The families of image/Current for their tests."""

import pytest
from current_models import FAMILIES, Family


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]
