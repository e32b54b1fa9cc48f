"""The table of `compile_tpu.py`: programs of several sizes, and one from 16 to 256 chips with the same rows on each."""

import json
import math
import pathlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import hlo_costs
import jax
import tpu_chips

SMALL = {"model": "llama-8b"}
LARGE = {"model": "llama-70b", "topology": "v5p:8x8x8"}
V5E, V5P = {**SMALL, "topology": "v5e:8x8"}, {**SMALL, "topology": "v5p:4x4x4"}
# Over fsdp alone XLA adds up whole matrices of gradients on every device: of 8 B on 64 chips 68 GB are sent, not 34.
SPLIT = {"fsdp": 16, "tensor": 4}
UPDATES = {"sft": 1, "dpo": 2, "grpo": 1}  # rows on each device: a pair is two
# Options of `compile_tpu.Config`; all that is not said is at its default.
CASES: tuple[dict[str, Any], ...] = (
    *({**V5E, "algorithm": name, **SPLIT, "batch": 64 * n, "length": 2048} for name, n in UPDATES.items()),
    {**V5E, "algorithm": "decode", "tensor": 8, "batch": 512, "length": 512, "new_tokens": 512},
    *({**V5P, "algorithm": name, **SPLIT, "batch": 64 * n, "length": 4096} for name, n in UPDATES.items()),
    {**V5P, "algorithm": "decode", "tensor": 8, "batch": 1024, "length": 1024, "new_tokens": 1024},
    *(
        {**LARGE, "algorithm": name, "fsdp": 128, "tensor": 4, "batch": 512 * n, "length": 4096}
        for name, n in UPDATES.items()
    ),
    {**LARGE, "algorithm": "decode", "tensor": 8, "batch": 1024, "length": 1024, "new_tokens": 1024},
)
GROWING = {16: "4x4", 64: "8x8", 256: "16x16"}
SCALING: tuple[dict[str, Any], ...] = tuple(
    {"model": "llama-8b", "topology": f"v5e:{shape}", "fsdp": chips // 4, "tensor": 4, "batch": chips, "length": 2048}
    for chips, shape in GROWING.items()
)
HEAD = """# Programs compiled for TPUs that were not there

Written by `python experiments/compile_tpu.py --table experiments/tpu.md` with jax {jax} and libtpu {libtpu}. Nothing
here was run. All figures are of one device and one run: of an update of all rows, or of a rollout. Masters and AdamW's
moments are float32, products bfloat16, the reference is bfloat16 and read in the step, blocks keep nothing for their
backward pass, and attention is splash. GB are 10^9 bytes.

- *at once*: arguments (*state*: parameters, optimizer, reference; *batch*), temporaries and what is returned, by XLA's
  own account (`memory_analysis`); *room* is the chip's.
- *TFLOP*: of all products in the device's program, loops counted in full; *model*: 6 (with a reference 8) times
  parameters times tokens, and attention, over the devices. The difference is recomputation and what is done twice.
- *sent*: bytes that leave a device, by rings. *at least*: the roofline of `tpu_chips.py`: the resource that takes
  longest, all three at full speed and overlapped. *compile*: seconds of processor time.
"""
COLUMNS = (
    *("model", "program", "chips", "mesh", "rows", "tokens", "state", "temporaries", "at once", "room"),
    *("TFLOP", "model", "HBM GB", "gather", "reduce", "scatter", "exchange", "permute"),
    *("compute s", "HBM s", "links s", "at least s", "bound by", "compile s"),
)


def write(path: pathlib.Path, kept: pathlib.Path | None, measure: Callable, make: Callable) -> None:
    """Compiles every case and writes the table.

    Args:
      path: of the Markdown file.
      kept: a folder with what was found before, which is not compiled again.
      measure: `compile_tpu.measure`.
      make: `compile_tpu.Config`.
    """
    rows = {name: [_row(make(**case), _found(case, kept, measure, make)) for case in cases] for name, cases in PARTS}
    versions = {name: version(name) for name in ("jax", "libtpu")}
    text = [HEAD.format(**versions)]
    for name, lines in rows.items():
        text += [f"## {name}\n", _line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, lines), ""]
    path.write_text("\n".join(text))


PARTS = (("Programs", CASES), ("From 16 to 256 chips, one row of SFT on each", SCALING))


def _found(case: dict[str, Any], kept: pathlib.Path | None, measure: Callable, make: Callable) -> dict[str, Any]:
    """What `measure` finds, as plain numbers; nothing for a program that does not fit."""
    name = "-".join(str(value) for value in case.values()).replace(":", "-")
    file = None if kept is None else kept / f"{name}.json"
    if file is not None and file.exists():
        return json.loads(file.read_text())
    print(f"compiling {name}", flush=True)
    try:
        found = plain(measure(make(**case)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit: {error}", flush=True)
        return {}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return found


def plain(found: Any) -> dict[str, Any]:
    """A `compile_tpu.Found` as numbers by name."""
    return {
        "seconds": found.seconds,
        "kinds": found.kinds,
        "arguments": found.arguments,
        "temporaries": found.temporaries,
        "total": found.total,
        "model_flops": found.model_flops,
        "flops": found.costs.flops,
        "read_written": found.costs.read_written,
        "sent": found.costs.sent(),
    }


def _row(config: Any, found: dict[str, Any]) -> list[str]:
    axes = {name: getattr(config, name) for name in ("fsdp", "tensor", "sequence", "expert")}
    axes = {"data": _chips(config.topology) // math.prod(axes.values()), **axes}
    mesh = ", ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    rows = f"{config.batch} ({config.group} of a prompt)" if config.algorithm == "decode" else str(config.batch)
    tokens = f"{config.length} + {config.new_tokens}" if config.algorithm == "decode" else str(config.length)
    cells = [config.model, config.algorithm, config.topology, mesh, rows, tokens]
    return cells + (_figures(tpu_chips.chip_of(config.topology), found) if found else ["does not fit"])


def _figures(chip: tpu_chips.Chip, found: dict[str, Any]) -> list[str]:
    giga, sent = 1e9, [found["sent"][kind] for kind in hlo_costs.COLLECTIVES]
    times = tpu_chips.times(chip, flops=found["flops"], moved=found["read_written"], sent=sum(sent))
    sizes = sum(found["kinds"].values()), found["temporaries"], found["total"], chip.memory
    return [
        *(f"{size / giga:.2f}" for size in sizes),
        *(f"{x / 1e12:.1f}" for x in (found["flops"], found["model_flops"])),
        f"{found['read_written'] / giga:.0f}",
        *(f"{x / giga:.2f}" for x in sent),
        *(f"{x:.3f}" for x in (*times, times.seconds)),
        *(times.bound, f"{found['seconds']:.0f}"),
    ]


def _chips(topology: str) -> int:
    return math.prod(int(size) for size in topology.split(":")[1].split("x"))


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
