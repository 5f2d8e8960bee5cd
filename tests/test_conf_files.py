"""The files in `conf/`: every key is explained, and none falls into one of YAML's or Hydra's traps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [file for file in FILES if file.parent != CONF]
PACKAGED = {"preset", "experiment"}  # groups whose options write to the root of the config
# Hydra's own words; what they mean is in Hydra's manual.
HYDRAS_KEYS = {"defaults", "_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def name_of(file: Path) -> str:
    return file.relative_to(CONF).as_posix()


def keys(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Yield the key nodes of a mapping and of the mappings in it, without the settings of Hydra itself."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "hydra":
            continue
        if key.value not in HYDRAS_KEYS:
            yield key
        if key.value != "defaults":
            yield from keys(value)


def unexplained(text: str) -> list[str]:
    """Return the keys of a YAML text that have no comment, neither at the end of their line nor on the line above."""
    lines = text.splitlines()
    found = []
    root = yaml.compose(text)
    for key in keys(root) if root is not None else ():
        number = key.start_mark.line
        above = lines[number - 1].strip() if number else ""
        at_end = lines[number].partition(" #")[2].strip()
        is_comment = above.startswith("#") and not above.startswith("# @package") and len(above) > 3
        if not at_end and not is_comment:
            found.append(f"line {number + 1}: {key.value}")
    return found


def test_there_are_options() -> None:
    groups = {file.parent.name for file in OPTIONS}
    print(f"{len(OPTIONS)} options in {len(groups)} groups")
    assert len(groups) == sum(1 for entry in CONF.iterdir() if entry.is_dir() and entry.name != "__pycache__")
    assert len(groups) >= 16, f"only {sorted(groups)}"
    assert len(OPTIONS) >= 45, f"only {len(OPTIONS)} options"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_key_has_a_comment(file: Path) -> None:
    missing = unexplained(file.read_text())
    assert not missing, f"{name_of(file)}: a comment is missing (meaning, unit, special values) for {missing}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_starts_with_what_it_is(file: Path) -> None:
    lines = file.read_text().splitlines()
    described = lines[1] if file.parent.name in PACKAGED else lines[0]
    assert described.startswith("# "), f"{name_of(file)}: say in a comment at the top what this option does"
    assert "@package" not in described


@pytest.mark.parametrize("file", OPTIONS, ids=name_of)
def test_package_directives(file: Path) -> None:
    lines = file.read_text().splitlines()
    if file.parent.name in PACKAGED:
        # Hydra reads the directive on line 1 only and ignores it, silently, anywhere else.
        assert lines[0] == "# @package _global_", f"{name_of(file)}: line 1 must be `# @package _global_`"
    assert not any("@package" in line for line in lines[1:]), f"{name_of(file)}: @package below line 1 has no effect"
    assert file.parent.name in PACKAGED or "@package" not in lines[0]


@pytest.mark.parametrize("file", OPTIONS, ids=name_of)
def test_option_names_are_words(file: Path) -> None:
    for word in (file.stem, file.parent.name):
        assert yaml.safe_load(word) == word, f"{name_of(file)}: YAML reads {word!r} as {yaml.safe_load(word)!r}"
        assert word.isidentifier(), f"{name_of(file)}: {word!r} must be one word of letters, digits and _"
        assert word == word.lower()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_key_is_given_twice(file: Path) -> None:
    def repeated(node: yaml.Node | None) -> list[str]:
        if not isinstance(node, yaml.MappingNode):
            return []
        names = [key.value for key, _ in node.value]
        inside = [name for _, value in node.value for name in repeated(value)]
        return sorted({name for name in names if names.count(name) > 1}) + inside

    assert repeated(yaml.compose(file.read_text())) == []


@pytest.mark.parametrize("name", ["off", "no", "null", "true", "1", "On"])
def test_words_that_yaml_misreads_are_seen(name: str) -> None:
    assert yaml.safe_load(name) != name


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a: 1\n", ["line 1: a"]),
        ("# what a is\na: 1\nb: 2  # what b is\nc:\n  # what d is\n  d: 1\n", ["line 4: c"]),
        ("# what a is\na:\n  b: 1\n", ["line 3: b"]),
        ("# @package _global_\na: 1\n", ["line 2: a"]),
        ("a: 1  #\n", ["line 1: a"]),
        ("_target_: x\n_partial_: true\ndefaults:\n  - b: c\nhydra:\n  run: 1\n", []),
        ("# only a comment\n", []),
    ],
)
def test_a_missing_comment_is_seen(text: str, missing: list[str]) -> None:
    assert unexplained(text) == missing
