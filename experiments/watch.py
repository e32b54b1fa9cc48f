"""What a run is watched for: fields of a Config, and what is said when a bound is crossed."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Bounds of a run's metrics: fields of a Config."""
