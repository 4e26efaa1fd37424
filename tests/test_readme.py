"""The README keeps its word: its code runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a language, each with the number of lines above its first."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in pattern.finditer(text)]


def make_targets(text: str) -> set[str]:
    """Every target that a console block of the text tells the reader to make."""
    commands = re.findall(
        r"^\$ make ([a-z ]+)", "".join(code for _, code in blocks(text, "console")), re.MULTILINE
    )
    return {target for command in commands for target in command.split()}


def local_paths(text: str) -> set[str]:
    """Targets of pictures and links that are files of the repository."""
    found = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    return {path for path in found if not re.match(r"[a-z]+:", path)}


def benchmark_files(text: str) -> set[str]:
    return set(re.findall(r"benchmarks/[\w/.-]+\.(?:py|json)", text))


def run_blocks(text: str) -> dict:
    """Run the Python blocks in order in one namespace; tracebacks show the README's lines."""
    namespace = {"__name__": "__main__"}
    for above, code in blocks(text, "python"):
        exec(compile("\n" * above + code, str(ROOT / "README.md"), "exec"), namespace)
    return namespace


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert blocks(README, "python")
    run_blocks(README)


def test_make_targets_exist():
    assert {"demo", "test"} <= make_targets(README)
    assert make_targets(README) <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def test_files_exist():
    named = local_paths(README) | benchmark_files(README)
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_checks_see_what_they_look_for():
    text = (
        '# x\n```python\na = 1\n```\n![p](docs/a.png) [q](https://x.org) <img src="b.svg">\n'
        "benchmarks/results/zoo.json\n```console\n$ make demo paper\n```\n"
        "```python\nb = a + 1\n```\n"
    )
    assert run_blocks(text)["b"] == 2
    assert make_targets(text) == {"demo", "paper"}
    assert local_paths(text) == {"docs/a.png", "b.svg"}
    assert benchmark_files(text) == {"benchmarks/results/zoo.json"}
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks("\n\n```python\nx = 1\n1 / 0\n```\n")
    assert caught.traceback[-1].lineno == 4  # counted from nought: the fifth line
