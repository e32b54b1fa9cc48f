"""Supervised objectives."""

from properties import LOGP, Properties, Row, tokenwise
from references import supervised as references

from alignax import losses


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "cross_entropy": Row(
            losses.cross_entropy,
            tokenwise(losses.cross_entropy, "logp"),
            references.cross_entropy,
            {"logp": LOGP},
        ),
    }
