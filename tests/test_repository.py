"""The tree stays small and readable (STYLE rule 16), and whole."""

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES = 320, 65
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "ccl_jax",
    "configs",
    "docs",
    "launch",
    "pyproject.toml",
    "tests",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, str]:
    paths = [path for folder in ("ccl_jax", "configs") for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def too_long(path: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines; at most {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
            lines = node.end_lineno - node.lineno + 1
            yield f"{path}: {node.name} has {lines} lines; at most {FUNCTION_LINES}"


def public_without_docstring(path: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    nodes = [tree, *tree.body, *(node for owner in classes for node in owner.body)]
    for node in nodes:
        name = getattr(node, "name", path)
        if not isinstance(node, ast.Module | ast.ClassDef | Function) or name.startswith("_"):
            continue
        if not (ast.get_docstring(node) or "").strip():
            yield f"{path}: {name} has no docstring"


def positional_booleans(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function):
            continue
        for argument in [*node.args.posonlyargs, *node.args.args]:
            if argument.annotation is not None and ast.unparse(argument.annotation) == "bool":
                yield f"{path}: {node.name} takes the bool {argument.arg} by position"


def find(check, files: dict[str, str]) -> list[str]:
    return [problem for path, source in files.items() for problem in check(path, source)]


@pytest.mark.parametrize("check", [too_long, public_without_docstring, positional_booleans])
def test_sources_keep_to_the_style(check):
    assert len(sources()) > 10
    assert find(check, sources()) == []


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
BAD = {
    "long function": (too_long, LONG),
    "long method": (too_long, "class A:\n" + re.sub("(?m)^", "    ", LONG)),
    "long file": (too_long, "x = 1\n" * (FILE_LINES + 1)),
    "function": (public_without_docstring, '"""M."""\ndef f():\n    return 1\n'),
    "method": (
        public_without_docstring,
        '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n',
    ),
    "module": (public_without_docstring, "x = 1\n"),
    "empty docstring": (public_without_docstring, '"""M."""\ndef f():\n    """ """\n'),
    "boolean": (positional_booleans, "def f(x, flag: bool = False): ...\n"),
}


@pytest.mark.parametrize("case", BAD)
def test_source_against_the_style_is_found(case):
    check, source = BAD[case]
    assert len(list(check("made_up.py", source))) == 1


def test_source_within_the_style_passes():
    source = '"""M."""\ndef f(x, *, flag: bool):\n    """F."""\ndef _g():\n    return 1\n'
    for check in (too_long, public_without_docstring, positional_booleans):
        assert list(check("made_up.py", source)) == []


def files_of_the_project() -> list[str]:
    """What git tracks, or would if it were added."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in output.split("\0") if path and (ROOT / path).exists()]


def test_nothing_unexpected_lies_at_the_top():
    assert {path.split("/")[0] for path in files_of_the_project()} - TOP_LEVEL == set()


def test_no_file_is_a_drawer_for_everything():
    drawers = ("utils.py", "util.py", "helpers.py", "misc.py", "common.py")
    assert [path for path in files_of_the_project() if path.endswith(drawers)] == []


def test_no_file_is_large():
    sizes = {path: (ROOT / path).stat().st_size for path in files_of_the_project()}
    assert sizes.pop("ccl_jax/models/resnet18_procedural.safetensors") < 6e6  # the built-in encoder
    assert [path for path, size in sizes.items() if size > 2**21] == []


def test_licence_is_the_one_that_the_package_names():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("script", [".ci/run", "launch/local.sh"])
def test_scripts_can_be_started(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_hooks_download_nothing():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    assert set(re.findall(r"language: (\S+)", hooks)) == {"system"}


def test_changelog_has_a_section_for_what_is_not_released():
    assert "\n## [Unreleased]\n\n### Added\n" in (ROOT / "CHANGELOG.md").read_text()
