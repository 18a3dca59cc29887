"""Looking up rows of a QArray: embeddings."""

from ._api import gather as gather, take as take
