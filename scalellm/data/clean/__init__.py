"""Cleaning of texts before the tokenizer: stages with thresholds, presets and a report."""

from scalellm.data.clean.cleaner import Cleaned, Cleaner
from scalellm.data.clean.options import CleanOptions, load_clean_options
from scalellm.data.clean.report import CleanReport

__all__ = ["CleanOptions", "CleanReport", "Cleaned", "Cleaner", "load_clean_options"]
