"""A tiny model and one batch per algorithm, shared by the tests that hold every algorithm to the same properties."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parameters import drawn

from alignax import layouts, models, reduce, train
from alignax.algorithms import grpo, kto, ppo, preference, reward_model, sft
from alignax.types import Model, Params

ROWS, LENGTH, VOCAB = 16, 11, 32


@functools.cache
def tiny() -> tuple[Model, Params]:
    """A Llama of two layers with weights large enough for its log-probabilities to differ."""
    config = models.TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        initializer_range=0.2,
    )
    model = models.transformer(config)
    params = drawn(model, scale=0.2)
    # The first norm divides by the size of an embedding, and its gradient with it: small ones would magnify rounding.
    params["embed"]["embedding"] *= 5
    return model, params


@functools.cache
def small() -> tuple[Model, Params]:
    """A network of one layer that looks back, under the names that `models.RULES` know: compiled in half the time.

    It knows no segments, so that rows must lie by themselves.
    """

    def body(params, tokens, segments):
        x = params["embed"]["embedding"][tokens]
        return x + jnp.tanh(jnp.cumsum(x, axis=1) @ params["up"]["kernel"][0]) @ params["down"]["kernel"][0]

    shapes = {"embed": {"embedding": (VOCAB, 16)}, "up": {"kernel": (1, 16, 24)}, "down": {"kernel": (1, 24, 16)}}
    shapes |= {"head": {"kernel": (16, VOCAB)}}
    normal = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: jnp.float32(0.3 * normal(size=x)), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return models.from_apply(body, head=lambda params, x: x @ params["head"]["kernel"]), params


@functools.cache
def scored(network: Callable = tiny, *, shared: bool = False) -> tuple[Model, Params]:
    """A network with a scalar head: a reward model or critic, or (shared) a policy that is its own critic."""
    model, params = network()
    return models.with_score(model), models.add_score(model, params, jax.random.key(1), keep_head=shared)


class Problem(NamedTuple):
    make_loss: Callable  # (model) -> loss function
    batch: Any  # numpy arrays
    frozen: Any
    hyper: dict
    start: Callable = tiny  # () -> model, parameters
    statistics: Callable | None = None  # (model) -> statistics function


def rows(*shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Ragged rows: lengths differ, prompts of 3, one row with nothing to learn."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, LENGTH + 1, shape)
    columns = np.arange(LENGTH)
    segments = (columns < lengths[..., None]).astype(np.int32)
    mask = (segments == 1) & (columns >= 3)
    mask[1] = False
    tokens = np.where(segments, rng.integers(0, VOCAB, (*shape, LENGTH)), 0).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "mask": mask}


@functools.cache
def problems(network: Callable = tiny) -> dict[str, Problem]:
    """Name -> problem of the network. Weights hold a filler row; the reference differs from the policy."""
    rng = np.random.default_rng(1)
    weights = np.ones(ROWS, np.float32)
    weights[2] = 0
    weights[5] = 0.5
    _, params = network()
    frozen = {"reference": jax.tree.map(lambda x: 0.9 * x, params)}
    one, two = rows(ROWS), rows(ROWS, 2)
    noise = partial(rng.normal, size=(ROWS, LENGTH))
    old_logp, advantages = (-3.4 + 0.2 * noise()).astype(np.float32), rng.normal(size=ROWS).astype(np.float32)
    rollout = grpo.Batch(**one, advantages=advantages, old_logp=old_logp, weights=weights)
    per_token = {name: noise().astype(np.float32) for name in ("old_values", "advantages", "returns")}
    learned_from = ppo.Batch(**one, old_logp=old_logp, **per_token, weights=weights)
    judged = {name: two[name] for name in ("tokens", "segments")} | {"weights": weights}
    judged |= {name: rng.uniform(size=ROWS).astype(np.float32) for name in ("margin", "preference")}
    ppo_hyper = {"clip_low": 0.3, "entropy_weight": 0.05, "temperature": 0.8}
    others = {f"mismatched_{name}": x for name, x in rows(ROWS, seed=2).items()}
    said = kto.Batch(**one, **others, desirable=rng.random(ROWS) < 0.6, weights=weights)
    with_score = partial(scored, network)
    above = {"reference": jax.tree.map(lambda x: 1.1 * x, params)}  # so that KTO's KL is not clamped
    return {
        "kto": Problem(kto.make_loss, said, above, {"beta": 0.3}, network, kto.make_statistics),
        "reward_model": Problem(
            reward_model.make_loss, reward_model.Batch(**judged), None, {"centering_weight": 0.1}, with_score
        ),
        "ppo": Problem(ppo.make_loss, learned_from, None, ppo_hyper, network),
        "ppo_critic": Problem(ppo.make_value_loss, learned_from, None, {"clip": 0.5}, with_score),
        "ppo_shared": Problem(
            ppo.make_shared_loss,
            learned_from,
            None,
            ppo_hyper | {"value_clip": 0.5},
            partial(scored, network, shared=True),
        ),
        "sft": Problem(sft.make_loss, sft.Batch(**one, weights=weights), None, {}, network),
        "dpo": Problem(preference.make_loss, preference.Batch(**two, weights=weights), frozen, {"beta": 0.3}, network),
        "grpo": Problem(
            grpo.make_loss, rollout, frozen, {"kl_weight": 0.1, "clip_low": 0.3, "temperature": 0.8}, network
        ),
        "dapo": Problem(
            partial(grpo.make_loss, kl=None, mean=reduce.token_mean), rollout, None, {"clip_high": 0.28}, network
        ),
    }


def in_bundles(problem: Problem, layout: Callable[[Model], Model], members: int) -> Problem:
    """The problem with its batch in bundles of so many members, which the layout runs through the network together."""

    def make(make_function):
        return lambda model: layouts.bundled(make_function(layout(model)))

    return problem._replace(
        make_loss=make(problem.make_loss),
        statistics=problem.statistics and make(problem.statistics),
        batch=jax.tree.map(lambda x: np.asarray(x).reshape(-1, members, *x.shape[1:]), problem.batch),
    )


def packed(problem: Problem, rows: int = 4) -> Problem:
    """So many rows, or half as many pairs, as one row of the network; rows of others' answers too."""
    members = rows if problem.batch.tokens.ndim == 2 else rows // 2
    return in_bundles(problem, partial(layouts.packed, width=rows * LENGTH, members=rows), members)


def with_common_prompts(problem: Problem, rows: int = 4) -> Problem:
    """The problem with one prompt for every so many rows, or for both sides of a pair."""

    def common(x):
        together = np.array(x).reshape(-1, rows if x.ndim == 2 else 2, x.shape[-1])
        together[..., :3] = together[:, :1, :3]
        return together.reshape(x.shape)

    names = [name for name in problem.batch._fields if name.endswith("tokens")]
    return problem._replace(batch=problem.batch._replace(**{n: common(getattr(problem.batch, n)) for n in names}))


def shared_prompt(problem: Problem, rows: int = 4) -> Problem:
    """The same with that prompt run once. Rows are three columns longer, since what shares a prompt has that room."""
    ndim = problem.batch.tokens.ndim

    def longer(x):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)]) if x.shape[-1] == LENGTH else x

    problem = problem._replace(batch=jax.tree.map(longer, problem.batch))
    layout = partial(layouts.shared_prompt, width=3, members=rows if ndim == 2 else 2)
    return in_bundles(problem, layout, rows if ndim == 2 else 1)


class Result(NamedTuple):
    gradient: Any  # of the first update
    params: Any  # after the third
    metrics: dict  # of the third


def three_updates(
    problem: Problem,
    *,
    run: Callable | None = None,
    batch: Any = None,
    microbatches: int = 1,
    axis_name=None,
    statistics: Callable | None = None,
) -> Result:
    """Three SGD updates on one batch; `run(update, state, batch, frozen, hyper)` places the arrays and compiles.

    `statistics`: model -> statistics function, the problem's unless told.
    """
    model, params = problem.start()
    # an optimizer that keeps the gradient it was given: the difference of parameters would be too coarse
    keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p=None: (g, g))
    optimizer = optax.chain(keep, optax.sgd(0.1))
    options = {"microbatches": microbatches, "axis_name": axis_name}
    statistics = problem.statistics if statistics is None else statistics
    measure = None if statistics is None else statistics(model)
    update = train.make_update(problem.make_loss(model), optimizer, statistics=measure, **options)
    run = on_one_device() if run is None else run
    state, batch = train.TrainState.create(params, optimizer), problem.batch if batch is None else batch
    gradients, metrics = [], {}
    for _ in range(3):
        state, metrics = run(update, state, batch, problem.frozen, problem.hyper)
        gradients.append(state.opt_state[0])
    return jax.tree.map(np.asarray, Result(gradients[0], state.params, metrics))


def on_one_device() -> Callable:
    """Compiles once and runs where the arrays are; `traces` grows with every compilation."""
    compiled, traces = [], []

    def run(update, *args):
        def counted(*args):
            traces.append(1)
            return update(*args)

        if not compiled:
            compiled.append(jax.jit(counted))
        return compiled[0](*args)

    run.traces = traces
    return run


def assert_same(result: Result, expected: Result, params_atol: float = 1e-6) -> None:
    """Gradients to 1e-6 of their largest entry, parameters to 1e-6, metrics to float32 rounding."""
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected.gradient))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), result.gradient, expected.gradient)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=params_atol), result.params, expected.params)
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(result.metrics[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
