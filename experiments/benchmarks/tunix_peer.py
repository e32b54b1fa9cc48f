"""Tunix as the peer of `peers.py` and `update_peers.py`: the Llama of a shape, and when its trainers take a batch."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import words
from flax import nnx
from tunix.models.llama3 import model  # pyright: ignore[reportMissingImports]  # the peer's, not the library's


def llama(shape: dict[str, int]) -> Any:
    """A random Llama in float32, on one device."""
    default = model.ShardingConfig.get_default_sharding()
    unsharded = {name: (None,) * len(axes) for name, axes in dataclasses.asdict(default).items()}
    config = model.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab"],
        embed_dim=shape["width"],
        hidden_dim=shape["mlp"],
        num_heads=shape["heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        shd_config=model.ShardingConfig(**unsharded),
    )
    return model.Llama3(config, rngs=nnx.Rngs(0))


def dpo(shape: dict[str, int], *, pairs: int, prompt: int, completion: int, steps: int) -> list[float]:
    """Steps on pairs of so many tokens, one in flight."""
    from tunix.sft.dpo import dpo_trainer  # pyright: ignore[reportMissingImports]

    random, stamps = np.random.default_rng(0), []

    def batch():
        sizes = {"prompt": prompt, "chosen": completion, "rejected": completion}
        ids = {f"{name}_ids": random.integers(0, shape["vocab"], (pairs, size)) for name, size in sizes.items()}
        return ids | {f"{name}_mask": np.ones((pairs, size), bool) for name, size in sizes.items()}

    batches = [dpo_trainer.TrainingInput(**batch()) for _ in range(steps)]
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=steps, max_inflight_computations=1)
    trainer = dpo_trainer.DPOTrainer(llama(shape), llama(shape), optax.adamw(1e-6), config)
    trainer.train(Stamped(batches, stamps))
    return stamps


def grpo(
    shape: dict[str, int],
    *,
    prompts: int,
    group: int,
    prompt: int,
    completion: int,
    steps: int,
    reward: Callable[[list[int]], float],
) -> list[float]:
    """Whole steps: samples, their rewards, an update; noted when the rewards are asked for."""
    from tunix.rl import rl_cluster  # pyright: ignore[reportMissingImports]
    from tunix.rl.grpo import grpo_learner  # pyright: ignore[reportMissingImports]
    from tunix.rl.rollout import base_rollout  # pyright: ignore[reportMissingImports]

    tokenizer, stamps = words.tokenizer(shape["vocab"]), []
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))

    def rewards(prompts, completions, **_):
        del prompts
        stamps.append(time.perf_counter())
        return [reward(tokenizer(text)["input_ids"]) for text in completions]

    cluster = rl_cluster.RLCluster(
        actor=llama(shape),
        reference=llama(shape),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
            ),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10**6, max_steps=steps
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=completion,
                max_prompt_length=prompt,
                kv_cache_size=prompt + completion + 64,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[shape["vocab"] - 2],
            ),
        ),
    )
    config = grpo_learner.GRPOConfig(num_generations=group, num_iterations=1, beta=0.04)
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=rewards, algo_config=config)
    learner.train(
        [{"prompts": np.array([words.text(shape["vocab"], prompt) for _ in range(prompts)])} for _ in range(steps)]
    )
    return stamps


class Stamped:
    """An iterable that notes when each of its items is asked for."""

    def __init__(self, items: Iterable[Any], stamps: list[float]):
        """The items, and where to note."""
        self.items, self.stamps = items, stamps

    def __iter__(self) -> Iterator[Any]:
        """The items."""
        for item in self.items:
            self.stamps.append(time.perf_counter())
            yield item
