"""A model is released by a git tag, and fetched by its version from a repository that holds none of its bytes."""

from pathlib import Path

import pytest

from tests.support.clones import Clone, git_clone


@pytest.fixture(scope="module")
def released(smoke: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with v1.0.0 and v1.1.0 of the model, the older one in production; weights in a remote."""
    folder = tmp_path_factory.mktemp("registry")
    author = git_clone(smoke.folder, folder / "author")
    author.dvc("cache", "dir", "--local", str(smoke.folder / ".dvc/cache"))
    author.dvc("remote", "add", "--default", "storage", str(folder / "storage"))
    author.run("git", "commit", "-qam", "A remote")
    author.run("gto", "register", "ddpm", "--version", "v1.0.0")
    author.run("gto", "assign", "ddpm", "--version", "v1.0.0", "--stage", "production")

    author.dvc("checkout")
    with (author.folder / "models/ddpm/README.md").open("a") as card:
        card.write("\nThe second version.\n")
    author.dvc("commit", "--force", "train")
    author.run("git", "commit", "-qam", "Another model")
    author.run("gto", "register", "ddpm", "--version", "v1.1.0")
    author.dvc("push", "--all-tags", "models/ddpm")
    git_clone(author.folder, folder / "elsewhere")
    author.run("git", "clone", "-q", "--bare", ".", str(folder / "hosted.git"))
    author.folder.rename(folder / "gone")  # nothing can come from here
    return folder


def test_a_version_is_a_tag_of_git(released: Path) -> None:
    tags = Clone(released / "gone").run("git", "tag", "--list", "ddpm*").stdout.split()
    assert tags == ["ddpm#production#1", "ddpm@v1.0.0", "ddpm@v1.1.0"]


@pytest.mark.parametrize(
    ("address", "choice", "second"),
    [
        ("{}/elsewhere", ["--rev", "v1.0.0"], False),
        ("{}/hosted.git", ["--stage", "production"], False),
        ("file://{}/hosted.git", [], True),
    ],
    ids=["version", "stage", "latest"],
)
def test_a_released_model_is_fetched_by_version_stage_or_latest(
    released: Path, smoke: Clone, tmp_path: Path, address: str, choice: list[str], second: bool
) -> None:
    reader = Clone(tmp_path)
    reader.dvc("artifacts", "get", address.format(released), "ddpm", *choice, "-o", "model")
    original = smoke.folder / "models/ddpm"
    names = {path.relative_to(original) for path in original.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()} == names
    for name in names:
        expected = (original / name).read_bytes()
        if second and name.name == "README.md":
            expected += b"\nThe second version.\n"
        assert (tmp_path / "model" / name).read_bytes() == expected, name
