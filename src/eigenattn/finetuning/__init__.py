"""Winning back with a little training what compression lost."""

from .training import FinetuneConfig, FinetuneReport, finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]
