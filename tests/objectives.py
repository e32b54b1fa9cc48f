"""Writes `alignax/losses/README.md`, the page of every objective, from the docstrings: `python tests/objectives.py`.

A docstring begins `Name: formula`, and cites as `"Title", Authors (https://...)`. The flag comes from the tables of the
scripts, the test from the tables of `Properties`. `tests/objectives_test.py` fails when the page is stale.
"""

import functools
import importlib
import inspect
import pathlib
import re
import sys
import types
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "alignax" / "losses" / "README.md"
# packages and modules of the library whose public functions stand on the page
PARTS = ("losses", "advantages", "returns", "corrections", "trpo", "controllers", "rewards", "data.selection")
PARTS += ("data.pairing",)
NO_OBJECTIVES = ("alignax.rewards.rules", "alignax.rewards.evaluate", "alignax.losses.extras")
EXTRA = {"train": ("ema", "ema_every"), "models": ("mixture", "geometric_mixture_logits")}
# script -> flag -> the name of the table, in the script or in a module it imports
TABLES = {
    "sft": {"loss": "sft.LOSSES"},
    "preference": {"loss": "pairwise.OBJECTIVES", "divergence": "pairwise.DIVERGENCES"},
    "kto": {"loss": "kto.LOSSES"},
    "online_preference": {"method": "online_preference.METHODS"},
    "grpo": {
        "advantages": "grpo.ADVANTAGES",
        "policy-loss": "grpo.POLICY_LOSSES",
        "correction": "grpo.CORRECTIONS",
        "kl": "grpo.KLS",
    },
    "ppo": {"policy-loss": "ppo.POLICY_LOSSES"},
}
HEAD = """# Every objective

Written from the docstrings by `python tests/objectives.py`; a test fails when it is stale. D = x_chosen - x_rejected is
the difference of two log-ratios x = log pi(y|x) - log ref(y|x), r = exp(logp - old_logp) the ratio of a token, A its
advantage. A function is imported as it stands here (`from alignax import losses`); its hyperparameters are keywords
that may be traced, its defaults those of the paper. Losses are unreduced: see `alignax.reduce` for the means.
"""


def public(part: str) -> dict[str, types.FunctionType]:
    """Name -> function, of all that a module or package exports."""
    module = importlib.import_module(f"alignax.{part}")
    members = {name: value for name, value in vars(module).items() if name[0] != "_"}
    return {
        name: value
        for name, value in members.items()
        if inspect.isfunction(value)
        and value.__module__.startswith(f"alignax.{part}")
        and value.__module__ not in NO_OBJECTIVES
    }


def objectives() -> dict[types.ModuleType, dict[str, types.FunctionType]]:
    """Module -> "losses.dpo" -> function: what the page shows."""
    found = {f"{part}.{name}": value for part in PARTS for name, value in public(part).items()}
    for part, names in EXTRA.items():
        found |= {f"{part}.{name}": getattr(importlib.import_module(f"alignax.{part}"), name) for name in names}
    modules: dict[types.ModuleType, dict[str, types.FunctionType]] = {}
    for path, function in found.items():
        modules.setdefault(sys.modules[function.__module__], {})[path] = function
    return modules


def cells(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def first_line(function: types.FunctionType) -> tuple[str, str]:
    """Name and formula."""
    line = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    name, colon, formula = line.partition(": ")
    return (name, formula) if colon else ("", line)


def papers(function: types.FunctionType) -> str:
    """Links to what the docstring cites; else to what its module cites."""
    for doc in (inspect.getdoc(function), inspect.getdoc(sys.modules[function.__module__])):
        text = " ".join((doc or "").split())
        found = re.findall(r'"([^"]+)",? [^"]*?\((https?://[^)\s]+)\)', text)
        found += [(link.split("//")[1], link) for link in re.findall(r"\((https?://[^)\s]+)\)", text)]
        links = {link: title for title, link in reversed(found)}
        if links:
            return ", ".join(f"[{cells(links[link])}]({link})" for link in dict.fromkeys(link for _, link in found))
    return ""


def flags() -> dict[types.FunctionType, list[str]]:
    """Function -> how a script is told to use it."""
    found: dict[types.FunctionType, list[str]] = {}
    for script, tables in TABLES.items():
        for flag, path in tables.items():
            module, name = path.split(".")
            for choice, value in getattr(importlib.import_module(module), name).items():
                function = getattr(value, "loss", value)
                while isinstance(function, functools.partial):
                    found.setdefault(function.keywords.get("convex"), []).append(f"`{script}.py --{flag} {choice}`")
                    function = function.func
                found.setdefault(function, []).append(f"`{script}.py --{flag} {choice}`")
    return found


def rows() -> dict[types.FunctionType, list]:
    """Function -> its rows of `properties.Properties`."""
    found: dict[types.FunctionType, list] = {}
    for _, row in table():
        found.setdefault(row.function, []).append(row)
    return found


def table() -> list[tuple[pathlib.Path, Any]]:
    """(test file, row) of every row of `properties.Properties`."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*_test.py")):
        if "(Properties)" not in path.read_text():
            continue
        name = ".".join(path.relative_to(ROOT / "tests").with_suffix("").parts)
        classes = [value for value in vars(importlib.import_module(name)).values() if inspect.isclass(value)]
        found += [(path, row) for value in classes for row in getattr(value, "rows", {}).values()]
    return found


def tests() -> dict[types.FunctionType, str]:
    """Function -> the test file whose table of `Properties` holds it."""
    return {row.function: str(path.relative_to(ROOT)) for path, row in table()}


def test_of(path: str, function: types.FunctionType, found: dict[types.FunctionType, str]) -> str:
    """The file that tests a function: that of its row, or the first that calls it."""
    if function in found:
        return found[function]
    name = path.rsplit(".", 1)[1]
    for file in sorted((ROOT / "tests").rglob("*.py"), key=lambda file: (not file.stem.endswith("_test"), str(file))):
        if re.search(rf"\b{name}\b", file.read_text()):
            return str(file.relative_to(ROOT))
    return ""


def recipes() -> list[tuple[str, str, str, str]]:
    """(name, what it is made of, algorithm, link) of every line under "Recipes:" in an algorithm's docstring."""
    found = []
    for file in sorted((ROOT / "alignax" / "algorithms").glob("[!_]*.py")):
        doc = inspect.getdoc(importlib.import_module(f"alignax.algorithms.{file.stem}")) or ""
        for line in re.split(r"\n  (?=\S)", doc.partition("Recipes:")[2])[1:]:
            text, link = re.fullmatch(r"(.*) \((https?://\S+)\)\.", " ".join(line.split())).groups()  # pyright: ignore
            name, _, made_of = text.partition(": ")
            found.append((name, made_of, f"algorithms.{file.stem}", link))
    return found


def recipe_table() -> list[str]:
    """The section of what is an algorithm with other arguments."""
    intro = "What papers call by a name of its own, and here is an algorithm with other arguments."
    lines = [f"## Recipes\n\n{intro}\n", "| Name | Made of | Algorithm | Paper |", "|---|---|---|---|"]
    for name, made_of, algorithm, link in recipes():
        lines.append(f"| {cells(name)} | {cells(made_of)} | `{algorithm}` | [{link.split('//')[1]}]({link}) |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    lines, use, rows = [HEAD, *recipe_table()], flags(), tests()
    for module, functions in objectives().items():
        title = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
        lines += [f"## {module.__name__}\n\n{title}\n", "| Objective | Formula | Function | Script | Paper | Test |"]
        lines.append("|---|---|---|---|---|---|")
        for path, function in functions.items():
            name, formula = first_line(function)
            test = test_of(path, function, rows)
            link = f"[{pathlib.Path(test).stem}](../../{test})" if test else ""
            found = use.get(function, [])
            script = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
            line = (cells(name), cells(formula), f"`{path}`", script, papers(function), link)
            lines.append(f"| {' | '.join(line)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "tests")]
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {PAGE.read_text().count('| `')} objectives")
