"""The documents: every module says what it is for, every link leads somewhere."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("megatrain", "bridges", "kernels", "tests")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MAX_LINES = 400

TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".github",
    ".gitignore",
    ".python-version",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "bridges",
    "constraints.txt",
    "docker",
    "examples",
    "kernels",
    "megatrain",
    "pyproject.toml",
    "setup.py",
    "tests",
}

MACHINE_PATHS = re.compile(r"/(?:home|root|Users|work|mnt|nfs)/[A-Za-z0-9_.-]+")
PACKAGE_HOSTS = re.compile(
    r"files\.pythonhosted|pypi\.org|download\.pytorch\.org|index-url|conda\.anaconda"
)


def _tracked() -> list[Path]:
    """Files that git has or would take: a new file is checked before it is added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]


def _modules() -> list[Path]:
    return sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


def _lines(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in _tracked():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    return found


def test_every_module_says_in_its_first_line_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in _modules()
        if path.read_text().strip()
        and not (ast.get_docstring(ast.parse(path.read_text())) or "").strip()
    ]
    assert silent == []


def test_no_module_is_empty() -> None:
    assert [
        str(path.relative_to(ROOT)) for path in _modules() if not path.read_text().strip()
    ] == []


def test_no_file_is_longer_than_one_can_hold() -> None:
    long = {
        str(path.relative_to(ROOT)): num_lines
        for path in _modules()
        if (num_lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_every_relative_link_in_a_document_leads_to_a_file() -> None:
    broken = []
    for path in _tracked():
        if path.suffix != ".md":
            continue
        for target in LINK.findall(path.read_text()):
            if not target.startswith(("http://", "https://", "mailto:", "#")):
                destination = path.parent / target.split("#")[0]
                broken += [] if destination.exists() else [f"{path.relative_to(ROOT)}: {target}"]
    assert broken == []


def test_the_top_level_holds_what_is_listed_here_and_nothing_else() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in _tracked()} <= TOP_LEVEL


def test_the_folders_of_sibling_packages_are_no_packages() -> None:
    assert not (ROOT / "bridges" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_modules_is_a_package() -> None:
    roots = (
        ROOT / "megatrain",
        ROOT / "bridges/megatrain_bridges",
        ROOT / "kernels/megatrain_kernels",
    )
    folders = {path.parent for root in roots for path in root.rglob("*.py")}
    assert [
        str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()
    ] == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    assert _lines(MACHINE_PATHS) == []


def test_no_file_names_a_package_host() -> None:
    assert _lines(PACKAGE_HOSTS) == []


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
