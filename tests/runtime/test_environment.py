"""What is recorded with measurements."""

import subprocess

from ovq_lab.runtime import environment


def test_the_commit_of_another_project_is_not_recorded(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    commit = environment._commit.__wrapped__
    assert commit() is None
    (tmp_path / "lab" / "ovq_lab").mkdir(parents=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(commit())
