"""Hugging Face folders in and out."""

from alignax.io import hf as hf
