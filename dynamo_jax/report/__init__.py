"""Curves and tables of one or several runs, as one self-contained HTML file. No jax: it opens on any machine."""

from dynamo_jax.report.page import write_report

__all__ = ["write_report"]
