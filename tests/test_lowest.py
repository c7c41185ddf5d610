from __future__ import annotations

import pytest

from tests.lowest import lowest_versions

PROJECT = """
[project]
dependencies = ["numpy>=1.26", "zarr>=3.0.8,<4"]
[project.optional-dependencies]
test = ["moto[server]>=5.1", "types-tqdm", "numpy>=1.26"]
"""


def test_lowest_versions_of_a_project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    assert lowest_versions(tmp_path / "pyproject.toml") == {"numpy": "1.26", "zarr": "3.0.8", "moto": "5.1"}
    (tmp_path / "pyproject.toml").write_text(PROJECT.replace('"numpy>=1.26"]', '"numpy>=2"]'))
    with pytest.raises(ValueError, match=r"numpy has the lower bounds 1\.26 and 2"):
        lowest_versions(tmp_path / "pyproject.toml")


def test_everything_that_kdcache_needs_has_a_lower_bound():
    import tomllib

    from tests.lowest import PYPROJECT, Requirement

    needed = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert {Requirement(line).name for line in needed} <= lowest_versions().keys()
