"""Trains a WordPiece vocabulary."""

from collections import Counter
from dataclasses import replace
from typing import Callable, Iterable, List, Tuple

from tokenizers import trainers

from data.errors import InputError
from data.tokenizer import NORMALIZATIONS, SPECIAL_TOKENS, Vocabulary, make_tokenizer

__all__ = ["train_vocab"]

MINIMUM_VOCAB_SIZE = 100
MOST_LETTERS = 1000
USUAL = Vocabulary([])


def train_vocab(
    read_texts: Callable[[], Iterable[List[str]]], vocab_size: int, rules: Vocabulary = USUAL
) -> Vocabulary:
    """A WordPiece vocabulary of at most `vocab_size` tokens, the five special ones first; the same for the same text.

    `read_texts` begins a pass over the text, in lists of lines; it is called twice. `rules` says how text is
    normalised. Raises InputError for too small a size.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        expected = f"at least {MINIMUM_VOCAB_SIZE}: the letters alone need as many"
        raise InputError(f"--vocab-size is {vocab_size}, expected {expected}")
    empty = replace(rules, tokens=list(SPECIAL_TOKENS))
    tokenizer, most = make_tokenizer(empty), (vocab_size - len(SPECIAL_TOKENS)) // 4
    # Scripts whose text keeps its accents may have more letters than Latin, such as Japanese.
    letters, inner = find_letters(read_texts(), empty, min(MOST_LETTERS, most) if rules.strips_accents else most)
    # The trainer numbers letters in the order of a hash table, which differs from run to run, and breaks ties between
    # equally frequent pairs by those numbers. Letters given as special tokens are numbered first, in this order.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*SPECIAL_TOKENS, *letters, *inner],
    )
    tokenizer.train_from_iterator(read_texts(), trainer)
    ids = tokenizer.get_vocab()
    return replace(rules, tokens=sorted(ids, key=lambda token: ids[token]))


def find_letters(texts: Iterable[List[str]], rules: Vocabulary, most: int) -> Tuple[List[str], List[str]]:
    """The most frequent characters after normalisation, sorted, and pieces ("##e") of those that occur inside words."""
    raw: Counter = Counter()
    letters: Counter = Counter()
    tokenizer, form = make_tokenizer(rules), NORMALIZATIONS[rules.normalization]
    for lines in texts:
        # NFC and NFKC make letters of several characters; the other rules go by single ones.
        raw.update(form().normalize_str("\n".join(lines)) if form else "".join(lines))
    for character, count in raw.items():
        for letter in tokenizer.normalizer.normalize_str(character).replace(" ", ""):
            letters[letter] += count
    kept = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:most])

    def occurs_inside(letter: str) -> bool:
        return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{letter}a"))) == 1

    return kept, ["##" + letter for letter in kept if occurs_inside(letter)]
