"""Servers that the tests of a file share."""

import pytest

from tests.serve.common import reading_service, running, text_service


@pytest.fixture(scope="module")
def ids():
    """A server of a model that reads token ids."""
    with running(reading_service()) as server:
        yield server


@pytest.fixture(scope="module")
def text():
    """A server of a model that reads text."""
    with running(text_service()) as server:
        yield server
