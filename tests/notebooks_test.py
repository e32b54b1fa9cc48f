"""Every notebook runs from top to bottom, in a namespace of its own, and is stored without outputs."""

import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch, tmp_path):
    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for index, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{path.name} holds outputs; run nbstripout"
            exec(compile("".join(cell["source"]), f"{path.name}[{index}]", "exec"), namespace)
    if path.stem == "first_steps":
        reward, _ = namespace["curve"][-1]
        assert reward > 5, "GRPO no longer learns to repeat the token 5"


def test_there_are_notebooks():
    assert NOTEBOOKS
