"""Numbers of other programs: every vector beside the checkout (`spec/vectors_*.json`) is consumed here, and counted.

They were computed in float64 without this library, most of them also by running the official code of their source.
A module of `tests/vectors` holds the functions of one family, in its tables ONLINE and PREFERENCE: name of the vector's
function -> `(inputs, hyperparameters, expected)`, a generator of (ours, theirs).
"""

import functools
import importlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest

MODULES = [
    importlib.import_module(f"vectors.{path.stem}")
    for path in sorted((pathlib.Path(__file__).parent / "vectors").glob("[!m_]*.py"))
]
TABLES = {
    "online": {name: f for module in MODULES for name, f in getattr(module, "ONLINE", {}).items()},
    "preference": {name: f for module in MODULES for name, f in getattr(module, "PREFERENCE", {}).items()},
}
# Not objectives: annotator agreement, data filters, feedback prompts, verifiers, evaluation, one network's own modules.
LATER = {
    "online": {
        *(
            "parse_additive_score",
            "debiased_preference",
            "clamp_cot_probability",
            "d_rlaif_score",
            "cai_ensemble_label",
        ),
        *("fact_rlhf_reward", "token_shift", "icdpo_score", "gsm8k_extract", "last_boxed", "math_equiv"),
        *("think_format_reward", "repetition_penalty", "cosine_length_reward", "length_linear_penalty", "pass_at_k"),
        *("win_rate_swap", "length_controlled_winrate", "multiple_choice", "truthfulqa_mc", "ece", "gold_rm_curve"),
        *("wilson_interval", "majority_vote"),
    },
    "preference": {
        *("cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "dawid_skene", "crowd_bt", "ultrafeedback_average"),
        *("pair_filter", "decontam_ngram", "gpo_module_nll", "gpo_attention_mask", "icdpo_score"),
    },
}


PART = 16  # functions in one program


@functools.cache
def load(shared, file):
    """Function -> its vectors; "nan" and "inf" are floats."""
    text = (shared / "spec" / f"vectors_{file}.json").read_text()
    found = json.loads(text.replace('"nan"', "NaN").replace('"-inf"', "-Infinity").replace('"inf"', "Infinity"))
    by_function = {}
    for vector in found:
        by_function.setdefault(vector.get("function") or vector["loss"], []).append(vector)
    return by_function


@functools.cache
def computed(shared, file, part):
    """Function -> (ours, [(vector, theirs)]) of so many functions: a small program takes longer to compile than to run.

    A function that fails has its exception in their place.
    """
    found = load(shared, file)
    theirs, failed = {name: [] for name in list(TABLES[file])[part * PART : (part + 1) * PART]}, {}

    def of(name):
        for vector in found[name]:
            for mine, other in TABLES[file][name](vector["inputs"], vector["hyperparameters"], vector["expected"]):
                theirs[name].append((vector["id"], other))
                yield mine

    @jax.jit
    def compute():
        ours = {}
        for name in theirs:
            try:
                ours[name] = list(of(name))
            except Exception as error:
                failed[name] = error
        return ours

    ours = jax.tree.map(np.asarray, compute())
    return failed | {name: (mine, theirs[name]) for name, mine in ours.items()}


@pytest.mark.parametrize("file, name", [(file, name) for file, table in TABLES.items() for name in table])
def test_vectors(shared, file, name):
    result = computed(shared, file, list(TABLES[file]).index(name) // PART)[name]
    if isinstance(result, Exception):
        raise result
    ours, theirs = result
    assert {vector for vector, _ in theirs} == {vector["id"] for vector in load(shared, file)[name]} != set()
    for mine, (vector, other) in zip(ours, theirs, strict=True):
        assert np.shape(mine) == np.shape(other), vector
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=2e-6, err_msg=vector)


def test_no_vector_is_left_out(shared):
    for file, total in (("online", 187), ("preference", 174)):
        found = load(shared, file)
        assert math.fsum(len(vectors) for vectors in found.values()) == total
        assert TABLES[file].keys().isdisjoint(LATER[file])
        assert TABLES[file].keys() | LATER[file] == found.keys()
