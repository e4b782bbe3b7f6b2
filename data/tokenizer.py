"""The WordPiece vocabulary and BERT's lower-case tokenizer: reading, training, writing, and encoding text fast.

Shape letters: T tokens in all.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import Callable, DefaultDict, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.errors import InputError
from data.files import replacing
from data.samples import token_dtype
from data.shards import ShardInfo

__all__ = ["SPECIAL_TOKENS", "TextEncoder", "Vocabulary", "find_vocab", "make_tokenizer", "read_vocab", "train_vocab"]
__all__ += ["vocab_sha256", "write_tokenizer_files", "write_vocab"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

MINIMUM_VOCAB_SIZE = 100
MOST_LETTERS = 1000
CACHE_BYTES = 64 << 20  # of one process
ONE_A_LINE = "expected one token a line"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, in the order of their ids, and how text is normalised before it is cut into them."""

    tokens: List[str]
    lowercase: bool = True
    strip_accents: Optional[bool] = None
    """None: as `lowercase` says."""
    chinese_characters: bool = True
    """Whether each Chinese character is a word of its own."""

    def __len__(self) -> int:
        return len(self.tokens)


def read_vocab(path: str) -> Vocabulary:
    """The vocabulary of a file with a token a line; a token's id is its place.

    Raises InputError that names the file and what is wrong: missing, not UTF-8, empty, an empty line or a token twice
    (their lines are named), one of the five special tokens missing, or no other tokens.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: the vocabulary cannot be read ({error.strerror}); {ONE_A_LINE}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; {ONE_A_LINE}")
    lines = text.split("\n")
    tokens = [line[:-1] if line.endswith("\r") else line for line in (lines if lines[-1] else lines[:-1])]
    if not tokens:
        raise InputError(f"{path}: the vocabulary is empty; {ONE_A_LINE}, such as bert-base-uncased's vocab.txt")
    first_line: Dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if not token:
            raise InputError(f"{path}: line {number} is empty; {ONE_A_LINE}, for its id is its line")
        if first_line.setdefault(token, number) != number:
            advice = "Use the vocabulary as it was published, or leave out --vocab to train one"
            repeated = f"line {number} repeats {token!r} of line {first_line[token]}"
            raise InputError(f"{path}: {repeated}; expected each token once. {advice}")
    missing = [token for token in SPECIAL_TOKENS if token not in first_line]
    if missing:
        expected = f"all of {' '.join(SPECIAL_TOKENS)}. Use a BERT vocabulary, or leave out --vocab to train one"
        lack = f"the vocabulary of {len(tokens)} tokens has no {', '.join(missing)}"
        raise InputError(f"{path}: {lack}; expected {expected}")
    if len(tokens) == len(SPECIAL_TOKENS):
        raise InputError(f"{path}: the vocabulary has no tokens but the special ones; expected WordPieces, one a line")
    return Vocabulary(tokens)


def find_vocab(vocab: Optional[str], shards: Sequence[ShardInfo], option: str = "--vocab") -> Tuple[Vocabulary, str]:
    """The shards' vocabulary and its path: the file `vocab`, or vocab.txt beside the first shard.

    Raises InputError when there is no such file, it is no vocabulary, or its hash is not that of the shards; NVIDIA's
    files do not say theirs. Messages say that `option` sets it.
    """
    path = vocab or os.path.join(os.path.dirname(shards[0].path), "vocab.txt")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file. Give {option}, the vocabulary that the samples were made with")
    vocabulary = read_vocab(path)
    own_hash = vocab_sha256(vocabulary.tokens)
    for shard in shards:
        if shard.vocab_sha256 not in ("", own_hash):
            hashes = f"its hash is {own_hash[:12]}, expected {shard.vocab_sha256[:12]}"
            raise InputError(
                f"{path}: is not the vocabulary that {shard.path} was made with: {hashes}. Give that one with {option}"
            )
    return vocabulary, path


def make_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """BERT's tokenizer, as transformers has it: the same ids for the same text, vocabulary and options."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=vocabulary.lowercase,
        strip_accents=vocabulary.strip_accents,
        handle_chinese_chars=vocabulary.chinese_characters,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def write_tokenizer_files(folder: str, vocabulary: Vocabulary, longest: int = 512) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json: what transformers' AutoTokenizer loads a folder from.

    `longest`: tokens that the model has positions for; the tokenizer cuts longer text off there when it is told to.
    """
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": vocabulary.lowercase,
        "strip_accents": vocabulary.strip_accents,
        "tokenize_chinese_chars": vocabulary.chinese_characters,
        "model_max_length": longest,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    contents = {
        "tokenizer.json": make_tokenizer(vocabulary).to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    write_vocab(os.path.join(folder, "vocab.txt"), vocabulary)
    for name, text in contents.items():
        write_text(os.path.join(folder, name), text)


def write_vocab(path: str, vocabulary: Vocabulary) -> None:
    """Writes a vocabulary's tokens, one a line."""
    write_text(path, "".join(f"{token}\n" for token in vocabulary.tokens))


def write_text(path: str, text: str) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def train_vocab(read_texts: Callable[[], Iterable[List[str]]], vocab_size: int) -> Vocabulary:
    """A WordPiece vocabulary of at most `vocab_size` tokens, the five special ones first; the same for the same text.

    `read_texts` begins a pass over the text, in lists of lines; it is called twice. Raises InputError for too small a
    size.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        expected = f"at least {MINIMUM_VOCAB_SIZE}: the letters alone need as many"
        raise InputError(f"--vocab-size is {vocab_size}, expected {expected}")
    tokenizer = make_tokenizer(Vocabulary(list(SPECIAL_TOKENS)))
    letters, inner = find_letters(read_texts(), tokenizer, min(MOST_LETTERS, (vocab_size - len(SPECIAL_TOKENS)) // 4))
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
    return Vocabulary(sorted(ids, key=lambda token: ids[token]))


def find_letters(texts: Iterable[List[str]], tokenizer: Tokenizer, most: int) -> Tuple[List[str], List[str]]:
    """The most frequent characters after normalisation, sorted, and pieces ("##e") of those that occur inside words."""
    raw: Counter = Counter()
    letters: Counter = Counter()
    for lines in texts:
        raw.update("".join(lines))
    for character, count in raw.items():
        for letter in tokenizer.normalizer.normalize_str(character).replace(" ", ""):
            letters[letter] += count
    kept = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:most])

    def occurs_inside(letter: str) -> bool:
        return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{letter}a"))) == 1

    return kept, ["##" + letter for letter in kept if occurs_inside(letter)]


class TextEncoder:
    """Encodes lines of text as `make_tokenizer` does, several times faster: each distinct word is tokenized once.

    That is exact because BERT's tokenizer never looks beyond a space. Special tokens in the text ("[MASK]") are plain
    text here: a corpus must not be able to mask or end a sample.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.tokenizer = make_tokenizer(vocabulary)
        self.tokenizer.encode_special_tokens = True
        self.dtype = token_dtype(len(vocabulary))
        self.forget()

    def forget(self) -> None:
        """Empties the cache."""
        self.known: DefaultDict[str, int] = defaultdict()
        self.known.default_factory = self.known.__len__
        self.cached_bytes = 0
        self.pieces = np.empty(0, self.dtype)
        self.piece_starts = np.zeros(1, np.int64)

    def encode(self, lines: Sequence[str]) -> Tuple[np.ndarray, np.ndarray]:
        """The token ids of all lines end to end, [T], and how many of them each line has, [len(lines)]."""
        if not lines:
            return np.empty(0, self.dtype), np.empty(0, np.int64)
        if self.cached_bytes > CACHE_BYTES:
            self.forget()
        old = len(self.known)
        text_words = " ".join(lines).split(" ")
        word_numbers = np.fromiter(map(self.known.__getitem__, text_words), np.int64, len(text_words))
        self.learn(list(islice(reversed(self.known), len(self.known) - old))[::-1])

        word_counts = np.fromiter((line.count(" ") + 1 for line in lines), np.int64, len(lines))
        starts = self.piece_starts[word_numbers]
        counts = self.piece_starts[word_numbers + 1] - starts
        ends = np.cumsum(counts)
        ids = self.pieces[np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])]
        return ids, np.add.reduceat(counts, np.cumsum(word_counts) - word_counts)

    def learn(self, new_words: List[str]) -> None:
        if not new_words:
            return
        encodings = self.tokenizer.encode_batch_fast(new_words, add_special_tokens=False)
        pieces = [encoding.ids for encoding in encodings]
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        flat = np.fromiter((number for word in pieces for number in word), self.dtype, int(counts.sum()))
        self.piece_starts = np.concatenate([self.piece_starts, self.piece_starts[-1] + np.cumsum(counts)])
        self.pieces = np.concatenate([self.pieces, flat])
        self.cached_bytes += sum(map(len, new_words)) + 200 * len(new_words)


def vocab_sha256(tokens: Sequence[str]) -> str:
    """The hash that ties shards to the vocabulary they were made with: of its tokens, one a line."""
    return hashlib.sha256("\n".join(tokens).encode("utf-8")).hexdigest()
