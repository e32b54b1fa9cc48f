"""What README.md promises holds: its commands, its loop, its table and its tree."""

import importlib
import pathlib
import re
import tomllib

import pytest
from tiny_folder import save_tiny_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def fenced(text, language):
    """(line number, content) of each fenced block of a language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n") + 1, match.group(1)


def section(title):
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found.group(1)


def commands():
    lines = [
        line for text in (README, CONTRIBUTING) for _, block in fenced(text, "bash") for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_opens_with_a_sentence_and_two_commands():
    title, sentence, _, *_ = README.split("\n\n")
    assert title == "# alignax"
    assert sentence.endswith(".") and sentence.count(". ") == 0
    first, second = [block.strip() for _, block in fenced(README, "bash")][:2]
    assert first == 'pip install -e ".[experiments]" && python experiments/quickstart.py'
    assert second == 'pip install -e ".[test]" && pytest'


@pytest.mark.parametrize("command", commands())
def test_commands_name_files_and_extras_that_exist(command):
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[(\w+)\]", command):
        assert name in extras
    for script in re.findall(r"python ([\w./]+\.py)", command):
        assert (ROOT / script).is_file(), f"{command!r}: no {script}"
    for flag in re.findall(r"experiments/\S+\.py.* --([a-z][\w-]*)", command):
        script = re.search(r"experiments/\S+\.py", command)
        assert script and f"    {flag.replace('-', '_')}:" in (ROOT / script.group()).read_text(), (
            f"{command!r}: --{flag}"
        )


def test_the_loop_runs_as_it_stands(tmp_path, monkeypatch):
    """The very text, in a folder in which "path/to/model" is a tiny random model."""
    blocks = list(fenced(section("A whole GRPO loop"), "python"))
    assert len(blocks) == 1
    (code,) = [code for _, code in blocks]
    (line,) = [line for line, block in fenced(README, "python") if block == code]
    assert len([text for text in code.splitlines() if text.strip()]) <= 30, "the loop is about 25 lines"
    save_tiny_model(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    # Blank lines in front, so that a traceback names the README's own lines.
    exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), {"__name__": "__main__"})


def rows():
    lines = [line for line in section("Algorithms").splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["Algorithm", "Function", "Script", "Paper"]
    return body


def resolve(dotted):
    module, name = f"alignax.{dotted}".rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_table_names_functions_and_scripts_that_exist(row):
    _, functions, script, paper = row
    names = re.findall(r"`([\w.]+)`", functions)
    assert names and all(callable(resolve(name)) for name in names)
    scripts = re.findall(r"`([\w./]+)`", script)
    assert all((ROOT / path).is_file() for path in scripts), f"no {scripts}"
    assert scripts or script == "none: a step for your own loop"
    assert re.search(r"\]\(https?://\S+\)", paper)


def test_the_table_leaves_nothing_out():
    table = " ".join(row[1] for row in rows())
    algorithms = {f"algorithms.{path.stem}." for path in (ROOT / "alignax" / "algorithms").glob("[!_]*.py")}
    assert not {name for name in algorithms if name not in table}
    assert "[alignax/losses/README.md](alignax/losses/README.md)" in section("Algorithms")  # which has all the losses


def tree():
    """The paths of the annotated tree, in order. Two spaces a level; a folder without entries stands for all in it."""
    ((_, block),) = fenced(section("Where things are"), "text")
    stack, paths = [], []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name]
        paths.append("".join(stack))
        assert len(line.split()) > 1, f"{paths[-1]} has no annotation"
    return paths


def test_the_tree_is_the_real_one(tracked):
    paths = tree()
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"README's tree names what does not exist: {missing}"
    assert len(set(paths)) == len(paths)
    opened = {
        path.rsplit("/", 2 if path.endswith("/") else 1)[0] + "/" for path in paths if path.rstrip("/").count("/")
    }
    unnamed = set()
    for path in tracked:
        parts = path.split("/")
        entries = ["".join(part + "/" for part in parts[:n]) for n in range(1, len(parts))] + [path]
        for entry in entries:
            parent = entry.rstrip("/").rpartition("/")[0]
            if (not parent or parent + "/" in opened) and not entry.startswith(".") and "__init__" not in entry:
                unnamed.add(entry)
    assert not unnamed - set(paths), f"README's tree leaves out {sorted(unnamed - set(paths))}"
