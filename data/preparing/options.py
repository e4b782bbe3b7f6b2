"""The options of `data.prepare`."""

import os
from dataclasses import dataclass
from typing import List, Optional

from data.commands import check_options, option
from data.errors import InputError
from data.masking import CHOICES
from data.preparing.corpus import FORMATS, TEXT
from data.preparing.formats import AUTO
from data.preparing.shares import is_share
from data.preparing.text_file import UTF_8, check_encoding
from data.tokenizer import NORMALIZATIONS

__all__ = ["PrepareOptions"]


@dataclass
class PrepareOptions:
    """Makes a BERT pre-training data set from text: HDF5 shards of masked samples, with their vocabulary."""

    input: List[str]
    """text files, plain, .gz or .zst; folders of them, or globs in quotes; also URLs, such as s3://bucket/corpus/*.txt,
    gs://, hf:// or https://, with fsspec and the package of the protocol; or the word `python` for the English prose
    that every Python brings. Of a folder it takes names without an ending, .txt, .text, .md, .jsonl, .ndjson, .csv,
    .tsv and .parquet, also in subfolders, and says what it leaves out. A document never goes on in the next file"""
    output: str
    """the folder to make; one that holds a data set is refused"""
    format: str = option(AUTO, choices=(AUTO, *FORMATS))
    """auto: by each file's name (.jsonl, .ndjson, .csv, .tsv, .parquet), or by its first lines (jsonl, wikiextractor,
    wikitext, else lines). lines: one sentence or paragraph a line, a blank line ends a document. wikitext: a
    `= Title =` line between blank lines begins a document; headings stay as lines, without their = signs, and text
    before the first title is a document. wikiextractor: what is between <doc ...> and </doc> is a document, as
    WikiExtractor writes it. jsonl: a JSON object a line, its field `text` a document. csv: each row's column `text` is
    a document; the first line names the columns, which commas, semicolons or tabs separate, and fields may be in double
    quotes. tsv: the same with tabs, a quote being text. parquet: the same with pyarrow. In the last five, blank lines
    within a document are left out"""
    text_field: str = option(TEXT, metavar="NAME")
    """the field or column of jsonl, csv, tsv and parquet that holds the text"""
    encoding: str = option(UTF_8, metavar="NAME")
    """of text files, such as shift_jis, euc_kr, cp1254, utf-16-le: any that Python has. A mark of UTF-16 or UTF-32 at a
    file's beginning is recognised"""
    vocab: Optional[str] = None
    """the WordPiece vocabulary: a vocab.txt, a tokenizer.json, or a folder with them, as transformers has them, whose
    tokenizer_config.json is heeded; without it one is trained on the text"""
    vocab_size: int = 30522
    """the most tokens of a vocabulary that is trained"""
    lowercase: Optional[bool] = option(None, off="--cased")
    """lower-case the text (default: as the vocabulary's own files say, else lower-case). In any language I becomes i
    and İ an i with a dot above, which --strip-accents removes: Turkish ı and i are not told apart in capitals"""
    strip_accents: Optional[bool] = option(None, off="--keep-accents")
    """remove accents and all other combining marks, such as Hindi's vowel signs and the marks that tell パ from ハ
    (default: as the vocabulary's own files say, else as with --lowercase)"""
    chinese_characters: Optional[bool] = option(None, off="--no-chinese-characters")
    """make each Chinese character a word of its own, also kanji (default: as the vocabulary's own files say, else
    true)"""
    normalization: Optional[str] = option(None, choices=NORMALIZATIONS)
    """the Unicode normal form to bring the text into first: nfc, nfkc (which also makes half-width letters whole) or
    none (default: as the vocabulary's own files say, else none)"""
    sequence_length: int = option(128, lambda length: 8 <= length <= 65535, "8 to 65535 tokens")
    """tokens of a sample, with [CLS] and [SEP]"""
    mask_tokens: int = 20
    """the most tokens of a sample to mask; 76 go with length 512"""
    mask_share: float = option(0.15, lambda share: 0 < share < 1, "a share between 0 and 1, such as 0.15")
    """share of a sample's tokens to mask"""
    masking: str = option("static", choices=("static", "dynamic"))
    """static: samples are masked here, once. dynamic: the loader masks them, differently in each epoch"""
    masked_units: str = option("tokens", choices=CHOICES)
    """what is masked together: single tokens, or all tokens of a word"""
    whole_word_masking: bool = False
    """short for --masked-units words"""
    nsp: bool = True
    """whether a sample is two segments, for next sentence prediction, or one"""
    short_share: float = option(0.1, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    """share of the samples that are cut shorter at random"""
    duplicates: int = option(1, lambda count: count >= 1, "1 or more")
    """how many times to go over the training text, each time cut and masked anew"""
    held_out: float = option(0.0, lambda share: 0 <= share < 1, "a share of documents from 0 to below 1, such as 0.05")
    """share of the documents that go to held_out-*.h5 instead, for evaluation"""
    samples_per_shard: int = option(262144, lambda count: count >= 1, "1 or more")
    """about how many samples a shard holds; each process holds one shard in memory"""
    seed: int = option(42, lambda seed: seed >= 0, "0 or more")
    """seed of every random choice"""
    workers: Optional[int] = option(None, lambda count: count >= 1, "1 or more processes")
    """processes that make samples (default: one for every core)"""
    part: Optional[str] = option(None, is_share, "K/N with K from 1 to N, such as 3/16", metavar="K/N")
    """make the K-th of N parts, in the output folder, which all machines share; in any order, at any time. Each reads
    all of the text and does 1/N of the rest. It needs --vocab"""
    finish: Optional[int] = option(None, lambda count: count >= 1, "the number of parts, 1 or more")
    """check and join the N parts that were made with the same options, to what one machine makes"""
    vocab_only: bool = False
    """train the vocabulary, write it to vocab.txt in the output folder, and stop"""

    def check(self) -> None:
        """Raises InputError that names the first option that cannot be used."""
        check_options(self)
        check_encoding(self.encoding)
        special, names = (3, "[CLS] and two [SEP]") if self.nsp else (2, "[CLS] and [SEP]")
        most = self.sequence_length - special
        if not 1 <= self.mask_tokens <= most:
            raise InputError(
                f"--mask-tokens is {self.mask_tokens}, expected 1 to {most}: the sequence length less {names}"
            )
        if self.whole_word_masking and self.masked_units not in ("tokens", "words"):
            raise InputError(f"--masked-units is {self.masked_units}, expected words: --whole-word-masking is given")
        self.check_step()

    def check_step(self) -> None:
        steps = [f"--{name}" for name in ("part", "finish") if getattr(self, name)] + ["--vocab-only"] * self.vocab_only
        if len(steps) > 1:
            raise InputError(f"{' and '.join(steps)} are given, expected one of them: they follow each other")
        if self.vocab_only and self.vocab:
            raise InputError("--vocab-only and --vocab are given, expected one of them: there is nothing to train")
        if steps and not self.vocab_only and not self.vocab:
            raise InputError(
                f"{steps[0]} needs --vocab: a vocabulary is trained on all of the text, not on a part. Use one that is "
                "there, or train it first, with `python -m data.prepare --vocab-only --input ... --output "
                f"{self.output}`, and give --vocab {os.path.join(self.output, 'vocab.txt')}"
            )

    @property
    def units(self) -> str:
        """What is masked together, by its name in data.masking.CHOICES."""
        return "words" if self.whole_word_masking else self.masked_units
