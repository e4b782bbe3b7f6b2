"""Documents to chunks of text, each of one split: documents to train on, or documents that are held out."""

import functools
import math
import random
from typing import Iterable, Iterator, List, Tuple

from data.preparing.corpus import Document

__all__ = ["HELD_OUT", "TRAIN", "TextChunk", "split_into_chunks", "split_of"]

TRAIN, HELD_OUT = 0, 1
CHUNK_CHARACTERS = 1 << 22

TextChunk = Tuple[int, List[Document]]
"""a split, and documents of it"""


def split_into_chunks(documents: Iterable[Document], held_out: float, seed: int) -> Iterator[TextChunk]:
    """Documents of one split, of about CHUNK_CHARACTERS together."""
    chunks: List[List[Document]] = [[], []]
    characters = [0, 0]
    for document in documents:
        split = split_of(document.number, held_out, seed)
        chunks[split].append(document)
        characters[split] += sum(map(len, document.lines))
        if characters[split] >= CHUNK_CHARACTERS:
            yield split, chunks[split]
            chunks[split], characters[split] = [], 0
    for split, chunk in enumerate(chunks):
        if chunk:
            yield split, chunk


def split_of(number: int, share: float, seed: int) -> int:
    """HELD_OUT or TRAIN for a document: one of every 1/share is held out, so that few documents get their share too."""
    if not share:
        return TRAIN
    stratum = math.floor((number + 0.5) * share)
    return HELD_OUT if number == held_out_document(stratum, share, seed) else TRAIN


@functools.lru_cache(maxsize=1)
def held_out_document(stratum: int, share: float, seed: int) -> int:
    """The number of the document that is held out of a stratum, the documents of one 1/share; drawn at random."""
    first, end = [math.ceil(bound / share - 0.5) for bound in (stratum, stratum + 1)]
    return first + int(random.Random(f"held out {seed} {stratum}").random() * (end - first))
