"""The number of connections that a server has files for."""

import pytest

from ovq.serve.server import connections_within_files

resource = pytest.importorskip("resource")


@pytest.mark.parametrize(
    ("soft", "hard", "files", "connections"),
    [
        (1024, 4096, 1536, 1024),
        (256, resource.RLIM_INFINITY, 1536, 1024),
        (1024, 1024, None, 512),
        (600, 800, 800, 288),
        (9999, 9999, None, 1024),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1024),
    ],
)
def test_there_are_files_for_all_connections(soft, hard, files, connections, monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert connections_within_files(1024) == connections
    assert raised == ([] if files is None else [(files, hard)])


def test_without_files_for_connections_nothing_is_served(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    with pytest.raises(ValueError, match=r"more than 512 open files \(ulimit -Hn\), found 512"):
        connections_within_files(1024)
