"""Runs are trained here by the dozen, on fewer digits, and their pictures looked at elsewhere."""

import pytest


@pytest.fixture
def tiny(tiny):
    """Eight updates to an epoch where a test does not set ``limit`` or ``batch_size``."""
    return lambda **values: tiny(**{"limit": 512, **values})


@pytest.fixture(autouse=True)
def _no_pictures(request):
    if request.node.name != "test_a_run_learns_and_leaves_its_results":
        request.getfixturevalue("quick_pictures")
