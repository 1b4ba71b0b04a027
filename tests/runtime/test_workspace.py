from ddpm.runtime.workspace import root


def test_the_state_lies_where_dvc_says_or_here(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert root() == (tmp_path / "main").resolve()
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(tmp_path)
    assert root() == tmp_path.resolve()
