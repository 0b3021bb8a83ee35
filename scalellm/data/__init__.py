"""Text in, batches out: the token dataset on disk and the stream of batches with a cursor."""

from scalellm.data.batch import Batch, Cursor
from scalellm.data.mixed_stream import MixedStream
from scalellm.data.mixture import Mixture, Stage, shares
from scalellm.data.reader import TokenDataset
from scalellm.data.stream import TokenStream, evaluation_batches
from scalellm.data.writer import DatasetWriter

__all__ = [
    "Batch",
    "Cursor",
    "DatasetWriter",
    "MixedStream",
    "Mixture",
    "Stage",
    "TokenDataset",
    "TokenStream",
    "evaluation_batches",
    "shares",
]
