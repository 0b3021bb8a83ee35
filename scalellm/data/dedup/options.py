"""What counts as a duplicate, and what the search for them may cost."""

from __future__ import annotations

from pathlib import Path

from scalellm.config.section import Section, setting

# A pair exactly at the threshold meets in at least one band with at least this probability.
_MET_AT_THRESHOLD = 0.95


class DedupOptions(Section):
    """Exact and near duplicate removal.

    The default threshold is 0.72, not 0.8, since what is compared with it is an estimate: of 128
    hashes, Bin(128, J) agree. A pair at Jaccard 0.8 then agrees in 102 +- 4.5 and 0.72 asks for
    93, which 98.6% of such pairs reach; 99.8% of them meet in one of the 21 bands of 6 hashes. A
    pair at 0.6 (77 +- 5.5) gets there in 0.2% of the cases, one at 0.5 in none of a million. A
    pair exactly at the threshold is found about every second time.
    """

    exact: bool = setting(True, "remove documents that differ at most in whitespace")
    near: bool = setting(True, "remove documents that share most of their word n-grams")
    threshold: float = setting(
        0.72, "estimated Jaccard similarity from which documents are duplicates", ge=0.3, le=1
    )
    ngram: int = setting(5, "words of one shingle", unit="words", ge=1, le=32)
    num_hashes: int = setting(128, "length of a MinHash signature", unit="hashes", ge=16, le=1024)
    memory_bytes: int = setting(
        2**30, "most memory of the search's arrays", unit="bytes", ge=2**24, le=2**50
    )
    index: Path | None = setting(
        None, "folder of fingerprints of earlier runs, to compare with and to add to; null: none"
    )

    @property
    def band_hashes(self) -> int:
        """Hashes of one band: as many as find pairs at the threshold with 95% probability.

        Longer bands let fewer pairs below the threshold through to be compared.
        """
        fits = [size for size in range(1, self.num_hashes + 1) if self._met(size)]
        return max(fits, default=1)

    @property
    def num_bands(self) -> int:
        return self.num_hashes // self.band_hashes

    def _met(self, band_hashes: int) -> bool:
        missed = (1 - self.threshold**band_hashes) ** (self.num_hashes // band_hashes)
        return 1 - missed >= _MET_AT_THRESHOLD
