"""The page of objectives is complete, true and new; every public function of arrays has its row of properties."""

import importlib
import re

import objectives
import pytest


@pytest.fixture(scope="module")
def page():
    return objectives.page()


def test_the_page_is_not_stale(page):
    assert objectives.PAGE.read_text() == page, "run python tests/objectives.py"


def test_recipes_are_made_of_what_there_is():
    for name, made_of, algorithm, _ in objectives.recipes():
        for dotted in [*re.findall(r"`([\w.]+)`", made_of), f"{algorithm}.make_loss"]:
            module, function = f"alignax.{dotted}".rsplit(".", 1)
            assert callable(getattr(importlib.import_module(module), function, None)), f"{name}: {dotted}"


def test_no_public_name_is_missing(page):
    for part in objectives.PARTS:
        for name in objectives.public(part):
            assert f"`{part}.{name}`" in page


def test_every_objective_has_a_name_a_formula_a_paper_and_a_test():
    lacking, rows = [], objectives.tests()
    for functions in objectives.objectives().values():
        for path, function in functions.items():
            name, formula = objectives.first_line(function)
            if not (name and formula and objectives.test_of(path, function, rows)):
                lacking.append(path)
            if path.startswith("losses.") and path != "losses.mixture" and not objectives.papers(function):
                lacking.append(f"{path} (paper)")
    assert not lacking
