"""The WordPiece vocabulary and how text becomes its tokens: reading, writing, and encoding text fast.

A vocabulary is its tokens and the rules by which text is normalised before it is cut into them: those of BERT's
tokenizer, with its options, or those of a tokenizer.json that is taken as it is.

Shape letters: T tokens in all.
"""

import hashlib
import json
import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Callable, DefaultDict, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data.errors import InputError
from data.files import read_json, replacing
from data.samples import token_dtype
from data.shards import ShardInfo

__all__ = ["FLAGS", "NORMALIZATIONS", "SPECIAL_TOKENS", "Claims", "TextEncoder", "Vocabulary", "altered_characters"]
__all__ += [
    "claims_of",
    "claims_of_rules",
    "find_vocab",
    "flag_of",
    "make_tokenizer",
    "read_vocab",
    "rules_in_words",
    "text_in_words",
    "vocab_sha256",
    "with_rules",
]
__all__ += ["write_tokenizer_files"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NORMALIZATIONS = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "none": None}
# What options say, and what it does in words.
RULES: Dict[str, Dict[Any, str]] = {
    "lowercase": {True: "lower-case", False: "cased"},
    "strip_accents": {True: "accents stripped", False: "accents kept"},
    "chinese_characters": {True: "Chinese characters apart", False: "Chinese characters not apart"},
    "normalization": {"nfc": "NFC", "nfkc": "NFKC", "none": "no NFC or NFKC"},
}
FLAGS = {
    "lowercase": ("--cased", "--lowercase"),
    "strip_accents": ("--keep-accents", "--strip-accents"),
    "chinese_characters": ("--no-chinese-characters", "--chinese-characters"),
}
VOCAB_TXT, TOKENIZER_JSON, CONFIG_JSON = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
# Classes of transformers that tokenize as BERT's does.
CLASSES = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "LayoutLM", "Lxmert")
MOST_ALTERED = 0.01  # of a text's characters
MOST_UNREACHABLE = 0.01  # of a vocabulary's words; bert-base-chinese's kana with voicing marks are fewer

CACHE_BYTES = 64 << 20  # of one process
ONE_A_LINE = "expected one token a line"

Claims = Dict[str, Tuple[str, Any]]
"""How text is normalised, as far as somebody says: name of a rule -> (who says so, the value)."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, in the order of their ids, and how text is normalised before it is cut into them.

    As in BERT's own tokenizer control characters are removed, and words end at white space and punctuation.
    """

    tokens: List[str]
    lowercase: bool = True
    strip_accents: Optional[bool] = None
    """Whether combining marks are removed, which are vowel signs in some scripts; None: as `lowercase` says."""
    chinese_characters: bool = True
    """Whether each Chinese character is a word of its own."""
    normalization: str = "none"
    """The Unicode normal form that text is brought into before: nfc, nfkc or none."""
    tokenizer_json: str = ""
    """A tokenizer.json that is taken as it is, for it is not BERT's; then the options above mean nothing."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def strips_accents(self) -> bool:
        return self.lowercase if self.strip_accents is None else self.strip_accents

    @property
    def prefix(self) -> str:
        """What a token that continues a word begins with."""
        return json.loads(self.tokenizer_json)["model"]["continuing_subword_prefix"] if self.tokenizer_json else "##"

    @property
    def rules(self) -> str:
        """JSON that is the same for vocabularies whose tokenizers differ in their tokens alone."""
        if self.tokenizer_json:
            return json.dumps({TOKENIZER_JSON: hash_of_rules(json.loads(self.tokenizer_json))})
        return json.dumps({**{name: getattr(self, name) for name in RULES}, "strip_accents": self.strips_accents})

    def in_words(self) -> str:
        """How text is normalised, for people."""
        return rules_in_words(self.rules)


def rules_in_words(rules: str) -> str:
    """`Vocabulary.rules` for people: "lower-case, accents stripped"."""
    values = json.loads(rules)
    if TOKENIZER_JSON in values:
        return f"as a {TOKENIZER_JSON} says (hash {values[TOKENIZER_JSON][:12]})"
    usual = {"chinese_characters": True, "normalization": "none"}
    return ", ".join(RULES[name][value] for name, value in values.items() if usual.get(name) != value)


def hash_of_rules(contents: Dict[str, Any]) -> str:
    """Of what decides in a tokenizer.json, beside its tokens, which ids a text gets."""
    model = {name: value for name, value in contents["model"].items() if name not in ("type", "vocab")}
    added = [token for token in contents.get("added_tokens") or [] if token["content"] not in SPECIAL_TOKENS]
    rules = [contents.get("normalizer"), contents.get("pre_tokenizer"), model, added]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode("utf-8")).hexdigest()


def flag_of(name: str, value: Any) -> str:
    """How a rule is given on the command line of data.prepare and data.convert."""
    return FLAGS[name][value] if name in FLAGS else f"--{name} {value}"


def claims_of(options: Any, flag: Callable[[str, Any], str] = flag_of) -> Claims:
    """What options say: the rules that `options` has set. `flag` names a rule and its value as users gave it."""
    values = {name: getattr(options, name) for name in RULES}
    return {name: (flag(name, value), value) for name, value in values.items() if value is not None}


def claims_of_rules(rules: str, who: str) -> Claims:
    """What `Vocabulary.rules` say; nothing where they are a tokenizer.json's."""
    return {name: (who, value) for name, value in json.loads(rules).items() if name in RULES}


def read_vocab(path: str, claims: Sequence[Claims] = (), strict: bool = False) -> Vocabulary:
    """The vocabulary of a vocab.txt (a token a line; its id is its place), a tokenizer.json, or a folder with them.

    How text is normalised is what tokenizer_config.json and tokenizer.json say, which may be beside a vocab.txt, and
    what `claims` say; what nobody says is as in BERT: lower-case, without accents. With `strict` a vocabulary that
    this default does not fit is refused.

    Raises InputError that names the file and what is wrong: missing, not UTF-8, empty, an empty line or a token twice
    (their lines are named), one of the five special tokens missing, no other tokens, no WordPiece; and both sources
    where two say different things.
    """
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    siblings = name in ("", VOCAB_TXT, TOKENIZER_JSON)
    files = {own: os.path.join(folder, own) for own in (VOCAB_TXT, TOKENIZER_JSON, CONFIG_JSON)} if siblings else {}
    files = {own: file for own, file in files.items() if os.path.exists(file)}
    if name not in files and name:
        files[TOKENIZER_JSON if name.endswith(".json") else VOCAB_TXT] = path
    if not files.keys() & {VOCAB_TXT, TOKENIZER_JSON}:
        raise InputError(f"{path}: has neither {VOCAB_TXT} nor {TOKENIZER_JSON}; expected one of them")
    said = list(claims)
    if CONFIG_JSON in files:
        said.append(read_config(files[CONFIG_JSON], TOKENIZER_JSON in files))
    tokens = read_tokens(files[VOCAB_TXT]) if VOCAB_TXT in files else []
    if TOKENIZER_JSON in files:
        vocabulary, own = read_tokenizer_json(files[TOKENIZER_JSON])
        if tokens != vocabulary.tokens[: len(tokens)]:
            advice = "Remove the one that does not belong there"
            raise InputError(f"{files[VOCAB_TXT]}: has other tokens than {files[TOKENIZER_JSON]} beside it. {advice}")
        if vocabulary.tokenizer_json:
            check_nothing_claimed(files[TOKENIZER_JSON], claims)
            return vocabulary
        tokens = vocabulary.tokens
        said.append(own)
    rules = agreed(said)
    vocabulary = with_rules(tokens, rules)
    if strict and "lowercase" not in rules:
        check_reachable(files.get(VOCAB_TXT, path), vocabulary)
    return vocabulary


def with_rules(tokens: List[str], rules: Mapping[str, Any]) -> Vocabulary:
    vocabulary = Vocabulary(tokens, **rules)
    return replace(vocabulary, strip_accents=None) if vocabulary.strip_accents == vocabulary.lowercase else vocabulary


def agreed(said: Sequence[Claims]) -> Dict[str, Any]:
    """What all that is said comes to. Raises InputError that names two who say different things."""
    found: Claims = {}
    for name, (who, value) in ((name, claim) for claims in said for name, claim in claims.items()):
        first, other = found.setdefault(name, (who, value))
        if other != value:
            raise InputError(
                f"{first} says {RULES[name][other]}, {who} says {RULES[name][value]}; expected the same of both. "
                "Text has to be normalised alike everywhere: leave out the option, or name another file"
            )
    return {name: value for name, (_, value) in found.items()}


def check_nothing_claimed(path: str, claims: Sequence[Claims]) -> None:
    for who, _ in (claim for said in claims for claim in said.values()):
        raise InputError(
            f"{path}: is taken as it is, for its rules are not those of BERT's tokenizer, but {who} says how text is "
            "normalised. Leave that out, or take a vocab.txt"
        )


def read_tokens(path: str) -> List[str]:
    """The tokens of a vocab.txt."""
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
    check_tokens(path, tokens)
    return tokens


def check_tokens(path: str, tokens: Sequence[str]) -> None:
    there = set(tokens)
    missing = [token for token in SPECIAL_TOKENS if token not in there]
    if missing:
        expected = f"all of {' '.join(SPECIAL_TOKENS)}. Use a BERT vocabulary, or leave out --vocab to train one"
        lack = f"the vocabulary of {len(tokens)} tokens has no {', '.join(missing)}"
        raise InputError(f"{path}: {lack}; expected {expected}")
    if any("\n" in token for token in tokens):
        raise InputError(f"{path}: a token has a line break, which no vocab.txt can hold; expected none")
    if len(tokens) == len(SPECIAL_TOKENS):
        raise InputError(f"{path}: the vocabulary has no tokens but the special ones; expected WordPieces, one a line")


def read_config(path: str, has_json: bool) -> Claims:
    """What a tokenizer_config.json says. Without a tokenizer.json beside it, its tokenizer has to be BERT's."""
    contents = read_json(path)
    kind = contents.get("tokenizer_class") or "BertTokenizer"
    own = kind.replace("TokenizerFast", "").replace("Tokenizer", "")
    if not has_json and own not in CLASSES:
        raise InputError(
            f"{path}: tokenizer_class is {kind}, expected BertTokenizer, or a {TOKENIZER_JSON} of WordPieces beside it"
        )
    names = {"lowercase": "do_lower_case", "strip_accents": "strip_accents"}
    names["chinese_characters"] = "tokenize_chinese_chars"
    said = {name: (f"{path} ({key})", contents[key]) for name, key in names.items() if key in contents}
    who, strips = said.pop("strip_accents", ("", None))
    if strips is None and who and "lowercase" in said:
        strips = said["lowercase"][1]
    return said if strips is None else {**said, "strip_accents": (who, strips)}


def read_tokenizer_json(path: str) -> Tuple[Vocabulary, Claims]:
    """The vocabulary of a tokenizer.json, and what it says of the rules where they are BERT's."""
    contents = read_json(path)
    model = contents.get("model") or {}
    kind = model.get("type", "WordPiece" if "continuing_subword_prefix" in model else "unknown")
    expected = "a tokenizer.json of WordPieces, as BERT has it, or a vocab.txt"
    if kind != "WordPiece":
        raise InputError(f"{path}: its model is {kind}, expected WordPiece: {expected}")
    added = contents.get("added_tokens") or []
    ids = {**(model.get("vocab") or {}), **{token["content"]: token["id"] for token in added}}
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"{path}: the ids of its {len(tokens)} tokens are not 0 to {len(tokens) - 1}; expected each")
    check_tokens(path, tokens)
    if model.get("unk_token") != "[UNK]":
        raise InputError(f"{path}: model.unk_token is {model.get('unk_token')!r}, expected '[UNK]'")
    if not model.get("continuing_subword_prefix"):
        raise InputError(f"{path}: model.continuing_subword_prefix is empty, expected a prefix, such as '##'")
    contents.update(truncation=None, padding=None)  # which transformers sets for each call anew
    as_it_is = Vocabulary(tokens, tokenizer_json=json.dumps(contents, ensure_ascii=False))
    rules = bert_rules(contents)
    if rules is None:
        try:
            make_tokenizer(as_it_is)
        except Exception as error:  # the library raises no narrower one
            raise InputError(f"{path}: cannot be read ({error}); expected {expected}")
        return as_it_is, {}
    return with_rules(tokens, rules), {name: (path, value) for name, value in rules.items()}


def bert_rules(contents: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The rules of a tokenizer.json where options can say them all; None where it has to be taken as it is."""
    normalizer, form = contents.get("normalizer") or {}, "none"
    parts = normalizer.get("normalizers") or []
    if normalizer.get("type") == "Sequence" and len(parts) == 2 and parts[0]["type"].lower() in NORMALIZATIONS:
        form, normalizer = parts[0]["type"].lower(), parts[1]
    if normalizer.get("type") != "BertNormalizer":
        return None
    lowercase, strips = normalizer.get("lowercase", True), normalizer.get("strip_accents")
    rules = {
        "lowercase": lowercase,
        "strip_accents": lowercase if strips is None else strips,
        "chinese_characters": normalizer.get("handle_chinese_chars", True),
        "normalization": form,
    }
    made = json.loads(make_tokenizer(with_rules(list(SPECIAL_TOKENS), rules)).to_str())
    plain = {token["content"]: {**token, "id": 0} for token in made["added_tokens"]}
    alike = all(plain.get(token["content"]) == {**token, "id": 0} for token in contents.get("added_tokens") or [])
    model = {**contents["model"], "type": "WordPiece", "vocab": made["model"]["vocab"]}
    same = alike and normalizer.get("clean_text", True) and model == made["model"]
    return rules if same and contents.get("pre_tokenizer") == made["pre_tokenizer"] else None


def check_reachable(path: str, vocabulary: Vocabulary) -> None:
    """Raises InputError where more than MOST_UNREACHABLE of the words cannot occur in text that is normalised so."""
    words = [token for token in vocabulary.tokens if not (token.startswith("[") and token.endswith("]"))]
    words = [word[2:] if word.startswith("##") and len(word) > 2 else word for word in words]

    def lost(**changes: Any) -> List[str]:
        normalize = make_tokenizer(replace(vocabulary, **changes)).normalizer.normalize_str
        return [word for word in words if normalize(word).strip() != word]

    unreachable, most = lost(), MOST_UNREACHABLE * len(words)
    if len(unreachable) > most:
        ways = (("--no-chinese-characters", "chinese_characters"), ("--keep-accents", "strip_accents"))
        advice = next((flag for flag, name in ways if len(lost(**{name: False})) <= most), "--cased")
        examples = ", ".join(unreachable[:: max(1, len(unreachable) // 5)][:5])
        unsaid = f"where neither options nor a {CONFIG_JSON} beside the vocabulary say how text is normalised"
        raise InputError(
            f"{path}: {len(unreachable):,} of its {len(words):,} words cannot occur in text that is "
            f"{vocabulary.in_words()} ({examples}); expected at most {100 * MOST_UNREACHABLE:g} % of them, {unsaid}. "
            f"Add {advice}, which suits them, or --lowercase to do it all the same"
        )


def find_vocab(
    vocab: Optional[str],
    shards: Sequence[ShardInfo],
    option: str = "--vocab",
    claims: Optional[Claims] = None,
    strict: bool = False,
) -> Tuple[Vocabulary, str]:
    """The shards' vocabulary and its path: `vocab`, or vocab.txt beside the first shard.

    `claims` and `strict` are for `read_vocab`, which hears what the shards say, too. Raises InputError when there is no
    such file, it is no vocabulary, or its tokens or rules are not those of the shards; files of others do not say
    theirs. Messages say that `option` sets it.
    """
    path = vocab or os.path.join(os.path.dirname(shards[0].path), VOCAB_TXT)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file. Give {option}, the vocabulary that the samples were made with")
    said = [claims or {}]
    for shard in {shard.tokenizer: shard for shard in reversed(shards) if shard.tokenizer}.values():
        said.append(claims_of_rules(shard.tokenizer, shard.path))
    vocabulary = read_vocab(path, said, strict)
    own_hash = vocab_sha256(vocabulary.tokens)
    for shard in shards:
        if shard.vocab_sha256 not in ("", own_hash):
            hashes = f"its hash is {own_hash[:12]}, expected {shard.vocab_sha256[:12]}"
            raise InputError(
                f"{path}: is not the vocabulary that {shard.path} was made with: {hashes}. Give that one with {option}"
            )
        if shard.tokenizer not in ("", vocabulary.rules):
            differs = f"text is {vocabulary.in_words()}, expected {rules_in_words(shard.tokenizer)}"
            raise InputError(
                f"{path}: is not the tokenizer that {shard.path} was made with: {differs}. Give that one with {option}"
            )
    return vocabulary, path


def make_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer as transformers has it: the same ids for the same text, vocabulary and rules."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    special = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    if vocabulary.tokenizer_json:
        tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json)
        tokenizer.post_processor = tokenizer.post_processor or special  # models learn texts with [CLS] and [SEP]
        return tokenizer
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    normalizer = normalizers.BertNormalizer(
        lowercase=vocabulary.lowercase,
        strip_accents=vocabulary.strip_accents,
        handle_chinese_chars=vocabulary.chinese_characters,
    )
    form = NORMALIZATIONS[vocabulary.normalization]
    tokenizer.normalizer = normalizers.Sequence([form(), normalizer]) if form else normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = special
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def write_tokenizer_files(folder: str, vocabulary: Vocabulary, longest: int = 512) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json: what transformers' AutoTokenizer loads a folder from.

    `longest`: tokens that the model has positions for; the tokenizer cuts longer text off there when it is told to.
    """
    # transformers' own class for BERT knows no NFC: it makes the normalizer anew, whatever tokenizer.json says.
    is_bert = not vocabulary.tokenizer_json and vocabulary.normalization == "none"
    rules = {
        "do_lower_case": vocabulary.lowercase,
        "strip_accents": vocabulary.strip_accents,
        "tokenize_chinese_chars": vocabulary.chinese_characters,
    }
    config = {
        "tokenizer_class": "BertTokenizer" if is_bert else "PreTrainedTokenizerFast",
        **({} if vocabulary.tokenizer_json else rules),
        "model_max_length": longest,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    tokenizer = make_tokenizer(replace(vocabulary, tokenizer_json="")).to_str(pretty=True)
    if vocabulary.tokenizer_json:
        as_it_is = json.loads(vocabulary.tokenizer_json)
        as_it_is["post_processor"] = as_it_is.get("post_processor") or json.loads(tokenizer)["post_processor"]
        tokenizer = json.dumps(as_it_is, indent=2, ensure_ascii=False)
    # Tokens come last: a kill on the way must not leave some without their rules.
    contents = {
        CONFIG_JSON: json.dumps(config, indent=2) + "\n",
        TOKENIZER_JSON: tokenizer + "\n",
        VOCAB_TXT: "".join(f"{token}\n" for token in vocabulary.tokens),
    }
    for name, text in contents.items():
        write_text(os.path.join(folder, name), text)


def write_text(path: str, text: str) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def altered_characters(vocabulary: Vocabulary, counts: Mapping[str, int]) -> Dict[str, int]:
    """Of characters and how often they occur, those that normalisation takes something from beyond their case: an
    accent, a vowel sign, a voicing mark, or all of a control character. White space does not count."""
    normalizer = make_tokenizer(vocabulary).normalizer

    def size(text: str) -> int:
        return len("".join(unicodedata.normalize("NFKD", text).split()))

    def is_less(character: str) -> bool:
        normalized = normalizer.normalize_str(character) if normalizer else character
        return size(normalized) < size(character.lower())

    return {character: count for character, count in counts.items() if is_less(character)}


def text_in_words(rules: str, share: Optional[float], altered: Iterable[str] = ()) -> Dict[str, str]:
    """Rows of a report: how text is normalised (`Vocabulary.rules`), and the `share` of its characters that this takes
    something from (`altered`, the most frequent of them); with a warning where they are many. None: not known."""
    if share is None:
        return {"text": rules_in_words(rules)}
    shown = [f"◌{letter}" if unicodedata.combining(letter) else letter for letter in altered]
    shown = [text if text.isprintable() else f"U+{ord(text):04X}" for text in shown]
    which = f" ({' '.join(shown)})" if shown else ""
    rows = {"text": f"{rules_in_words(rules)}; {100 * share:.2f} % of the characters lost more than their case{which}"}
    if share > MOST_ALTERED:
        strips = json.loads(rules).get("strip_accents")
        marks = "accents, vowel signs and other marks are removed. To keep them add --keep-accents, or --cased"
        others = "BERT's tokenizer removes control characters; a tokenizer.json of your own may keep them (--vocab)"
        rows["warning"] = f"more than {100 * MOST_ALTERED:g} %: {marks if strips else others}"
    return rows


class TextEncoder:
    """Encodes lines of text as `make_tokenizer` does, several times faster: each distinct word is tokenized once.

    That is exact because BERT's tokenizer never looks beyond a space; nor do NFC and NFKC, for no character combines
    with a space before it. A tokenizer.json that is taken as it is may, so it gets whole lines. Special tokens in the
    text ("[MASK]") are plain text here: a corpus must not be able to mask or end a sample.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.tokenizer = make_tokenizer(vocabulary)
        self.tokenizer.encode_special_tokens = True
        self.whole_lines = bool(vocabulary.tokenizer_json)
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
        if self.whole_lines:
            return self.flat(lines)
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
        flat, counts = self.flat(new_words)
        self.piece_starts = np.concatenate([self.piece_starts, self.piece_starts[-1] + np.cumsum(counts)])
        self.pieces = np.concatenate([self.pieces, flat])
        self.cached_bytes += sum(map(len, new_words)) + 200 * len(new_words)

    def flat(self, texts: Sequence[str]) -> Tuple[np.ndarray, np.ndarray]:
        pieces = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return np.fromiter((number for ids in pieces for number in ids), self.dtype, int(counts.sum())), counts


def vocab_sha256(tokens: Sequence[str]) -> str:
    """The hash that ties shards to the vocabulary they were made with: of its tokens, one a line."""
    return hashlib.sha256("\n".join(tokens).encode("utf-8")).hexdigest()
