"""The token-level decision process (section A of online.md) and PPO with a critic (B7-B12)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import MEANS, floats

from alignax import advantages, controllers, logprobs, losses, moments, reduce, returns, rewards, train
from alignax.models.segments import segment_positions
from alignax.sampling import generate
from alignax.types import Hidden, Model


def step_by_step(start, measurements, rule):
    out = []
    for measured in measurements:
        start = rule(start, measured)
        out.append(start)
    return jnp.stack(out)


def masked_mean(x, hyper, expected):
    yield reduce.token_mean(*floats(x, "x", "mask")).value(), expected


def masked_var(x, hyper, expected):
    yield reduce.variance(*floats(x, "x", "mask"), **hyper), expected


def masked_whiten(x, hyper, expected):
    yield reduce.whiten(*floats(x, "x", "mask"), **hyper), expected


def normalize_advantages(x, hyper, expected):
    # max(var, eps) there, var + eps here: less than eps apart
    yield reduce.whiten(*floats(x, "adv", "mask"), ddof=hyper["ddof"], eps=hyper["eps"]), expected


def aggregate_loss(x, hyper, expected):
    constant = functools.partial(reduce.constant_mean, constant=hyper.get("norm_const"))
    mean = {**MEANS, "seq-sum-norm": constant}[hyper["mode"]]
    yield mean(*floats(x, "loss", "mask")).value(), expected


def response_mask_from_eos(x, hyper, expected):
    """The loop of the sampler, made to say these very tokens behind one token of prompt."""
    said = jnp.asarray(x["response_ids"])
    rows, length = said.shape
    model = Model(
        init=lambda key: None,
        hidden=lambda params, tokens, segments, **_: Hidden(jnp.zeros((*tokens.shape, 128)), None, {}),
        logits=lambda params, states: states,
        init_cache=lambda batch, size: None,
    )

    def said_next(logits, tokens, columns):
        token = jnp.take_along_axis(said, columns[:, None] - 1, axis=1)
        return jnp.where(jnp.arange(128)[None] == token, 0.0, -jnp.inf)

    prompts, lengths = jnp.zeros((rows, 1), int), jnp.ones(rows, int)
    options = {"max_new_tokens": length, "eos_ids": tuple(hyper["eos_ids"]), "process": (said_next,)}
    found = generate(model, None, prompts, lengths, jax.random.key(0), **options)
    yield found.mask[:, 1:].astype(float), expected["mask"]
    yield found.lengths, expected["length"]
    yield (~found.truncated).astype(float), expected["has_eos"]
    yield found.tokens[:, 1:], np.array(x["response_ids"]) * np.array(expected["mask"])


def position_ids_from_mask(x, hyper, expected):
    mask = np.array(x["attention_mask"])
    yield segment_positions(jnp.asarray(mask)) * mask, np.array(expected) * mask


def kl_estimate(x, hyper, expected):
    estimate = {"abs": losses.absolute, "k3+": losses.k3_straight_through}.get(hyper["estimator"])
    estimate = estimate or getattr(losses, hyper["estimator"])
    logp, ref_logp, mask = floats(x, "logp", "ref_logp", "mask")
    yield estimate(logp, ref_logp, mask), expected["per_token"]
    yield jnp.sum(estimate(logp, ref_logp, mask), axis=1), expected.get("seq_sum", np.sum(expected["per_token"], 1))
    gradient = jax.grad(lambda x: jnp.sum(estimate(x, ref_logp, mask)))(logp)
    yield gradient, expected["grad_wrt_logp_of_masked_sum"]


def kl_estimator_expected_gradient(x, hyper, expected):
    """Every symbol is one token, weighted by its probability; a ratio is live where it is differentiated."""
    logits, ref = floats(x, "logits", "ref_probs")
    mask, ref_logp = jnp.ones((1, 3)), jnp.log(ref)[None]
    p = jax.nn.softmax(logits)[None]

    def mean(estimate):
        return jax.grad(lambda logits: jnp.sum(p * estimate(jax.nn.log_softmax(logits)[None])))(logits)

    for name in ("k1", "k2", "k3"):
        estimate = getattr(losses, name)
        yield mean(lambda logp, f=estimate: f(logp, ref_logp, mask)), expected[f"E_grad_{name}"]
        if name != "k2":
            live = mean(lambda logp, f=estimate: jnp.exp(logp - jnp.log(p)) * f(logp, ref_logp, mask))
            yield live, expected[f"E_grad_ratio_times_{name}"]
    yield mean(lambda logp: losses.k3_straight_through(logp, ref_logp, mask)), expected["grad_KL_pi_ref"]
    yield losses.full_kl(logits[None, None], ref_logp[None], mask[:, :1])[0, 0], expected["KL_pi_ref"]
    yield losses.full_kl(ref_logp[None], logits[None, None], mask[:, :1])[0, 0], expected["KL_ref_pi"]
    full = jax.grad(lambda x: losses.full_kl(x[None, None], ref_logp[None], mask[:, :1])[0, 0])(logits)
    yield full, expected["grad_KL_pi_ref"]
    # samples of the reference: k3_forward is of KL(ref || pi), in value and in gradient
    forward = jax.grad(lambda x: jnp.sum(ref[None] * losses.k3_forward(jax.nn.log_softmax(x)[None], ref_logp, mask)))(
        logits
    )
    yield forward, expected["grad_KL_ref_pi"]


def full_kl(x, hyper, expected):
    logits, ref_logits, mask = floats(x, "logits", "ref_logits", "mask")
    kl = losses.full_kl(logits, ref_logits, mask)
    yield kl, expected["kl_policy_ref"]
    yield losses.full_kl(ref_logits, logits, mask), expected["kl_ref_policy"]
    yield reduce.token_mean(kl, mask).value(), expected["token_mean_policy_ref"]


def scores(logits, tokens, temperature=1.0):
    """`logprobs.score` of a model that says these logits, behind one token of prompt."""

    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        return Hidden(jnp.pad(params, ((0, 0), (0, 1), (0, 0))), cache, {})

    model = Model(lambda key: None, hidden, lambda params, states: states, lambda batch, size: None)
    rows = jnp.pad(jnp.asarray(tokens), ((0, 0), (1, 0)))
    return logprobs.score(
        model, jnp.asarray(logits), rows, jnp.ones(rows.shape, int), temperature=temperature, want=("entropy",)
    )


def token_entropy(x, hyper, expected):
    mask = jnp.asarray(x["mask"])
    entropy = jnp.where(mask != 0, scores(x["logits"], np.zeros(mask.shape, int)).entropy[:, 1:], 0.0)
    yield entropy, expected["per_token"]
    yield reduce.token_mean(entropy, mask).value(), expected["token_mean"]
    yield losses.entropy(jnp.asarray(x["logits"]), mask), expected["per_token"]


def token_logprobs(x, hyper, expected):
    yield scores(x["logits"], x["token_ids"], hyper["temperature"]).logp[:, 1:], expected


def kl_shaped_rewards(x, hyper, expected):
    score, *policies, mask = floats(x, "scores", "logp", "ref_logp", "mask")
    if hyper["score_clip"]:
        score = jnp.clip(score, *hyper["score_clip"])
    shaped = functools.partial(rewards.shaped_rewards, kl_coef=hyper["beta"], kl=getattr(losses, hyper["estimator"]))
    yield shaped(score, *policies, mask), expected["rewards"]
    if "non_score" in expected:
        yield shaped(jnp.zeros_like(score), *policies, mask), expected["non_score"]
        yield jnp.sum(shaped(score, *policies, mask), axis=1), expected["return_sum"]


def missing_eos_penalty(x, hyper, expected):
    functions = {
        "subtract": lambda *x: rewards.subtract_missing_eos(*x, penalty=hyper["value"]),
        "replace": lambda *x: rewards.replace_missing_eos(*x, score=hyper["value"]),
        "scale": lambda *x: rewards.scale_missing_eos(*x, factor=hyper["value"]),
    }
    yield functions[hyper["mode"]](*floats(x, "scores", "has_eos")), expected


def running_moments(x, hyper, expected):
    running = moments.Moments.init()
    for batch, after in zip(x["batches"], expected, strict=True):
        running = moments.update_moments(running, jnp.asarray(batch))
        yield running.count, after["count"]
        yield running.mean, after["mean"]
        yield running.variance(ddof=0), after["var_ddof0"]
        yield running.std(), after["std_ddof1"]


def llama2_combined_reward(x, hyper, expected):
    arrays = (*floats(x, "safety", "helpfulness"), jnp.asarray(x["is_safety_prompt"]))
    yield rewards.llama2_scores(*arrays, **hyper), expected["whitened"]


def adaptive_kl_controller(x, hyper, expected):
    def rule(beta, measured):
        kl, count = measured
        return controllers.adaptive_kl(beta, kl, target=hyper["target"], horizon=hyper["horizon"], count=count)

    yield step_by_step(hyper["init_beta"], x["kl_and_nsteps"], rule), expected


def ppo_kl_controller(x, hyper, expected):
    rule = functools.partial(controllers.ppo_paper_kl, target=hyper["target"])
    yield step_by_step(hyper["init_beta"], x["measured_kl"], rule), expected


def adaptive_entropy_coef(x, hyper, expected):
    limits = {"target": hyper["target"], "step": hyper["delta"], "low": hyper["min"], "high": hyper["max"]}
    rule = functools.partial(controllers.adaptive_entropy, **limits)
    yield step_by_step(hyper["init"], x["entropies"], rule), expected


def gae(x, hyper, expected):
    bootstrap = None
    if "bootstrap_value" in x:
        bootstrap = jnp.asarray(x["bootstrap_value"]) * jnp.asarray(x["truncated"])
    hyper = {"gamma": hyper["gamma"], "lambda_": hyper["lam"], "bootstrap": bootstrap}
    ours = advantages.gae(*floats(x, "rewards", "values", "mask"), **hyper)
    yield ours[0], expected["advantages"]
    yield ours[1], expected["returns"]


def discounted_returns(x, hyper, expected):
    yield returns.discounted_returns(*floats(x, "rewards", "mask"), **hyper), expected


def trajectory(x):
    """A row of ours from one of theirs: `v_t` are the values of the states after, a last discount of 0 is an end."""
    after, discounts = np.array(x["v_t"]), np.array(x["discount_t"])
    values = np.concatenate([x.get("v_tm1", [9.0])[:1], after[:-1]])
    bootstrap = after[-1:] * (discounts[-1] != 0)
    row = [jnp.asarray(part, jnp.float32)[None] for part in (x["r_t"], values, np.ones(len(values)))]
    return row, {"gamma": discounts[0], "bootstrap": jnp.asarray(bootstrap, jnp.float32)}


def lambda_returns(x, hyper, expected):
    row, keywords = trajectory(x)
    yield returns.lambda_returns(*row, lambda_=hyper["lam"], **keywords)[0], expected


def td_targets(x, hyper, expected):
    row, keywords = trajectory(x)
    target = returns.td_targets(*row, **keywords)[0]
    yield target, expected["target"]
    yield target - row[1][0], expected["td_error"]


def n_step_returns(x, hyper, expected):
    row, keywords = trajectory(x)
    yield returns.n_step_returns(*row, n=hyper["n"], **keywords)[0], expected


def vtrace(x, hyper, expected):
    row, keywords = trajectory(x)
    rho = jnp.asarray(x["rho_tm1"], jnp.float32)
    clips = {"clip_rho": hyper["clip_rho"], "clip_c": hyper["clip_c"], "clip_advantage": hyper["clip_pg_rho"]}
    logp = jnp.log(rho)[None]
    ours = returns.vtrace(logp, jnp.zeros_like(logp), *row, lambda_=hyper["lam"], **clips, **keywords)
    yield ours[0][0], expected["pg_advantage"]
    yield ours[1][0], expected["vs"]
    yield ours[1][0] - row[1][0], expected["errors"]
    yield ours[0][0] / jnp.minimum(hyper["clip_pg_rho"], rho) + row[1][0], expected["q_estimate"]


def kl_regularized_optimum(x, hyper, expected):
    """No function of the library's: what a policy trained with it must approach. Its KL is one."""
    ref, reward, beta = np.array(x["ref_probs"]), np.array(x["rewards"]), hyper["beta"]
    tilted = ref * np.exp(reward / beta)
    best = tilted / tilted.sum()
    kl = losses.full_kl(jnp.log(best)[None, None], jnp.log(ref)[None, None], jnp.ones((1, 1)))[0, 0]
    yield best, expected["pi_star"]
    yield np.log(tilted.sum()), expected["log_Z"]
    yield kl, expected["kl"]
    yield best @ reward, expected["expected_reward"]
    yield best @ reward - beta * kl, expected["optimal_value"]


def ppo_clip_loss(x, hyper, expected):
    logp, old_logp, advantage, mask = floats(x, "logp", "old_logp", "adv", "mask")
    clips = {"clip_low": hyper["eps_low"], "clip_high": hyper["eps_high"], "dual_clip": hyper.get("dual_clip_c")}

    def loss(logp):
        return losses.ppo_clip(logp, old_logp, advantage, mask, **clips)

    def total(logp):
        return MEANS[hyper["agg"]](loss(logp), mask).value()

    yield total(logp), expected["loss"]
    if "per_token" in expected:
        yield loss(logp), expected["per_token"]
        yield jax.grad(total)(logp), expected["grad_logp"]
        for name in ("k1", "k2", "k3"):
            kl = getattr(losses, name)(old_logp, logp, mask)
            yield reduce.token_mean(kl, mask).value(), expected[f"approx_kl_{name}"]


def ppo_penalty_loss(x, hyper, expected):
    logits, old_logits, advantage, mask = floats(x, "logits", "old_logits", "adv", "mask")

    def of_actions(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(x["actions"])[..., None], axis=-1)[..., 0]

    def total(logits):
        logp, old_logp = of_actions(logits), of_actions(old_logits)
        if hyper["clip_eps"] is None:
            policy = losses.ppo_penalty(logp, old_logp, advantage, mask, kl_weight=0.0)
        else:
            clip = hyper["clip_eps"]
            policy = losses.ppo_clip(logp, old_logp, advantage, mask, clip_low=clip, clip_high=clip)
        loss = policy + hyper["beta"] * losses.full_kl(old_logits, logits, mask)
        return reduce.token_mean(loss, mask).value()

    yield total(logits), expected["loss"]
    yield reduce.token_mean(losses.full_kl(old_logits, logits, mask), mask).value(), expected["kl_old_new"]
    if "grad_logits" in expected:
        yield jax.grad(total)(logits), expected["grad_logits"]


def kl_old_new_sample(x, hyper, expected):
    logp, old_logp, mask = floats(x, "logp", "old_logp", "mask")
    estimate = losses.k3_forward(logp, old_logp, mask)
    yield estimate, expected["per_token_k3"]
    yield reduce.token_mean(estimate, mask).value(), expected["k3"]
    yield reduce.token_mean(losses.k1(old_logp, logp, mask), mask).value(), expected["k1"]
    penalty = losses.ppo_penalty(logp, old_logp, jnp.zeros_like(logp), mask, kl_weight=2.0)
    yield penalty, 2 * np.array(expected["per_token_k3"])


def value_loss(x, hyper, expected):
    values, old_values, target, mask = floats(x, "values", "old_values", "returns", "mask")

    def total(values):
        loss = losses.value_clip(values, old_values, target, mask, clip=hyper["clip_eps"])
        return reduce.token_mean(loss, mask).value()

    yield total(values), expected["loss"]
    yield jax.grad(total)(values), expected["grad_values"]


def explained_variance(x, hyper, expected):
    yield reduce.explained_variance(*floats(x, "values", "returns", "mask")), expected


def ema_update(x, hyper, expected):
    yield train.ema(*floats(x, "target", "source"), rate=hyper["eta"]), expected


def top_entropy_mask(x, hyper, expected):
    mask = reduce.top_entropy(*floats(x, "entropy", "mask"), fraction=hyper["top_quantile"])
    yield mask.astype(int), expected["mask"]


ONLINE = {
    function.__name__: function
    for function in (
        masked_mean,
        masked_var,
        masked_whiten,
        normalize_advantages,
        aggregate_loss,
        response_mask_from_eos,
        position_ids_from_mask,
        kl_estimate,
        kl_estimator_expected_gradient,
        full_kl,
        token_entropy,
        token_logprobs,
        kl_shaped_rewards,
        missing_eos_penalty,
        running_moments,
        llama2_combined_reward,
        adaptive_kl_controller,
        ppo_kl_controller,
        adaptive_entropy_coef,
        gae,
        discounted_returns,
        lambda_returns,
        td_targets,
        n_step_returns,
        vtrace,
        kl_regularized_optimum,
        ppo_clip_loss,
        ppo_penalty_loss,
        kl_old_new_sample,
        value_loss,
        explained_variance,
        ema_update,
        top_entropy_mask,
    )
}
