"""Rewards with the signature `reward(prompts, completions, **columns) -> list[float]`."""
