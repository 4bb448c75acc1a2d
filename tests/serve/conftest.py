"""Servers that the tests of a file share."""

import functools
import ssl

import pytest

from tests.serve.common import CLIENTS, reading_service, running, text_service


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once():
    """Each client would read those of the machine again, and ask for none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


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


@pytest.fixture(autouse=True)
def closing():
    yield
    while CLIENTS:
        CLIENTS.pop().close()
