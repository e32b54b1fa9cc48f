"""The direction of imports, who may use which package, sizes that keep modules readable: all read from the source."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A module imports its own level or lower ones.
LEVELS = (
    {"types"},
    {
        "reduce",
        "blockwise",
        "layouts",
        "logprobs",
        "advantages",
        "returns",
        "moments",
        "controllers",
        "corrections",
        "losses",
        "train",
        "trpo",
        "sampling",
        "sharding",
        "distributed",
        "ahead",
        "precision",
        "leafwise",
    },
    {"algorithms", "models", "rewards"},
    {"data", "evaluation", "io"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Packages with one owner, and packages that nothing may import.
OWNERS = {
    "flax": {"models"},
    "transformers": {"data", "io"},
    "datasets": {"data", "io"},
    "safetensors": {"data", "io"},
    "orbax": {"io"},
}
FORBIDDEN = {
    "torch",
    "tensorflow",
    "ray",
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "experiments",
}
PEERS = {"torch"}  # what others' code needs that is timed beside ours, in processes of its own

MODULE_LINES = 400
FUNCTION_LINES = 60


def _library():
    return sorted((ROOT / "alignax").rglob("*.py"))


def _scripts():
    return sorted((ROOT / "experiments").rglob("*.py"))


def _name(path):
    return str(path.relative_to(ROOT))


def _tree(path):
    return ast.parse(path.read_text(), str(path))


def _part(path):
    """`alignax/losses/preference.py` and `alignax/reduce.py` belong to `losses` and `reduce`; `__init__.py` to none."""
    part = path.relative_to(ROOT / "alignax").parts[0].removesuffix(".py")
    return None if part == "__init__" else part


def imports(tree):
    """Every module that a file imports, at any depth, as dotted names: `from a import b` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root, not relative ones"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(tree):
    """The parts of alignax that a file imports."""
    dotted = (name.split(".") for name in imports(tree))
    return {name[1] for name in dotted if name[0] == "alignax" and len(name) > 1}


@pytest.mark.parametrize("path", _library(), ids=_name)
def test_imports_point_one_way(path):
    part, used = _part(path), own_parts(_tree(path)) & LEVEL.keys()
    if part is None:
        return
    assert part in LEVEL, f"{part} has no level; add it where it belongs"
    upward = {name for name in used if LEVEL[name] > LEVEL[part]}
    assert not upward, f"{_name(path)} imports {sorted(upward)}, which stand above {part}"


def test_parts_import_each_other_without_cycles():
    graph = {}
    for path in _library():
        if part := _part(path):
            graph.setdefault(part, set()).update(own_parts(_tree(path)) - {part})
    left = dict(graph)
    while free := [part for part, used in left.items() if not used & left.keys()]:
        for part in free:
            del left[part]
    assert not left, f"cycle among {sorted(left)}"


def test_losses_and_algorithms_know_no_model():
    for path in _library():
        if _part(path) in {"losses", "algorithms"}:
            assert "models" not in own_parts(_tree(path)), _name(path)
        if _part(path) == "losses":
            assert own_parts(_tree(path)) <= {"types", "reduce", "losses"}, _name(path)


@pytest.mark.parametrize("path", _library(), ids=_name)
def test_packages_are_imported_by_their_owners_only(path):
    used = {name.split(".")[0] for name in imports(_tree(path))}
    for package in used & OWNERS.keys():
        assert _part(path) in OWNERS[package], f"{_name(path)} imports {package}: left to {sorted(OWNERS[package])}"


@pytest.mark.parametrize("path", _library() + _scripts(), ids=_name)
def test_nothing_imports_what_is_forbidden(path):
    used = {name.split(".")[0] for name in imports(_tree(path))}
    forbidden = FORBIDDEN - PEERS if path.parent.name == "benchmarks" else FORBIDDEN
    assert not used & forbidden, f"{_name(path)} imports {sorted(used & forbidden)}"
    if path in _library():
        scripts = {script.stem for script in _scripts() if script.stem not in sys.stdlib_module_names}
        assert not used & scripts, f"{_name(path)} imports the script {sorted(used & scripts)}"


def unsafe(tree):
    """Calls that run or unpickle what they are given."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            yield f"line {node.lineno}: {node.func.id}()"
        if ast.unparse(node.func) in {"torch.load", "os.system", "os.popen"}:
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            if keyword.arg in {"shell", "allow_pickle", "trust_remote_code"} and on:
                yield f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", _library() + _scripts(), ids=_name)
def test_nothing_runs_or_unpickles_its_input(path):
    assert not list(unsafe(_tree(path)))


def test_the_reader_of_sources_sees_what_it_should():
    """The checks above on a source that breaks every rule."""
    bad = ast.parse(
        "import pickle, torch.nn\n"
        "def f():\n"
        "    from alignax import models\n"
        "    import alignax.io.hf\n"
        "    eval(x); torch.load(p); run(c, shell=True)\n"
        "    np.load(p, allow_pickle=flag); load(n, trust_remote_code=False)\n"
        "    model.eval(); jax.eval_shape(f)\n"
    )
    assert set(imports(bad)) == {"pickle", "torch.nn", "alignax", "alignax.models", "alignax.io.hf"}
    assert own_parts(bad) == {"models", "io"}
    assert [line.split(": ")[1] for line in unsafe(bad)] == ["eval()", "torch.load", "shell=True", "allow_pickle=flag"]


def _definitions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("path", _library() + _scripts(), ids=_name)
def test_modules_and_public_names_have_docstrings(path):
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{_name(path)} has no docstring"
    public = [node for node in _definitions(tree) if node in tree.body and not node.name.startswith("_")]
    missing = [f"{_name(path)}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    assert not missing, missing


def body_lines(node):
    """Lines of a function's body, without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", _library() + _scripts(), ids=_name)
def test_modules_and_functions_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MODULE_LINES, f"{_name(path)} has {lines} lines, more than {MODULE_LINES}: split it by idea"
    functions = [node for node in _definitions(_tree(path)) if not isinstance(node, ast.ClassDef)]
    long = {f"{_name(path)}:{node.lineno} {node.name}": body_lines(node) for node in functions}
    assert not {name: length for name, length in long.items() if length > FUNCTION_LINES}


_IMPORT_ALL = """
import json, pkgutil, sys, warnings
warnings.simplefilter("error")
import alignax
heavy = [name for name in ("transformers", "datasets", "torch", "tensorflow", "ray") if name in sys.modules]
modules = [m.name for m in pkgutil.walk_packages(alignax.__path__, "alignax.")]
for name in modules:
    __import__(name)
late = [name for name in ("torch", "tensorflow", "ray", "matplotlib", "tensorboardX", "tyro") if name in sys.modules]
from jax._src import xla_bridge
print(json.dumps([modules, heavy, late, xla_bridge.backends_are_initialized()]))
"""


def test_importing_touches_no_device_and_stays_light():
    """In a process of its own: `import alignax`, then every module of it."""
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    modules, heavy, late, initialised = json.loads(result.stdout)
    files = [path for path in _library() if path.parent != ROOT / "alignax" or path.name != "__init__.py"]
    assert len(modules) == len(files), "a folder without __init__.py is not found by the installed package"
    assert not heavy, f"import alignax imports {heavy}"
    assert not late, f"a module of alignax imports {late}"
    assert not initialised, "importing alignax initialises a device"


def test_every_folder_is_two_deep_at_most():
    depths = {_name(path): len(path.relative_to(ROOT / "alignax").parts) for path in _library()}
    assert max(depths.values()) <= 2, [name for name, depth in depths.items() if depth > 2]
