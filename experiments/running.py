"""What a script's run is, beside its algorithm: where it runs, what it keeps, what it is watched for."""

import dataclasses

import launch
import watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options, watch.Options):
    """Fields of every script's Config."""
