import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.preparing import corpus, formats, python_prose, text_file
from data.preparing.corpus import Document, TextFile
from data.preparing.finding import corpus_bytes, find_files
from data.preparing.formats import with_formats


def documents(paths, text_format="lines", on_bytes=lambda count: None, **options):
    return corpus.documents([TextFile(path, text_format, **options) for path in paths], on_bytes)


def check_formats(paths, text_format):
    formats.check_formats(with_formats(paths, text_format, "utf-8", "text"), text_format)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_documents_end_at_blank_lines_and_at_the_end_of_a_file(tmp_path):
    first = write(tmp_path / "1.txt", "\n\na b\r\n  c\t\n \n\nd")
    second = write(tmp_path / "2.txt", "\ufeffe\n")
    assert list(documents([first, second])) == [Document(0, ["a b", "c"]), Document(1, ["d"]), Document(2, ["e"])]


def test_wikitext_documents_begin_at_titles_and_headings_lose_their_signs(tmp_path):
    path = write(
        tmp_path / "wiki.txt",
        " \nbefore\n \n = One = \n \n a = b \n \n = = Part = = \n\n c = \n\n = E = mc² = \n\n = = = X = = = \n",
    )
    assert [document.lines for document in documents([path], "wikitext")] == [
        ["before"],
        ["One", "a = b", "Part", "c ="],
        ["E = mc²", "X"],
    ]


def test_a_formula_that_looks_like_a_title_is_text_of_its_article(tmp_path):
    formula = "= 1 <unk> / s ... ="
    text = f" \n = One = \n \n of speed \n {formula} \n = 2 \n {formula} \n \n {formula} \n more \n"
    text += f" \n = Two = \n \n {formula} \n x"
    assert [document.lines for document in documents([write(tmp_path / "wiki.txt", text)], "wikitext")] == [
        ["One", "of speed", formula, "= 2", formula, formula, "more"],
        ["Two", formula, "x"],
    ]


def test_a_blank_line_does_not_end_a_wikitext_document_nor_a_title_a_document_of_lines(tmp_path):
    path = write(tmp_path / "text.txt", "= T =\n\na\n")
    assert [document.lines for document in documents([path], "wikitext")] == [["T", "a"]]
    assert [document.lines for document in documents([path], "lines")] == [["= T ="], ["a"]]


@given(st.lists(st.lists(st.text("ab é中", min_size=1).map(str.strip).filter(bool), min_size=1)), st.integers(1, 9))
def test_reading_in_blocks_of_any_size_gives_every_line_of_every_document(tmp_path_factory, groups, block):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write(path, "\n\n".join("\n".join(lines) for lines in groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DOCUMENT_CHARACTERS", 8)
        real, patch_bytes = text_file.read_lines, []
        patch.setattr(text_file, "READ_BYTES", 1000 + block)
        assert (
            list(real(str(path), patch_bytes.append))
            == "\n\n".join("\n".join(lines) for lines in groups).split("\n")[: None if groups else 0]
        )
        lines_of = {}
        for number, lines in documents([str(path)]):
            assert lines and sum(map(len, lines[:-1])) < 8
            lines_of.setdefault(number, []).extend(lines)
    assert list(lines_of.values()) == groups and list(lines_of) == list(range(len(groups)))
    assert sum(patch_bytes) == path.stat().st_size


def test_a_line_longer_than_a_read_is_cut_at_spaces_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "READ_BYTES", 16)
    words = [f"word{number}" for number in range(100)]
    lines = [line for document in documents([write(tmp_path / "long.txt", " ".join(words))]) for line in document.lines]
    assert len(lines) > 10 and " ".join(lines).split() == words


def test_short_lines_are_never_cut_whatever_the_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "READ_BYTES", 16)
    lines = [f"ein Wort mehr {number}" for number in range(50)]
    path = write(tmp_path / "text.txt", "\n".join(lines))
    assert [line for document in documents([path]) for line in document.lines] == lines


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_not_utf8_is_named_with_file_offset_and_line(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(text_file, "READ_BYTES", 8)
    path = write(tmp_path / "latin.txt", prefix + b"one\ntwo three\nfour caf\xe9 five\n")
    with pytest.raises(InputError, match=rf"latin.txt: byte {len(prefix) + 22}, in line 3, is 0xe9 .*expected UTF-8"):
        list(documents([path]))


def test_files_are_found_by_globs_once_and_sorted(tmp_path):
    paths = [write(tmp_path / name, "x") for name in ("b.txt", "a.txt", "[c].txt")]
    assert find_files([str(tmp_path / "*.txt"), paths[0], paths[2]]) == sorted(paths)
    assert find_files(["python"]) == ["python"]


def test_an_input_without_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\*.txt: no file matches"):
        find_files([str(tmp_path / "none*.txt")])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="gone.txt: is not a file"):
        find_files([str(tmp_path)])
    with pytest.raises(InputError, match="no input"):
        find_files([])


def test_the_python_corpus_is_prose_without_repeats_and_the_same_each_time():
    read = []
    first = list(documents(["python"], on_bytes=read.append))
    lines = [line for document in first for line in document.lines]
    assert first == list(documents(["python"]))
    assert len(first) > 300 and sum(map(len, lines)) > 1000000
    assert len(set(lines)) == len(lines)
    assert not any("\n" in line or line.startswith(">>>") or "*****" in line for line in lines)
    assert sum(read) == corpus_bytes(["python"])


def test_a_module_that_does_not_parse_gives_no_prose(tmp_path):
    assert python_prose.docstring_prose(write(tmp_path / "bad.py", "def (:\n")) == []
    good = write(tmp_path / "good.py", '"""One sentence of prose,\nin two lines.\n\n>>> code = 1 + 1 + 1\n"""\n')
    assert python_prose.docstring_prose(good) == ["One sentence of prose, in two lines."]


WIKI = """<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a philosophy.
It < has > signs.

</doc>
<doc id="25" url="u" title="Autism">
Autism
</doc>
"""


def test_wikiextractor_documents_are_its_elements_and_their_blank_lines_end_none(tmp_path):
    path = write(tmp_path / "wiki_00", WIKI)
    assert [document.lines for document in documents([path], "wikiextractor")] == [
        ["Anarchism", "Anarchism is a philosophy.", "It < has > signs."],
        ["Autism"],
    ]


@pytest.mark.parametrize(
    "content, given, right",
    [
        ("\n" + WIKI, "lines", "wikiextractor"),
        (WIKI, "wikitext", "wikiextractor"),
        (WIKI, "jsonl", "wikiextractor"),
        ('{"id": 1, "text": "a"}\n', "lines", "jsonl"),
        ('{"text": "a"}\n', "wikiextractor", "jsonl"),
        ("Some text.\n\n<doc id>", "wikiextractor", "lines"),
        (" = Title = \n", "wikiextractor", "wikitext"),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_text_in_another_format_than_the_one_given_is_refused_with_the_right_one(tmp_path, content, given, right, name):
    good = write(
        tmp_path / "good", {"lines": "a", "wikitext": "a", "jsonl": '{"text": ""}', "wikiextractor": WIKI}[given]
    )
    path = write(tmp_path / name, gzip.compress(content.encode()) if name == "a.gz" else content)
    with pytest.raises(InputError, match=f"{name}: begins with .* --format is {given}.*Give --format {right}$"):
        check_formats([good, path], given)
    check_formats(["python", path, write(tmp_path / "empty", "\n")], right)


def test_lines_that_only_look_like_another_format_are_text(tmp_path):
    for number, line in enumerate(('{"title": "a"}', "{text} in braces", '["text"]', "<document>")):
        check_formats([write(tmp_path / str(number), line)], "lines")


def test_json_lines_are_documents_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "READ_BYTES", 64)
    texts = ["one\n\n two \nthree", "", "word " * 100, "half a pair: \ud800"]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts))
    assert [document.lines for document in documents([path], "jsonl")] == [
        ["one", "two", "three"],
        [("word " * 100).strip()],
        ["half a pair: ?"],
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "cut o', "a.jsonl: line 3 is not JSON"),
        (
            '{"title": "a", "body": "b"}',
            r"a.jsonl: line 3 has no \"text\" field with a string; found the fields \['body', 'title'\]",
        ),
        ('["text"]', "a.jsonl: line 3 has no .* found a JSON list"),
        ('{"text": 5}', "a.jsonl: line 3 has no .* found a text that is 5"),
    ],
)
def test_a_line_of_json_that_is_no_document_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        list(documents([path], "jsonl"))


def packed(name, content):
    """In two pieces, as tools that append write them."""
    half = len(content) // 2
    compress = gzip.compress if name.endswith(".gz") else zstandard.ZstdCompressor(write_checksum=True).compress
    return compress(content[:half]) + compress(content[half:])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_packed_files_give_the_same_documents_and_count_packed_bytes(tmp_path, name):
    content = "\n\n".join(f"line {number} é\nmore" for number in range(5000)).encode("utf-8")
    plain, read = write(tmp_path / "a.txt", content), []
    path = write(tmp_path / name, packed(name, content))
    assert list(documents([path], on_bytes=read.append)) == list(documents([plain]))
    assert sum(read) == corpus_bytes([path]) < len(content) / 2


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:40] + b"????????" + data[48:], lambda data: b"text"]
)
def test_a_packed_file_that_is_damaged_or_cut_off_is_named(tmp_path, name, damage):
    content = "\n".join(f"line {number * 7919 % 5003}" for number in range(5000)).encode("utf-8")
    path = write(tmp_path / name, damage(packed(name, content)))
    with pytest.raises(InputError, match=name + ": cannot be unpacked as"):
        list(documents([path]))
