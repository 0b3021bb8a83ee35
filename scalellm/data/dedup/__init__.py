"""Exact and near duplicate removal, on disk in bounded memory, within a run and across runs."""

from scalellm.data.dedup.deduplicator import Deduplicator, Duplicates
from scalellm.data.dedup.fingerprint import Fingerprints, fingerprints
from scalellm.data.dedup.options import DedupOptions

__all__ = ["DedupOptions", "Deduplicator", "Duplicates", "Fingerprints", "fingerprints"]
