"""Text in, batches out: the token dataset on disk and the stream of batches with a cursor."""

from scalellm.data.batch import Batch, Cursor
from scalellm.data.reader import TokenDataset
from scalellm.data.stream import TokenStream, evaluation_batches
from scalellm.data.writer import DatasetWriter

__all__ = ["Batch", "Cursor", "DatasetWriter", "TokenDataset", "TokenStream", "evaluation_batches"]
