"""The HTML report of a run and its plots."""

from rlhf_jax.reporting.report import write_report as write_report
