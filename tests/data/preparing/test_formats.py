"""Files of every kind to the same documents: recognised, found in folders, in any encoding, and named when unusable."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.preparing import formats, tables, text_file
from data.preparing.corpus import documents
from data.preparing.finding import corpus_bytes, find_files
from data.preparing.formats import check_formats, describe, with_formats
from tests.data.preparing.test_corpus import write

DOCUMENTS = [["one line", "another, with a comma; and\ta tab"], ['he said "no"', "ağaç パパ"], ["last"]]


def read(paths, text_format="auto", encoding="utf-8", field="text", on_bytes=lambda count: None):
    """(the formats in words, the lines of each document), after the checks of `prepare`."""
    files = with_formats(paths, text_format, encoding, field)
    check_formats(files, text_format)
    return describe(files), [document.lines for document in documents(files, on_bytes)]


def csv_of(texts, separator=",", end="\n"):
    quoted = ['"' + "\n\n".join(text).replace('"', '""') + '"' for text in texts]
    return end.join([f"id{separator}text", *(f"{number}{separator}{text}" for number, text in enumerate(quoted)), ""])


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), str(path), **options)
    return str(path)


BY_NAME = {
    "a.csv": csv_of(DOCUMENTS),
    "semicolons.csv": "\ufeff" + csv_of(DOCUMENTS, ";", "\r\n"),
    "tabs.csv.gz": csv_of(DOCUMENTS, "\t"),
    "blank.csv": "\n\n" + csv_of(DOCUMENTS, ";"),
    "a.jsonl": "\n".join(json.dumps({"id": 1, "text": "\n\n".join(text)}) for text in DOCUMENTS),
    "a.NDJSON": "\n".join(json.dumps({"text": "\n".join(text)}) for text in DOCUMENTS),
    "json.txt": "\n\n".join(json.dumps({"text": "\n".join(text)}) for text in DOCUMENTS),
    "wiki_00": "".join(
        f'<doc id="{number}">\n' + "\n".join(text) + "\n</doc>\n" for number, text in enumerate(DOCUMENTS)
    ),
    "wiki.tokens": "".join(f"\n = {text[0]} = \n \n" + "\n".join(text[1:] + [""]) for text in DOCUMENTS),
    "plain.txt": "\n\n".join("\n".join(text) for text in DOCUMENTS),
}
FORMATS = ("csv", "csv", "csv", "csv", "jsonl", "jsonl", "jsonl", "wikiextractor", "wikitext", "lines")


@pytest.mark.parametrize("name, expected", list(zip(BY_NAME, FORMATS)))
def test_a_file_is_recognised_by_its_name_or_its_first_lines(tmp_path, name, expected):
    content = BY_NAME[name].encode("utf-8")
    path, done = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content), []
    assert read([path], on_bytes=done.append) == (expected, DOCUMENTS)
    assert sum(done) == corpus_bytes([path])


def test_plain_text_stays_lines_and_files_of_several_formats_may_be_mixed(tmp_path):
    texts = ["= Title =\ntext", "{text} in braces", "a,text\n1,b", "", "\n\n", "<document>"]
    paths = [write(tmp_path / f"{number}.txt", text) for number, text in enumerate(texts)]
    assert read(paths)[0] == "lines"
    assert read([*paths, write(tmp_path / "a.csv", "text\nx")])[0] == "csv, lines"
    table = write(tmp_path / "b.csv", "a,b\n1,x\n".encode("utf-16"))
    assert read([table], field="b", encoding="utf-16") == ("csv of 'b' in utf-16", [["x"]])


def test_tab_separated_values_take_quotes_as_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"bare quote\t1\n\nits 5" end\t0\n')
    assert read([path], field="sentence") == ("tsv of 'sentence'", [['"bare quote'], ['its 5" end']])


def test_parquet_gives_the_texts_of_all_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 3)
    texts = [f"text {number}\n\nmore" for number in range(20)] + [None, ""]
    path, done = write_parquet(tmp_path / "a.parquet", {"n": range(22), "text": texts}, row_group_size=7), []
    expected = [[f"text {number}", "more"] for number in range(20)]
    assert read([path], on_bytes=done.append) == ("parquet", expected)
    assert sum(done) == corpus_bytes([path]) and len(done) > 5


fields = st.text(st.sampled_from('ab",;\t\n é中'), max_size=12)


@settings(suppress_health_check=list(HealthCheck), max_examples=40, deadline=None)
@given(st.lists(fields, max_size=6), st.integers(1, 9))
def test_csv_gives_any_text_back_whatever_the_reads(tmp_path, texts, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "READ_BYTES", block)
        path = write(tmp_path / "a.csv", csv_of([[text] for text in texts]))
        lines = [list(filter(None, map(str.strip, text.split("\n")))) for text in texts]
        assert read([path], "csv")[1] == list(filter(None, lines))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "id,body\n1,x\n", "has no column 'text'; found 'id', 'body'. Name the text's with --text-field"),
        ("a.csv", "id,text\n1,x\n2,y,z\n", "the row that ends in line 3 has 3 columns, expected 2"),
        ("a.csv", 'text\n"a "b" c"\n', "line 2 is not as expected"),
        ("a.csv", 'text\na\n"b\nc', "line 4 is not as expected .*unexpected end"),
        ("a.tsv", "id\ttext\n1\n", "the row that ends in line 2 has 1 columns"),
        ("a.jsonl", '{"body": "a"}', "found the fields .'body'.. Name the text's with --text-field"),
        ("json.txt", '{"body": "a"}', "found the fields .'body'.. Name the text's with --text-field"),
        ("a.parquet", "PAR1 not", "cannot be read as parquet"),
        ("a.txt", "PAR1 \x15", "is a parquet file. Give --format parquet"),
        ("a.txt", "PK\x03\x04", "is a zip archive, as .xlsx"),
        ("a.txt", "a text".encode("utf-16-le"), "zero bytes.*give --encoding utf-16-le"),
        ("a.txt", "a text".encode("utf-16-be"), "zero bytes.*give --encoding utf-16-be"),
        ("a.txt", "यह एक वाक्य है।\n".encode("utf-16-le"), "zero bytes.*give --encoding utf-16-le"),
        ("a.txt", "日本語の文章です。".encode("iso2022_jp"), "ISO-2022-JP.*Give --encoding iso2022_jp"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(tmp_path, name, content, message):
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        read([write(tmp_path / name, content)])


def test_a_field_of_a_table_may_be_huge_but_a_quote_that_stays_open_ends_in_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", 'text\n"' + "word " * 100000 + '"\n')
    assert len(read([path])[1][0][0]) == 499999
    monkeypatch.setattr(tables, "FIELD_CHARACTERS", 1000)
    with pytest.raises(InputError, match="line 2 is not as expected .*field larger"):
        read([path])


def test_a_column_of_numbers_and_a_table_named_otherwise_are_refused(tmp_path):
    with pytest.raises(InputError, match="the column 'text' is of int64, expected text"):
        read([write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})])
    with pytest.raises(InputError, match="a.csv: is named as csv, --format is lines. Give --format csv, or name it"):
        read([write(tmp_path / "a.csv", "text\na")], "lines")


def test_folders_give_their_text_files_once_and_what_is_left_out_is_said(tmp_path, caplog):
    names = (
        "a.txt",
        "b/wiki_00",
        "b/c/d.csv",
        "b/e.txt.gz",
        ".hidden/x.txt",
        ".DS_Store",
        "vocab.txt",
        "p.pdf",
        "b/q.PDF",
        "b/r.png",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "z.txt").symlink_to(tmp_path / "a.txt")
    expected = sorted(str(tmp_path / name) for name in names[:4])
    assert find_files([str(tmp_path)]) == expected
    assert "left out by their names: 2 .pdf, 1 .png, 1 hidden, 1 vocab.txt" in caplog.text
    assert find_files([str(tmp_path / "b") + "/", str(tmp_path / "a.txt")]) == expected
    with pytest.raises(InputError, match=r"only: no text file is in this folder \(found 1 .pdf\)"):
        (tmp_path / "only").mkdir()
        write(tmp_path / "only" / "p.pdf", "x")
        find_files([str(tmp_path / "only")])


TEXTS = {
    "shift_jis": "日本語の文書です。この文章は、文字コードを調べるために書かれました。\n次の行もあります。\n",
    "euc_kr": "한국어로 쓴 글입니다. 이 문장은 문자 인코딩을 알아보기 위하여 썼습니다.\n다음 줄도 있습니다.\n",
    "cp1254": "Bu belge Türkçe yazılmıştır. Ağaçların gölgesinde çocuklar oynuyor, güneş ışığı parlıyordu.\n",
    "cp1251": "Этот текст написан по-русски, чтобы узнать кодировку файла и прочитать его правильно.\n",
    "cp1252": "Die Bevölkerung der Städte wächst über die Jahre, und Größe und Höhe der Häuser ändern sich.\n",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_likely_encoding_is_named_with_the_line_in_it_and_reads_the_text(tmp_path, encoding):
    pytest.importorskip("charset_normalizer")
    text = "plain\n" + 5 * TEXTS[encoding]
    path = write(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(InputError, match=r"byte \d+, in line 2, .*expected UTF-8 text") as error:
        read([path])
    assert f"--encoding {encoding}," in str(error.value) and TEXTS[encoding][:20] in str(error.value)
    assert read([path], encoding=encoding) == (f"lines in {encoding}", [text.strip().split("\n")])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "shift_jis", "iso2022_jp"])
def test_any_encoding_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(text_file, "READ_BYTES", 7)
    text = TEXTS["shift_jis"] + "\nascii 上\r\n"  # 上 is 0A 4E in UTF-16: its first byte is none of a line end
    path = write(tmp_path / "a.txt", text.encode(encoding))
    lines = list(map(str.strip, text.strip("\n").split("\n")))
    marked = "UTF8" if encoding in ("utf-8-sig", "utf-16", "utf-32") else encoding
    assert list(text_file.read_lines(path, lambda count: None, False, marked)) == lines


def test_bytes_that_are_not_in_the_encoding_are_named_in_utf_16_too(tmp_path, monkeypatch):
    pytest.importorskip("charset_normalizer")
    monkeypatch.setattr(text_file, "READ_BYTES", 6)
    path = write(tmp_path / "a.txt", "one\ntwo\n".encode("utf-16-le") + b"\x00\xdc\x00\xdc" + "x\n".encode("utf-16-le"))
    with pytest.raises(InputError, match="byte 16, in line 3, is 0x00 .*expected utf-16-le text"):
        read([path], encoding="utf-16-le")
    with pytest.raises(InputError, match="BOM. Give --encoding utf-16-le or"):
        read([path], encoding="utf-16")
    for name in ("shiftjs", "rot13"):
        with pytest.raises(InputError, match=f"--encoding is '{name}', expected an encoding that Python has, such as"):
            PrepareOptions([path], "", encoding=name).check()


@pytest.mark.parametrize("indent, warns", [(0, True), (2, True), (None, True), ("text", False)])
def test_json_that_is_not_an_object_a_line_warns(tmp_path, caplog, indent, warns):
    value = [{"text": "Some words."}, {"text": "Others."}]
    content = json.dumps(value, indent=indent) if warns else "[1] Some words.\n{ x } are braces.\n"
    read([write(tmp_path / "a.json", content)])
    assert ("a.json: looks like JSON" in caplog.text) == warns


def test_html_and_a_text_of_one_document_warn(tmp_path, caplog):
    page = "<!DOCTYPE html>\n<html><body>\n<p>Some words of text.</p>\n<div>More words.</div>\n"
    paths = [write(tmp_path / "page.txt", page), write(tmp_path / "good.txt", "a < b\n\nuse <br> here\n\nc\n\nd\n")]
    read(paths)
    assert caplog.text.count("looks like HTML") == 1 and "page.txt: looks like HTML: 4 of its first 4" in caplog.text
    options = dict(vocab_size=100, sequence_length=16, mask_tokens=2, workers=1)
    for number, (blank, nsp) in enumerate([("\n", True), ("\n\n", True), ("\n", False)]):
        text = write(tmp_path / "text", blank.join(["some words of a text", "other words"] * 40))
        summary = prepare(PrepareOptions([text], str(tmp_path / f"out{number}"), nsp=nsp, **options), progress=False)
        assert ("(the text has 1)" in str(summary)) == (number == 0)
