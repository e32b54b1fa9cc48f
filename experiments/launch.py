"""On which devices a script runs: its processes joined, one mesh over all of them, in effect while it works."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from alignax import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The mesh: fields of a Config. What is left of the devices is its axis "data", which takes different rows."""

    fsdp: int = 1
    """Devices over which parameters and optimizer are spread; they take different rows, too."""
    tensor: int = 1
    """Devices over which each layer is split: heads, MLP and vocabulary."""
    sequence: int = 1
    """Devices over which the tokens of a row are spread."""
    expert: int = 1
    """Devices over which the experts of a mixture are spread."""


def make_mesh(config: Any) -> jax.sharding.Mesh:
    """The mesh that a Config asks for, over all devices of all processes."""
    axes = {field.name: getattr(config, field.name) for field in dataclasses.fields(Options)}
    return sharding.make_mesh(data=-1, **axes)


def on_mesh(main: Callable) -> Callable[[Any], Any]:
    """Makes `main(config)` of `main(config, mesh)`; a mesh of several devices is in effect (`jax.set_mesh`)."""

    @functools.wraps(main)
    def started(config: Any) -> Any:
        mesh = make_mesh(config)
        if mesh.size == 1:
            return main(config, mesh)
        with jax.set_mesh(mesh):
            return main(config, mesh)

    return started
