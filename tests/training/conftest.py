"""Runs are trained here by the dozen, and their pictures looked at elsewhere."""

import pytest


@pytest.fixture(autouse=True)
def _no_pictures(request):
    if request.node.name != "test_a_run_learns_and_leaves_its_results":
        request.getfixturevalue("quick_pictures")
