"""Supervised fine-tuning and distillation (section A of preference.md)."""

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import floats

from alignax import logprobs, losses, reduce
from alignax.models.segments import segment_positions
from alignax.types import Hidden, Model

REDUCTIONS = {
    "token_mean": reduce.token_mean,
    "sequence_mean": reduce.sequence_mean,
    "sequence_sum": reduce.sequence_sum,
}


def answers(logits, tokens, mask, *want):
    """`logprobs.score` of a model that says these logits, behind one token of prompt."""

    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        return Hidden(jnp.pad(params, ((0, 0), (0, 1), (0, 0))), cache, {})

    model = Model(lambda key: None, hidden, lambda params, states: states, lambda batch, size: None)
    rows, chosen = (jnp.pad(jnp.asarray(x), ((0, 0), (1, 0))) for x in (tokens, mask))
    scores = logprobs.score(model, logits, rows, jnp.ones(rows.shape, int), mask=chosen, want=want)
    return [getattr(scores, name)[:, 1:] for name in ("logp", *want)]


def supervised(loss, *want):
    """A vector of logits and targets, for a loss of their log-probabilities."""

    def check(x, hyper, expected):
        logits, mask = floats(x, "logits", "mask")

        def per_token(logits):
            found = answers(logits, x["targets"], mask, *want)
            return loss(*found, mask, **{name: hyper[name] for name in ("label_smoothing",) if name in hyper})

        def total(logits):
            return REDUCTIONS[hyper["reduction"]](per_token(logits), mask).value()

        yield total(logits), expected["loss"]
        if "per_token_nll" in expected:
            yield per_token(logits), np.array(expected["per_token_nll"])
            p = np.exp(x["logits"])
            p = p / p.sum(-1, keepdims=True) - np.eye(p.shape[-1])[np.array(x["targets"])]
            yield jax.grad(total)(logits), p * (np.array(x["mask"]) / np.sum(x["mask"]))[..., None]

    return check


def sft_ce(x, hyper, expected):
    if "label_smoothing" in hyper:
        return supervised(losses.smoothed_cross_entropy, "mean_logp")(x, hyper, expected)
    return supervised(losses.cross_entropy)(x, hyper, expected)


def distilled(loss):
    def check(x, hyper, expected):
        student, teacher, mask = floats(x, "student_logits", "teacher_logits", "mask")
        per_token = loss(student, teacher, mask, **hyper)
        yield reduce.token_mean(per_token, mask).value(), expected["loss"]
        if "per_token" in expected:
            whole = loss(student, teacher, jnp.ones_like(mask), **hyper)
            yield whole, expected["per_token"]

    return check


def distilled_top_k(loss):
    def check(x, hyper, expected):
        student, teacher, mask = floats(x, "student_logits", "teacher_logits", "mask")
        logp, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), hyper["k"])
        yield reduce.token_mean(loss(student, logp, ids, mask), mask).value(), expected["loss"]
        if "indices" in expected:
            yield ids, expected["indices"]

    return check


def sft_packing_mask(x, hyper, expected):
    segments, mask = jnp.asarray(x["segment_ids"]), jnp.asarray(x["completion_mask"])
    yield segment_positions(segments), expected["position_ids"]

    # a model that finds every token equally likely, so that what is scored is not 0
    def hidden(params, tokens, segments, **_):
        return Hidden(jnp.zeros((*tokens.shape, 2)), None, {})

    model = Model(lambda key: None, hidden, lambda params, states: states, lambda batch, size: None)
    logp = logprobs.token_logprobs(model, None, jnp.zeros_like(segments), segments, mask=mask)
    yield (logp != 0)[:, 1:].astype(int), expected["label_valid_after_shift"]
    yield (logp != 0)[:, 0].astype(int), np.zeros(len(segments))


PREFERENCE = {
    "sft_ce": sft_ce,
    "sft_dft": supervised(losses.dft),
    "sft_packing_mask": sft_packing_mask,
    "distill_forward_kl": distilled(losses.distill_forward_kl),
    "distill_reverse_kl": distilled(losses.distill_reverse_kl),
    "gkd_jsd": distilled(losses.generalised_jsd),
    "distill_topk_tail": distilled_top_k(losses.distill_top_k),
    "distill_topk_renorm": distilled_top_k(losses.distill_top_k_renormalised),
}
