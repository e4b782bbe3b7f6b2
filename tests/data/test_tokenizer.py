import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data import tokenizer
from data.errors import InputError
from data.preparing.options import PrepareOptions
from data.preparing.vocab_training import train_vocab
from data.shards import ShardInfo
from data.tokenizer import (
    SPECIAL_TOKENS,
    TextEncoder,
    Vocabulary,
    altered_characters,
    claims_of,
    find_vocab,
    make_tokenizer,
    read_vocab,
    vocab_sha256,
    with_rules,
    write_tokenizer_files,
)
from tests import ROOT

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
TOKENS = list(SPECIAL_TOKENS) + [
    "the",
    "cat",
    "##s",
    "sat",
    "e",
    "##e",
    "i",
    "##i",
    "[",
    "]",
    "mask",
    "中",
    ",",
    "σ",
    "##σ",
]
VOCABULARY = Vocabulary(TOKENS)
needs_shared_data = pytest.mark.skipif(not os.path.isdir(SHARED), reason="development data is not there")


def real_lines():
    with open(os.path.join(SHARED, "wikitext-2-valid.txt"), encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def vocab_file(tmp_path, content):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content.encode("utf-8"))
    return str(path)


@needs_shared_data
def test_ids_are_those_of_transformers_bert_tokenizer():
    transformers = pytest.importorskip("transformers")
    vocabulary = read_vocab(os.path.join(SHARED, "bert-base-uncased-vocab.txt"))
    reference = transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary.tokens)}, do_lower_case=True
    )
    lines = real_lines()[:1000] + ["Crème BRÛLÉE, naïve; 中文 [MASK] don't! \x07 Σίσυφος " + "x" * 101]
    expected = reference(lines)["input_ids"]
    assert [encoding.ids for encoding in make_tokenizer(vocabulary).encode_batch(lines)] == expected
    pair = reference("a cat", "the mat")
    encoding = make_tokenizer(vocabulary).encode("a cat", "the mat")
    assert (encoding.ids, encoding.type_ids) == (pair["input_ids"], pair["token_type_ids"])


@needs_shared_data
def test_the_text_encoder_gives_the_tokenizers_ids_on_real_text():
    vocabulary = read_vocab(os.path.join(SHARED, "bert-base-uncased-vocab.txt"))
    lines = real_lines()
    ids, counts = TextEncoder(vocabulary).encode(lines)
    expected = [encoding.ids for encoding in make_tokenizer(vocabulary).encode_batch(lines, add_special_tokens=False)]
    assert counts.tolist() == [len(line) for line in expected]
    assert ids.tolist() == [number for line in expected for number in line]


@settings(max_examples=300)
@given(
    st.lists(
        st.lists(st.text(st.one_of(st.sampled_from("theca ,[]éÍ中Σς\x1c\u0301\u2028\u00a0"), st.characters()))),
        min_size=1,
        max_size=3,
    )
)
def test_the_text_encoder_gives_the_tokenizers_ids_on_any_text_however_often_it_forgets(batches):
    encoder, reference = TextEncoder(VOCABULARY), make_tokenizer(VOCABULARY)
    reference.encode_special_tokens = True
    for number, lines in enumerate(batches):
        lines = [line.encode("utf-8", "ignore").decode("utf-8") for line in lines]
        ids, counts = encoder.encode(lines)
        expected = [reference.encode(line, add_special_tokens=False).ids for line in lines]
        assert counts.tolist() == [len(line) for line in expected]
        assert ids.tolist() == [piece for line in expected for piece in line]
        encoder.cached_bytes = tokenizer.CACHE_BYTES + 1 if number == 0 else 0


def test_special_words_in_a_corpus_are_plain_text():
    ids, counts = TextEncoder(VOCABULARY).encode(["the [MASK] sat", "[SEP]"])
    assert [TOKENS[number] for number in ids] == ["the", "[", "mask", "]", "sat", "[", "[UNK]", "]"]
    assert counts.tolist() == [5, 3] and ids.dtype == np.uint16


def test_a_vocabulary_is_read_with_any_line_ending(tmp_path):
    assert read_vocab(vocab_file(tmp_path, "\r\n".join(TOKENS) + "\r\n")) == VOCABULARY
    assert read_vocab(vocab_file(tmp_path, "\n".join(TOKENS))) == VOCABULARY


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "the vocabulary is empty"),
        ([token for token in TOKENS if token != "[MASK]"], r"has no \[MASK\]"),
        (TOKENS + ["cat"], "line 21 repeats 'cat' of line 7"),
        (TOKENS[:6] + [""] + TOKENS[6:], "line 7 is empty"),
        (TOKENS[:5], "no tokens but the special ones"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_by_name(tmp_path, tokens, message):
    with pytest.raises(InputError, match="vocab.txt: .*" + message):
        read_vocab(vocab_file(tmp_path, "".join(token + "\n" for token in tokens)))


def test_a_vocabulary_that_is_missing_or_not_utf8_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="none.txt: the vocabulary cannot be read"):
        read_vocab(str(tmp_path / "none.txt"))
    (tmp_path / "bad.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(InputError, match="bad.txt: byte 6 is not UTF-8"):
        read_vocab(str(tmp_path / "bad.txt"))


TRAIN = """
import hashlib
from pydoc_data.topics import topics
from data.preparing.vocab_training import train_vocab
lines = [line for name in sorted(topics) for line in topics[name].splitlines()]
print(hashlib.sha256("\\n".join(train_vocab(lambda: [lines], 2000).tokens).encode()).hexdigest())
"""


def test_training_a_vocabulary_gives_the_same_words_in_every_process_and_on_any_number_of_threads():
    runs = [
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            env=dict(os.environ, RAYON_NUM_THREADS=threads),
        ).stdout
        for threads in ("1", "2", "2")
    ]
    assert len(set(runs)) == 1


def test_a_trained_vocabulary_has_the_special_words_first_no_repeats_and_covers_its_text():
    lines = ["The cats sat, the cat sat: Été 中文!"] * 3 + [f"other tokens {number}" for number in range(100)]
    vocabulary = train_vocab(lambda: [lines], 120)
    tokens = vocabulary.tokens
    assert tokens[:5] == list(SPECIAL_TOKENS) and len(set(tokens)) == len(tokens) <= 120
    assert {"cat", "sat", "the"} <= set(tokens) and not any(token != token.lower() for token in tokens[5:])
    encoding = make_tokenizer(vocabulary).encode("the cat sat: other tokens 7")
    assert "[UNK]" not in encoding.tokens


def test_a_vocabulary_too_small_for_letters_is_refused():
    with pytest.raises(InputError, match="--vocab-size is 50, expected at least 100"):
        train_vocab(lambda: [["text"]], 50)


def test_transformers_loads_the_folder_and_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer_files(str(tmp_path), VOCABULARY)
    assert read_vocab(str(tmp_path / "vocab.txt")) == VOCABULARY
    assert sorted(os.listdir(str(tmp_path))) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    text = "The CATS sat, [MASK] thée 中"
    expected = make_tokenizer(VOCABULARY).encode(text).ids
    for load in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        loaded = load.from_pretrained(str(tmp_path))
        assert loaded(text)["input_ids"] == expected
        assert (loaded.pad_token_id, loaded.mask_token_id, loaded.unk_token) == (0, 4, "[UNK]")
        assert "Bert" in type(loaded).__name__


def test_the_vocabulary_of_shards_is_beside_them_or_named_and_has_their_hash(tmp_path):
    def shard(name, tokens):
        return ShardInfo(str(tmp_path / name), 1, 8, 1, len(tokens), vocab_sha256(tokens), 0)

    path = vocab_file(tmp_path, "\n".join(TOKENS))
    own, nvidias = shard("a.h5", TOKENS), ShardInfo("b.h5", 1, 8, 1, 20, "", 0, is_nvidia=True)
    assert find_vocab(None, [own, nvidias]) == find_vocab(path, [nvidias]) == find_vocab(path, []) == (VOCABULARY, path)
    with pytest.raises(InputError, match="vocab.txt: is not the vocabulary that .*c.h5 was made with.* --data.vocab"):
        find_vocab(None, [own, shard("c.h5", TOKENS[:-1])], "--data.vocab")
    os.remove(path)
    with pytest.raises(InputError, match="vocab.txt: no such file. Give --vocab"):
        find_vocab(None, [own])


LINES = """Crème BRÛLÉE, naïve coöperation, Ærøskøbing Ångström Œuvre ﬁne ﬂow ½ ™ ²
İstanbul'da IŞIK ılık; Çağrı AĞAÇ öğüt ÜŞÜDÜ
Tiếng Việt: Nguyễn Thị Hằng đã đến Đà Nẵng
Tie\u0302\u0301ng Vie\u0323\u0302t: decomposed e\u0301 A\u030a q\u0303\u0323
Straße GROẞ Füße Äpfel
ΣΊΣΥΦΟΣ Σίσυφος ἀρχὴ τῶν πάντων ΰ
Ёлка и Йод, їжак, Љубав ѓевре
العَرَبِيَّة والأُردُو ؟ كتاب\u0640ــ \ufdfa \ufefb
שָׁלוֹם עֲלֵיכֶם
हिन्दी की किताबें क्षेत्र ज्ञ ड़ क\u093c
ภาษาไทยไม่เว้นวรรค น้ำ กำลัง
தமிழ் மொழி கொடு கெ\u0bbe
中文字符和English混排 繁體 𠀀𪚥 豈 \uf900\u2f801
パパ ババ ハハ かがきぎ ｶﾞｷﾞ ﾊﾟﾋﾟ ﾃｽﾄ は\u3099 ヴ ゟ ㌔ ㍻ ①
한국어 테스트 \u1112\u1161\u11ab\u1100\u116e\u11a8 ㄱㅏ ﾡ
👩‍👩‍👧‍👦 👍🏽 🇹🇷 ❤️ ☺︎ e\u20e3
bell\x07 tab\there nul\x00 del\x7f \x85next \u200bzero \u200cnon\u200djoiner \ufeffbom \u00adshy \ufffd \ue000
\u0301lone mark \u0301 and a\u0301\u0301\u0323b, no\u00a0break \u3000 \u2003 \u2028line \u1680ogham \u2060
Wider ＡＢＣ１２３ ﾊﾝ ｅ́ Ⅷ ⅷ ℌ Ω K Å ƒ ſ ẛ̣
ქართული ԱՐԵՒ Հայերեն ᏣᎳᎩ ꮳꮃꭹ ສະບາຍດີ မြန်မာ ខ្មែរ བོད་སྐད ᠮᠣᠩᠭᠣᠯ አማርኛ ߒߞߏ 𐐔𐐯𐑅 𝔘𝔫𝔦 𞤀𞤣𞤤𞤢𞤥
don't e-mail user@example.com https://x.y/z?a=b#c 3,141.59 $5 €10 ¿qué? «oui» “no” … ‘a’ ── ‼"""
SCRIPTS = LINES.split("\n")
UNICODE = [*range(0xD800), *range(0xE000, 0x110000)]
RULES = [
    {},
    {"lowercase": False},
    {"strip_accents": False},
    {"lowercase": False, "strip_accents": True},
    {"lowercase": False, "chinese_characters": False},
    {"strip_accents": False, "normalization": "nfc"},
    {"normalization": "nfkc"},
    {"lowercase": False, "normalization": "nfkc"},
]


def random_lines(seed, count=150):
    """Lines of characters from all over Unicode, with many marks, spaces and what NFKC makes spaces of."""
    draw = random.Random(seed)
    often = " \u0301\u0327\u3099\u1161\u11a8\u0323\u00a0\u00b4\ufdfa\u037a\u200daeıİＡﾞ가ᄀ\x85\u2028'"
    kinds = [
        lambda: draw.choice(often),
        lambda: chr(draw.choice(UNICODE)),
        lambda: chr(draw.randrange(0x3400)),
    ]
    return ["".join(draw.choice(kinds)() for _ in range(draw.randrange(60))) for _ in range(count)]


def own_ids(vocabulary, lines):
    ids, counts = TextEncoder(vocabulary).encode(lines)
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def their_ids(loaded, lines):
    return [loaded(line, add_special_tokens=False)["input_ids"] for line in lines]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_text_of_all_scripts_gets_the_same_ids_here_and_from_the_files_in_transformers(tmp_path, rules):
    transformers = pytest.importorskip("transformers")
    lines = SCRIPTS + random_lines(time.time_ns())
    vocabulary = train_vocab(lambda: [SCRIPTS * 2], 4000, with_rules([], rules))
    write_tokenizer_files(str(tmp_path), vocabulary)
    assert read_vocab(str(tmp_path)) == read_vocab(str(tmp_path / "vocab.txt")) == vocabulary
    ids = own_ids(vocabulary, lines)
    known = [vocabulary.tokens[number] for line in ids[: len(SCRIPTS)] for number in line if number != 1]
    assert len(set(known)) > 150
    for _ in range(2):
        assert their_ids(transformers.AutoTokenizer.from_pretrained(str(tmp_path)), lines) == ids
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # as in a checkpoint
    for kind in ("vocab.txt", "tokenizer_config.json"):
        os.remove(str(tmp_path / kind))
    assert read_vocab(str(tmp_path / "tokenizer.json")) == vocabulary


def foreign_tokenizer(path, lines, added=(), **model):
    """A tokenizer.json that no options of BERT's say."""
    settings = {"unk_token": "[UNK]", "continuing_subword_prefix": "@@", "max_input_chars_per_word": 12, **model}
    made = Tokenizer(models.WordPiece({}, **settings))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x y", "ö"), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[MASK]", "[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # the Spanish BETO's order: 0 is not [PAD]
    prefix = settings["continuing_subword_prefix"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, continuing_subword_prefix=prefix
    )
    made.train_from_iterator(lines, trainer)
    made.add_tokens(list(added))
    made.enable_truncation(4)
    made.enable_padding(pad_id=1)
    made.save(str(path))


def test_a_tokenizer_json_of_wordpieces_is_taken_as_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    lines = [*SCRIPTS, "the x y and a very_long_word_of_many_letters, <a b> end", *random_lines(time.time_ns(), 50)]
    foreign_tokenizer(tmp_path / "tokenizer.json", lines * 2, ["<a b>"])
    vocabulary = read_vocab(str(tmp_path / "tokenizer.json"))
    assert vocabulary.prefix == "@@" and vocabulary.tokens[-1] == "<a b>" and vocabulary.tokens.index("[PAD]") == 1
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = own_ids(vocabulary, lines)
    assert ids == their_ids(reference, lines) and max(map(len, ids)) > 4
    (tmp_path / "out").mkdir()
    write_tokenizer_files(str(tmp_path / "out"), vocabulary)
    written = read_vocab(str(tmp_path / "out" / "vocab.txt"))
    assert (written.tokens, written.rules) == (vocabulary.tokens, vocabulary.rules)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "bert"}')
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert their_ids(loaded, lines) == ids and loaded.pad_token_id == 1
    assert loaded.convert_ids_to_tokens(loaded("a")["input_ids"])[:: len(loaded("a")["input_ids"]) - 1] == [
        "[CLS]",
        "[SEP]",
    ]
    with pytest.raises(InputError, match="tokenizer.json: is taken as it is.* but --cased says how text is normalised"):
        read_vocab(str(tmp_path), [claims_of(PrepareOptions([], "", lowercase=False))])


def edited(path, change):
    contents = json.loads(path.read_text(encoding="utf-8"))
    change(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda it: it["model"].update(type="BPE"), "its model is BPE, expected WordPiece"),
        (lambda it: it["model"].update(unk_token="<unk>"), "model.unk_token is '<unk>', expected '.UNK.'"),
        (lambda it: it["model"].update(continuing_subword_prefix=""), "continuing_subword_prefix is empty, expected a"),
        (lambda it: it["model"]["vocab"].pop("[CLS]") and it["added_tokens"].clear(), "the ids of its .* are not 0 to"),
        (lambda it: it["model"]["vocab"].update({"[CLS]": 18, "σ": 2}) or it["added_tokens"].clear(), None),
        (lambda it: it.update(normalizer={"type": "Odd"}), "cannot be read"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused_by_name(tmp_path, change, message):
    write_tokenizer_files(str(tmp_path), VOCABULARY)
    os.remove(str(tmp_path / "vocab.txt"))
    edited(tmp_path / "tokenizer.json", change)
    if message is None:
        assert read_vocab(str(tmp_path)).tokens[2] == "σ"  # any order will do
        return
    with pytest.raises(InputError, match="tokenizer.json: .*" + message):
        read_vocab(str(tmp_path))


def test_how_text_is_normalised_comes_from_the_vocabularys_own_files_and_options_must_agree(tmp_path):
    vocab_file(tmp_path, "\n".join(TOKENS))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"do_lower_case": false, "strip_accents": null, "tokenizer_class": "BertTokenizerFast"}')

    def read(**options):
        return read_vocab(str(tmp_path / "vocab.txt"), [claims_of(PrepareOptions([], "", **options))])

    assert read() == read(lowercase=False, strip_accents=False) == Vocabulary(TOKENS, lowercase=False)
    assert read(chinese_characters=False, normalization="nfc") == Vocabulary(TOKENS, False, None, False, "nfc")
    for options, flag in (({"lowercase": True}, "--lowercase"), ({"strip_accents": True}, "--strip-accents")):
        with pytest.raises(InputError, match=f"{flag} says .*, .*tokenizer_config.json .*says .*; expected the same"):
            read(**options)
    write_tokenizer_files(str(tmp_path), Vocabulary(TOKENS, strip_accents=False))
    assert read() == read(lowercase=True) == Vocabulary(TOKENS, True, False)
    config.write_text('{"do_lower_case": false}')
    with pytest.raises(
        InputError, match="tokenizer_config.json .do_lower_case. says cased, .*tokenizer.json says lower"
    ):
        read()
    edited(tmp_path / "tokenizer.json", lambda it: it["model"]["vocab"].update({"the": 6, "cat": 5}))
    config.write_text("{}")
    with pytest.raises(InputError, match="vocab.txt: has other tokens than .*tokenizer.json beside it"):
        read()
    os.remove(str(tmp_path / "tokenizer.json"))
    config.write_text('{"tokenizer_class": "BertJapaneseTokenizer", "do_lower_case": false}')
    with pytest.raises(InputError, match="tokenizer_class is BertJapaneseTokenizer, expected BertTokenizer"):
        read()
    os.remove(str(tmp_path / "vocab.txt"))
    with pytest.raises(InputError, match="has neither vocab.txt nor tokenizer.json"):
        read_vocab(str(tmp_path))


def test_a_vocabulary_whose_words_cannot_occur_is_refused_where_nobody_says_how_text_is_normalised(tmp_path):
    def read(words, **options):
        path = vocab_file(tmp_path, "\n".join([*SPECIAL_TOKENS, "[unused1]", *words]))
        return read_vocab(path, [claims_of(PrepareOptions([], "", **options))], strict=True)

    plain = [f"word{number}" for number in range(300)]
    read([*plain, "Odd", "crème"])
    cased, accents = (
        plain + [f"##Word{number}" for number in range(30)],
        plain + [f"çağ{number}" for number in range(30)],
    )
    unreachable = "vocab.txt: 30 of its 330 words cannot occur in text that is lower-case, accents stripped .Word0.*"
    advice = "expected at most 1 % of them.*Add --cased, which suits them, or --lowercase"
    with pytest.raises(InputError, match=unreachable + advice):
        read(cased)
    with pytest.raises(InputError, match="Add --keep-accents, which suits them"):
        read(accents)
    with pytest.raises(InputError, match="Add --no-chinese-characters"):
        read([*plain, *(f"東{chr(0x4E00 + number)}" for number in range(30))])
    assert read(cased, lowercase=False) and read(accents, strip_accents=False) and read(accents, lowercase=True)
    with pytest.raises(InputError, match="Add --cased"):
        read(cased, strip_accents=False)


@needs_shared_data
def test_berts_own_vocabulary_suits_the_default():
    assert len(read_vocab(os.path.join(SHARED, "bert-base-uncased-vocab.txt"), strict=True)) == 30522


@pytest.mark.parametrize(
    "rules, text, altered",
    [
        ({}, "Plain English, IN CAPITALS... 10 % of ½ \t\x85 中文 straße", ""),
        ({}, "हिन्दी की", "ि\u094d"[1]),
        ({}, "パパ ハハ", "パ"),
        ({}, "Çağrı İĞ ı", "ÇğİĞ"),
        ({}, "zero\u200cwidth\x07", "\u200c\x07"),
        ({"strip_accents": False}, "Çağrı İ パパ हिन्दी", ""),
        ({"lowercase": False}, "Çağrı İ パパ हिन्दी \u200c", "\u200c"),
        ({"normalization": "nfkc"}, "ﾊﾟ ﬁ \ufdfa ㌘", "\uff9f㌘"),
        ({"lowercase": False, "normalization": "nfkc"}, "ﾊﾟ ﬁ \ufdfa ㌔ e\u0301", ""),
    ],
)
def test_characters_that_normalisation_takes_something_from_are_told(rules, text, altered):
    found = altered_characters(with_rules(list(SPECIAL_TOKENS), rules), Counter(text))
    assert found == {character: text.count(character) for character in altered}


def test_a_vocabulary_is_trained_on_text_as_it_is_normalised():
    lines = ["cafe\u0301 Cafe\u0301 ﾊﾟ"] * 3
    cases = (("nfc", False, "é", "É"), ("nfkc", False, "パ", "e"), ("none", True, "e", "é"))
    for form, strips, there, missing in cases:
        tokens = train_vocab(
            lambda: [lines], 100, with_rules([], {"normalization": form, "strip_accents": strips})
        ).tokens
        assert there in tokens and missing not in tokens
    letters = [chr(number) for number in range(0x4E00, 0x4E00 + 1200)]
    for strips, count in ((True, 1000), (False, 1200)):
        vocabulary = train_vocab(lambda: [letters * 2], 8000, with_rules([], {"strip_accents": strips}))
        assert len({*vocabulary.tokens} & {*letters}) == count


def test_tokenizer_files_that_a_kill_cut_off_never_leave_tokens_without_their_rules(tmp_path, monkeypatch):
    vocabulary, write_text, written = (
        with_rules([*SPECIAL_TOKENS, "a"], {"normalization": "nfc"}),
        tokenizer.write_text,
        [],
    )

    def killed(path, text):
        written.append(path)
        if len(written) > kept:
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr(tokenizer, "write_text", killed)
    for kept in range(3):
        written.clear()
        folder = tmp_path / str(kept)
        folder.mkdir()
        with pytest.raises(KeyboardInterrupt):
            write_tokenizer_files(str(folder), vocabulary)
        try:
            assert read_vocab(str(folder)) == vocabulary
        except InputError as error:
            assert "has neither vocab.txt nor tokenizer.json" in str(error)
