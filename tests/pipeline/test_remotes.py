"""Outputs go to a remote and come back in a clone elsewhere: a folder, and real SSH and S3 servers on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.servers import sshd, swift
from tests.support.clones import Clone, git_clone

OUTPUTS = ("data/prepared", "models/ddpm", "samples", "results")


def files(folder: Path) -> dict[str, bytes]:
    found = (path for out in OUTPUTS for path in (folder / out).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(
    params=["folder", pytest.param("ssh", marks=pytest.mark.remote), pytest.param("s3", marks=pytest.mark.remote)]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of an empty remote, and the settings that DVC needs for access, which each person keeps locally."""
    folder = tmp_path / "storage"
    folder.mkdir()
    if request.param == "folder":
        yield str(folder), {}
    elif request.param == "ssh":
        with sshd(tmp_path) as (host, key):
            yield f"ssh://{host}{folder}", {"keyfile": str(key)}
    else:
        from s3fs import S3FileSystem

        with swift(tmp_path) as s3:
            S3FileSystem(**s3).mkdir("bucket")
            names = {"endpoint_url": "endpointurl", "key": "access_key_id", "secret": "secret_access_key"}
            yield "s3://bucket/ddpm", {names[name]: value for name, value in s3.items()}


def test_a_clone_elsewhere_gets_model_samples_and_data(
    smoke: Clone, storage: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, settings = storage
    author = git_clone(smoke.folder, tmp_path / "author")
    author.dvc("cache", "dir", "--local", str(smoke.folder / ".dvc/cache"))  # that of the clone that made the outputs
    author.dvc("remote", "add", "--default", "storage", url)
    author.run("git", "commit", "-qam", "A remote")
    other = git_clone(author.folder, tmp_path / "other")
    for clone in (author, other):
        for name, value in settings.items():
            clone.dvc("remote", "modify", "--local", "storage", name, value)

    author.dvc("push")
    assert other.run("dvc", "status", "-q", check=False).returncode == 1
    other.dvc("pull")
    assert other.run("dvc", "status", "-q", check=False).returncode == 0
    assert files(other.folder) == files(smoke.folder)
    assert "up to date" in other.dvc("repro")
    assert other.run("git", "status", "--porcelain").stdout == ""
