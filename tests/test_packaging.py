"""What a newcomer relies on: the lock, the two commands, the README and the six packages."""

import importlib
import importlib.metadata
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("services", "encoders", "llm", "decoders", "alignment", "deploy")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def locked() -> dict[str, Version]:
    """Return the pinned version of every distribution in the lock, by canonical name."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def declared() -> list[Requirement]:
    """Return what pyproject.toml asks for: dependencies, every extra, and the build backend."""
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(line) for line in [*PROJECT["dependencies"], *(x for e in extras for x in e), "hatchling"]
    ]


def files_of_the_tree() -> list[Path]:
    """Return what git tracks, and what it would track if it were added."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def shell_lines_of_the_readme() -> list[str]:
    """Return the lines of the README's ``sh`` blocks."""
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_lock_pins_each_declared_dependency_within_its_range(requirement: Requirement) -> None:
    version = locked().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is in pyproject.toml and not in requirements.lock."
    assert version in requirement.specifier


@pytest.mark.parametrize("name", sorted(locked()))
def test_lock_pins_what_a_locked_distribution_needs(name: str) -> None:
    needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
    here = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    # A torch with CUDA brings libraries that it pins itself; a torch without has none.
    here = [need for need in here if not (name == "torch" and "==" in str(need.specifier))]
    assert {canonicalize_name(need.name) for need in here} <= locked().keys()


def test_lock_is_what_these_tests_run_on() -> None:
    installed = {
        name: Version(Version(importlib.metadata.version(name)).public)
        for name in locked()  # the local part (torch's +cpu) is the machine's choice
    }
    assert installed == locked()


def test_lock_lines_are_bare_pins_that_any_index_can_serve() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    odd = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert odd == []


@pytest.mark.parametrize("name", PACKAGES)
def test_package_says_what_it_is_and_is_typed(name: str) -> None:
    assert importlib.import_module(name).__doc__
    assert (ROOT / name / "py.typed").is_file()


def test_every_folder_with_code_is_a_regular_package() -> None:
    folders = {
        path.parent for path in files_of_the_tree() if path.suffix == ".py" and path.parts[0] in PACKAGES
    }
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def is_pickle(path: Path) -> bool:
    """Tell whether a file is a pickle or a zip archive that holds one (the form torch.save writes)."""
    if path.suffix in {".pt", ".pth", ".ckpt", ".pkl", ".pickle"}:
        return True
    with path.open("rb") as file:
        start = file.read(2)
    if len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5:  # PROTO opcode and its protocol
        return True
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def test_tree_holds_no_pickles() -> None:
    assert [str(path) for path in files_of_the_tree() if is_pickle(ROOT / path)] == []


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_under_any_name_is_recognised(tmp_path: Path, protocol: int) -> None:
    disguised = tmp_path / "weights.bin"
    disguised.write_bytes(bytes([0x80, protocol]) + b"}.")
    assert is_pickle(disguised)


def test_version_is_the_same_in_metadata_project_and_changelog() -> None:
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert importlib.metadata.version("patchbay") == PROJECT["version"] == released[0]


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {match[1] for line in shell_lines_of_the_readme() if (match := re.match(r"make ([a-z]+)", line))}
    assert {"run", "test"} <= named <= targets


def test_patchbay_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    cli = importlib.import_module("services.cli")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    offered = set(re.findall(r"^    ([a-z]+)\b", capsys.readouterr().out, flags=re.MULTILINE))

    named = {
        match[1] for line in shell_lines_of_the_readme() if (match := re.match(r"patchbay ([a-z]+)", line))
    }

    assert {"chat", "serve", "eval", "train", "presets", "doctor"} <= named <= offered


def test_tree_of_the_readme_lists_the_top_level_folders() -> None:
    folders = {
        path.parts[0] for path in files_of_the_tree() if len(path.parts) > 1 and path.parts[0][0] != "."
    }
    assert sorted(re.findall(r"^([a-z]+)/ ", README, flags=re.MULTILINE)) == sorted(folders)


def test_relative_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"
