"""What every script needs around its loop: an optimizer, an output folder with metrics and curves, and plain printing.

Nothing here knows an algorithm. The loop itself, with its data, sampling and updates, stays in the script.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from alignax import data, distributed, leafwise, precision, sampling, sharding, train
from alignax.data import text, truncation
from alignax.io import hf

Schedule = Literal["constant", "linear", "cosine"]
Truncate = Literal["keep_start", "keep_end", "drop", "refuse"]
TRUNCATIONS: dict[str, Callable] = {name: getattr(truncation, name) for name in get_args(Truncate)}

# What is left of the peak learning rate after the fraction p of the decay.
_DECAYS: dict[Schedule, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + jnp.cos(jnp.pi * p)),
}


def make_schedule(
    learning_rate: float, *, steps: int, warmup: int = 0, schedule: Schedule = "constant", final: float = 0.0
) -> optax.Schedule:
    """learning_rate * min(1, (s + 1) / warmup) * (final + (1 - final) * decay(p)), p = (s - warmup) / (steps - warmup).

    s counts updates from 0 and p is cut to [0, 1]: the first update of a warm-up moves already, the peak is reached
    with update number `warmup`, and the rate would be `final * learning_rate` one update after the last.

    Args:
      learning_rate: the peak.
      steps: the number of updates of the whole run.
      warmup: the number of updates over which the rate rises, 0 for none.
      schedule: the shape of the decay.
      final: what the decay ends on, as a fraction of the peak.

    Raises:
      ValueError: when the warm-up does not fit into the run.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"make_schedule: warmup={warmup}; expected 0 to steps={steps}")
    decay = _DECAYS[schedule]

    def rate(count):
        step = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return learning_rate * rise * (final + (1.0 - final) * decay(progress))

    return rate


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: all but biases and the scales of norms.

    Judged by name, not by rank: layers are stacked, so a norm's scale may be [L, D] and a bias [L, H * hd]. Embeddings
    decay, as in the Hugging Face trainer, whose results ours are compared with.
    """

    def decays(path: Sequence[Any], leaf: Any) -> bool:
        del leaf
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))).lower() for entry in path]
        return not (names[-1].endswith(("bias", "scale")) or any("norm" in name for name in names))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    schedule: Schedule = "constant",
    final: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bits: int = 32,
    offload: bool = False,
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a global norm, with the schedule of `make_schedule` and the mask of `decay_mask`.

    `max_grad_norm` 0 clips nothing. `bits` below 32 are those of its moments (`precision.compressed`), and `offload`
    lets them live in the host's memory (see `create_state`); both update leaf by leaf. "Decoupled Weight Decay
    Regularization", Loshchilov and Hutter, arXiv:1711.05101.
    """
    rate = make_schedule(learning_rate, steps=steps, warmup=warmup, schedule=schedule, final=final)
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adamw = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    adamw = adamw if bits == 32 else precision.compressed(adamw, bits=bits)
    return optax.chain(clip, leafwise.leafwise(adamw) if offload or bits < 32 else adamw)


def optimizer_of(config: Any, **options: Any) -> optax.GradientTransformation:
    """The same by the fields of a Config whose every step is one update, with further options."""
    return make_optimizer(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **options,
    )


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
    *,
    seed: int,
    offload: bool = False,
) -> train.TrainState:
    """A train state on the mesh, sharded by the rules; it holds copies, so that `params` can stay the reference.

    With `offload` the optimizer's part is in the host's memory.
    """
    host = r"^opt_state/" if offload else None
    create = sharding.born_sharded(lambda p, key: train.TrainState.create(p, optimizer, key), mesh, rules, host=host)
    return create(params, jax.random.key(seed))


def load_policy(folder: str, **options: Any) -> hf.Loaded:
    """A language model's folder; `options` are those of `hf.load`.

    Raises:
      ValueError: for a reward model's folder, whose head gives no tokens.
    """
    loaded = hf.load(folder, **options)
    if loaded.model.values is not None:
        raise ValueError(f"{folder}: a reward model; expected a language model, a ...ForCausalLM folder")
    return loaded


def hold_out(config: Any, rows: list, summary: str) -> tuple[list, list]:
    """Rows to train on and rows held out; prints the summary of what was read.

    Raises:
      ValueError: when there are not two rows to share out.
    """
    print(summary)
    if len(rows) < 2:
        raise ValueError(f"{config.data}: {summary}; expected at least one row to train on and one to hold out")
    return data.split(rows, config.held_out, seed=config.seed)


def make_show(loaded: hf.Loaded, prompts: Sequence[np.ndarray], *, new_tokens: int = 64) -> Callable[..., None]:
    """Makes `show(title, params, key)`, which prints a sampled continuation of each prompt, token ids.

    What does not fit the model's context beside the new tokens is cut off the beginning of a prompt.
    """
    context = loaded.model.config.max_positions
    new_tokens = min(new_tokens, context // 2)
    width = min(max(map(len, prompts)), context - new_tokens)
    shown = [prompt[-width:] for prompt in prompts]
    tokens = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in shown])
    lengths = np.array([len(prompt) for prompt in shown])
    generate = partial(sampling.generate, loaded.model, max_new_tokens=new_tokens, eos_ids=loaded.eos_ids)
    sample = jax.jit(generate)

    def show(title: str, params: Any, key: jax.Array) -> None:
        samples = to_host(sample(params, tokens, lengths, key))
        completions = text.decode(loaded.tokenizer, samples.tokens, samples.mask, eos_ids=loaded.eos_ids)
        print_samples(title, loaded.tokenizer.batch_decode(shown), completions)

    return show


def to_host(tree: Any) -> Any:
    """The same tree with numpy arrays for device arrays: one transfer, which waits for the device.

    What several processes hold together is gathered: all of them must call this.
    """
    return distributed.to_host(tree)


def save_curves(path: str | pathlib.Path, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws each named list of (x, y) points in a panel of its own, three to a row. Nothing to draw writes nothing."""
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    for panel, (name, points) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, panel)
        xs, ys = np.transpose(points)
        axes.plot(xs, ys, linewidth=1.2, marker="." if len(points) < 30 else "")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def print_samples(title: str, prompts: Sequence[str], completions: Sequence[str], *, width: int = 160) -> None:
    """Prints each prompt with its completion on one line of at most `width` characters of either, newlines escaped."""
    print(f"--- {title}")
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"  {_one_line(prompt, width)} >>> {_one_line(completion, width)}")


def held_out_metrics(values: Mapping[str, Any], *, loss: str) -> dict[str, Any]:
    """Of a measurement, the metric named `loss` and the rewards, as held_out/..."""
    names = {"held_out/loss": loss} | {f"held_out/{name}": name for name in values if name.startswith("rewards/")}
    return {new: values[old] for new, old in names.items()}


def print_accuracy(accuracy: float, pairs: int, where: Any) -> None:
    """Prints the accuracy on so many held-out pairs with its standard error, and where the results are."""
    error = (accuracy * (1 - accuracy) / pairs) ** 0.5
    print(f"held-out accuracy {accuracy:.3f} +- {error:.3f} over {pairs} pairs; {where}")


def _one_line(text: str, width: int) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 3] + "..."


def format_number(value: Any) -> str:
    """An integer or a text as it is, any other number with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float | np.floating | jax.Array) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of named cells as aligned plain text: a header, a rule, one line each. The first row names the columns.

    Raises:
      ValueError: when there are no rows, or one names other columns than the first.
    """
    if not rows:
        raise ValueError("table: no rows; expected at least one, which names the columns")
    header = list(rows[0])
    for index, row in enumerate(rows):
        if list(row) != header:
            raise ValueError(f"table: row {index} has columns {list(row)}; expected {header}, those of row 0")
    cells = [header] + [[format_number(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    # Text to the left, numbers to the right.
    left = [all(isinstance(row[name], str) for row in rows) for name in header]
    lines = [
        "  ".join(cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(line, widths, left)).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
