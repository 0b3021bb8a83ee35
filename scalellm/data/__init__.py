"""Text in, batches out: the token dataset on disk and the stream of batches with a cursor."""

from scalellm.data.writer import DatasetWriter

__all__ = ["DatasetWriter"]
