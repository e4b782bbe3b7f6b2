import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer
from data.errors import InputError
from data.shards import ShardInfo
from data.tokenizer import (
    SPECIAL_TOKENS,
    TextEncoder,
    Vocabulary,
    find_vocab,
    make_tokenizer,
    read_vocab,
    train_vocab,
    vocab_sha256,
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
from data.tokenizer import train_vocab
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
