"""On which devices a script runs: its processes joined, one mesh over all of them, in effect while it works."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import actors
import checks
import jax
import survivors

from alignax import distributed, sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Processes and mesh: fields of a Config. What is left of the devices is its axis "data", for different rows."""

    coordinator: str | None = None
    """HOST:PORT of the first of several processes, a free port there; Cloud TPU, SLURM and Open MPI need none."""
    processes: int | None = None
    """How many processes there are, where the environment does not tell."""
    process: int | None = None
    """The number of this one, from 0."""
    fsdp: int = 1
    """Devices over which parameters and optimizer are spread; they take different rows, too."""
    tensor: int = 1
    """Devices over which each layer is split: heads, MLP and vocabulary."""
    sequence: int = 1
    """Devices over which the tokens of a row are spread."""
    expert: int = 1
    """Devices over which the experts of a mixture are spread."""


def make_mesh(config: Any) -> jax.sharding.Mesh:
    """The mesh that a Config asks for, over all devices of all processes but those that only sample.

    Raises:
      ValueError: for axes below 1, or that do not divide the devices.
    """
    checks.check_ranges(config, least=dict.fromkeys(sharding.AXES[1:], 1))
    axes = {name: getattr(config, name) for name in sharding.AXES[1:]}
    return sharding.make_mesh(actors.learners(config), data=-1, **axes)


def on_mesh(main: Callable) -> Callable[[Any], Any]:
    """Makes `main(config)` of `main(config, mesh)`: it joins the processes and makes the mesh.

    A mesh of several devices is in effect (`jax.set_mesh`). Of several processes only the first prints, and when one
    dies the others end with the exit code `survivors.PEER_LOST`.
    """

    @functools.wraps(main)
    def started(config: Any) -> Any:
        several = distributed.initialise(config.coordinator, config.processes, config.process)
        with survivors.watching() if several else contextlib.nullcontext(), _quiet(not distributed.is_first()):
            mesh = make_mesh(config)
            if mesh.size == 1:
                return main(config, mesh)
            with jax.set_mesh(mesh):
                return main(config, mesh)

    return started


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
