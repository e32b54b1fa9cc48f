"""What a program would take on TPUs that are not here: compiled ahead of time, its memory, work and traffic read.

    python experiments/compile_tpu.py --model llama-8b --algorithm grpo --topology v5e:8x8 --fsdp 64 --batch 64
    python experiments/compile_tpu.py --table experiments/tpu.md

`pip install -e ".[experiments,tpu-compile]"`, in an environment of its own: libtpu disturbs plain runs on a CPU. No TPU
is needed: the XLA in libtpu compiles on the host's CPU. What it prints is one device's share of one run: an update of
`batch` rows, or a rollout. Nothing runs, so no time is measured; see `tpu_chips.roofline` for the estimate.
"""

import os

# Before JAX is imported: the host has no TPU to ask for its place among others.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import dataclasses
import pathlib
import tempfile
import time
from typing import Literal, NamedTuple

import hlo
import hlo_costs
import jax
import launch
import tpu_chips
import tpu_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(launch.Options):
    """A program and the machine that it is for."""

    model: str = "llama-8b"
    """A name of `tpu_programs.MODELS`, a config.json, or a folder with one."""
    algorithm: Literal["sft", "dpo", "grpo", "decode"] = "sft"
    topology: str = "v5e:4x4"
    """Chip and shape, such as v5e:8x8, v5p:4x4x4 or v6e:16x16."""
    batch: int = 64
    """Rows of all devices: for DPO twice the pairs, for decoding the samples of all prompts."""
    length: int = 4096
    """Tokens of a row; for decoding, of a prompt."""
    microbatches: int = 1
    remat: str = "nothing"
    """What a block keeps for its backward pass: nothing, dots, none (all is kept), or names of models.remat."""
    group: int = 8
    """Samples of a prompt, when decoding."""
    new_tokens: int = 1024
    """Tokens of a sample, when decoding."""
    dump: str = ""
    """A folder for all that XLA has to say; the program's text goes there too."""
    largest: int = 5
    """How many collectives to print."""
    table: str = ""
    """Compiles what `tpu_table.py` lists instead, and writes this file."""
    kept: str = ""
    """A folder for what the table's cases gave: one that is in there is not compiled again."""


class Found(NamedTuple):
    """Of one device and one run."""

    seconds: float  # of processor time, that compiling took
    kinds: dict[str, int]  # bytes of what the program is given
    arguments: int
    temporaries: int
    results: int  # that lie in no argument's place
    costs: hlo_costs.Costs
    model_flops: float
    chip: tpu_chips.Chip

    @property
    def total(self) -> int:
        """Bytes at once, at most."""
        return self.arguments + self.temporaries + self.results

    @property
    def roofline(self) -> tpu_chips.Roofline:
        """Seconds by resource."""
        return tpu_chips.roofline(self.costs, self.chip)


def program(config: Config) -> tuple[tpu_programs.Program, jax.sharding.Mesh]:
    """What a Config asks for, and the mesh to compile it under."""
    axes = {field.name: getattr(config, field.name) for field in dataclasses.fields(launch.Options)}
    mesh = tpu_programs.make_mesh(config.topology, {name: axes[name] for name in axes if name in AXES})
    model = tpu_programs.config_of(config.model, config.remat)
    if config.algorithm == "decode":
        sizes = {"prompts": config.batch // config.group, "group": config.group, "new": config.new_tokens}
        return tpu_programs.decode(model, mesh, length=config.length, **sizes), mesh
    sizes = {"batch": config.batch, "length": config.length, "parts": config.microbatches}
    return tpu_programs.update(config.algorithm, model, mesh, **sizes), mesh


AXES = ("fsdp", "tensor", "sequence", "expert")


def measure(config: Config) -> Found:
    """Compiles a program and reads what it takes.

    Raises:
      jax.errors.JaxRuntimeError: by XLA, for a program that does not fit the chip's memory; it says by how much.
    """
    chip = tpu_chips.chip_of(config.topology)
    asked, mesh = program(config)
    with tpu_programs.on_tpu(mesh), tempfile.TemporaryDirectory() as temporary:
        lowered = asked.function.lower(*asked.arguments)
        start = time.process_time()
        dump = {"xla_dump_to": config.dump or temporary, "xla_dump_hlo_as_text": True} if config.dump else None
        compiled = lowered.compile(compiler_options=dump)
        seconds = time.process_time() - start
    text, sizes = compiled.as_text(), compiled.memory_analysis()
    if config.dump:
        (pathlib.Path(config.dump) / "program.txt").write_text(text)
    costs = hlo_costs.costs(hlo.parse(text), unknown=asked.rounds, kernel=tpu_chips.kernel_flops)
    return Found(
        seconds,
        asked.kinds,
        sizes.argument_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        costs,
        asked.model_flops / mesh.size,
        chip,
    )


def report(config: Config, found: Found) -> str:
    """All that was found, to be read."""
    times, giga, room = found.roofline, 1e9, found.chip.memory
    kinds = ", ".join(f"{name} {size / giga:.2f}" for name, size in found.kinds.items() if size)
    sent = found.costs.sent()
    lines = [
        f"{config.model} {config.algorithm} on {config.topology}, compiled in {found.seconds:.0f} s; of each device:",
        f"arguments     {found.arguments / giga:8.2f} GB: {kinds}",
        f"temporaries   {found.temporaries / giga:8.2f} GB",
        f"results       {found.results / giga:8.2f} GB beside the arguments that they replace",
        f"at once       {found.total / giga:8.2f} GB of {room / giga:.2f}: "
        + ("fits" if found.total <= room else "DOES NOT FIT"),
        f"FLOPs         {found.costs.flops / 1e12:8.2f} T, {found.model_flops / 1e12:.2f} T of them the model's",
        f"HBM           {found.costs.read_written / giga:8.2f} GB read and written",
        f"sent          {sum(sent.values()) / giga:8.2f} GB: "
        + ", ".join(f"{kind} {size / giga:.2f}" for kind, size in sent.items() if size),
        f"at least      {times.seconds:8.3f} s: compute {times.compute:.3f}, HBM {times.memory:.3f}, "
        f"interconnect {times.interconnect:.3f}; bound by {times.bound}",
        *(
            f"  {one.sent / giga:8.3f} GB {one.kind} of {one.devices}, {one.times:g} times: {_said(one.line)}"
            for one in found.costs.collectives[: config.largest]
        ),
    ]
    return "\n".join(lines)


def _said(line: str) -> str:
    shape = line.partition(" = ")[2].split("{")[0]
    return f"{shape} {line.partition('op_name=')[2].split(' ')[0][-110:]}"


def main(config: Config) -> None:
    """Prints what one program takes, or writes the table of all."""
    if config.table:
        import tpu_table

        kept = pathlib.Path(config.kept) if config.kept else None
        return tpu_table.write(pathlib.Path(config.table), kept, measure, Config)
    print(report(config, measure(config)))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
