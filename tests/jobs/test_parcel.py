"""What of a working directory is sent to a cluster."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from jobs import parcel


def test_the_parcel_holds_what_ray_would_send(tmp_path: Path) -> None:
    """Beside Ray's own archive of the same folder."""
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    for name in ("a.py", "b/c.py", "b/large.bin", "b/.gitignore", ".git/x", "x/__pycache__/y", "kept.log"):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text(name * 100)
    (tmp_path / "w" / "b" / ".gitignore").write_text("*.bin\n")
    (tmp_path / "w" / ".rayignore").write_text("*.log\n!kept.log\n")
    target = tmp_path / "theirs.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(tmp_path / "w"), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as theirs:
        names = {name for name in theirs.namelist() if not name.endswith("/")}
    ours = parcel.look(tmp_path / "w")
    assert {str(path) for _, path in ours.files} == names
    assert target.stat().st_size <= ours.bytes <= target.stat().st_size + 1000


def test_too_large_an_upload_names_the_largest_files(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"part{number}.bin").write_bytes(bytes(number * 2**18))
    with pytest.raises(AxiconError) as caught:
        parcel.look(tmp_path, limit=2**21)
    text = str(caught.value)
    assert "5.5 MB would be sent, and a cluster takes 2.1 MB; largest are part6.bin (1.6 MB), part5" in text
    assert str(tmp_path / ".rayignore") in text
    assert "part1.bin" not in text
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert [str(path) for _, path in parcel.look(tmp_path, limit=2**20).files] == [".rayignore"]
