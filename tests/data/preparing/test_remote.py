"""Text by URL gives the bytes of the same files here. Each protocol is skipped where its package is missing."""

import contextlib
import functools
import gzip
import os
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import zstandard

from data.errors import InputError, PrepareStopped
from data.prepare import main
from data.preparing import remote, text_file
from data.preparing.corpus import documents as all_documents
from data.preparing.finding import find_files
from data.preparing.formats import with_formats
from data.preparing.remote import base_name, find_remote
from tests.data.preparing.test_corpus import check_formats, documents, write
from tests.data.preparing.test_formats import write_parquet
from tests.data.test_prepare import arguments, corpus, file_hashes, make, small_chunks


class Server(SimpleHTTPRequestHandler):
    """Python's own, which sends whole files only; with `parts` it sends parts, with `broken` it breaks off."""

    parts = broken = quiet = False
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        path = self.translate_path(self.path)
        asked = self.headers.get("Range") if self.parts else None
        if os.path.isdir(path) or not (asked or self.broken):
            return super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        first, last = map(int, asked[len("bytes=") :].split("-")) if asked else (0, len(data) - 1)
        content = data[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.broken else content)

    def send_header(self, name, value):
        if not (self.quiet and name == "Content-Length"):
            super().send_header(name, value)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(folder, **settings):
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Server,), settings)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.fixture
def fsspec():
    return pytest.importorskip("fsspec")


@pytest.mark.parametrize("parts", [False, True])
def test_http_gives_the_bytes_of_local_files_from_servers_that_send_parts_and_that_do_not(
    corpus, tmp_path, small_chunks, monkeypatch, parts
):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    make(corpus, tmp_path / "here", held_out=0.1)
    with serving(corpus, parts=parts) as (url, handler):
        names = [f"{url}/0.txt", f"{url}/1.txt?key=secret"]
        make(corpus, tmp_path / "there", held_out=0.1, input=names)
        assert find_files([f"{url}/*.txt"]) == [f"{url}/0.txt", f"{url}/1.txt"]  # of the folder's page
        assert (handler.requests > 25) == parts, handler.requests
    assert file_hashes(tmp_path / "there") == file_hashes(tmp_path / "here")
    assert sorted(os.listdir(tmp_path)) == ["here", "there"]


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_globs_of_urls_give_the_bytes_of_local_files_also_packed_and_in_parts(corpus, tmp_path, fsspec, protocol):
    folder = str(tmp_path / "text") if protocol == "file" else "/" + os.path.basename(str(tmp_path))
    here = tmp_path / "text"
    here.mkdir()
    (here / "0.txt.gz").write_bytes(gzip.compress((corpus / "0.txt").read_bytes()))
    (here / "1.txt.zst").write_bytes(zstandard.compress((corpus / "1.txt").read_bytes()))
    (here / "folder.txt.d").mkdir()
    if protocol == "memory":
        memory = fsspec.filesystem("memory")
        for name in ("0.txt.gz", "1.txt.zst"):
            memory.pipe(f"{folder}/{name}", (here / name).read_bytes())
    options = dict(input=[f"{protocol}://{folder}/*.txt.*"])
    make(corpus, tmp_path / "here", input=[str(here / "*.txt.*")])
    make(corpus, tmp_path / "there", **options)
    for number in (2, 1):
        command = arguments(corpus, tmp_path / "parts", "--input", *options["input"])
        assert main([*command, "--part", f"{number}/2"]) == 0
    assert main([*command, "--finish", "2"]) == 0
    for made in ("there", "parts"):
        assert file_hashes(tmp_path / made) == file_hashes(tmp_path / "here")


@pytest.mark.parametrize("parts", [False, True])
def test_tables_are_read_from_urls_parquet_where_the_server_sends_parts(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    texts = [f"text {number * 7919 % 5003}" for number in range(5000)]
    write(tmp_path / "a.csv", "\n".join(["text", *texts]))
    write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=700)
    with serving(tmp_path, parts=parts) as (url, _):
        files = with_formats([f"{url}/a.csv?key=secret", f"{url}/a.parquet"], "auto", "utf-8", "text")
        assert [lines for _, lines in all_documents(files[:1])] == [[text] for text in texts]
        if not parts:
            with pytest.raises(PrepareStopped, match="a.parquet: reading broke off"):
                list(all_documents(files[1:]))
            return
        assert [lines for _, lines in all_documents(files[1:])] == [[text] for text in texts]


def test_s3_gives_the_bytes_of_local_files(corpus, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        for name in ("0.txt", "1.txt"):
            files.put(str(corpus / name), f"bucket/corpus/{name}")
        make(corpus, tmp_path / "here")
        make(corpus, tmp_path / "there", input=["s3://bucket/corpus/*.txt"])
        assert file_hashes(tmp_path / "there") == file_hashes(tmp_path / "here")
        for name, message in (
            ("none*.txt", "no file matches"),
            ("none.txt", "cannot be found"),
            ("corpus", "not a file"),
        ):
            with pytest.raises(InputError, match=f"s3://bucket/.*{message}"):
                find_files([f"s3://bucket/{name}"])
    finally:
        server.stop()


@pytest.mark.parametrize("parts", [False, True])
def test_a_download_that_breaks_off_names_the_url_and_the_same_command_goes_on(
    corpus, tmp_path, small_chunks, monkeypatch, parts
):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 20000 if parts else 1000)
    monkeypatch.setattr(text_file, "READ_BYTES", 100)
    with serving(corpus, parts=parts) as (url, handler):
        files = [f"{url}/0.txt"]
        read = documents(files)
        next(read)
        handler.broken = True
        with pytest.raises(PrepareStopped, match=r"http://.*/0.txt: reading broke off at byte \d+ of \d+ \(.*Error"):
            list(documents(files))
        monkeypatch.setattr("data.prepare.check_formats", lambda *arguments: None)
        with pytest.raises(PrepareStopped, match="reading broke off"):
            make(corpus, tmp_path / "out", input=files, format="lines")
        assert os.listdir(tmp_path) == [".out.unfinished"]
        handler.broken = False
        make(corpus, tmp_path / "out", input=files, format="lines")
        make(corpus, tmp_path / "here", input=[str(corpus / "0.txt")])
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "here")


def test_a_file_that_ends_before_its_size_is_named(fsspec, monkeypatch):
    fsspec.filesystem("memory").pipe("/ends/early.txt", b"one\ntwo\n")
    monkeypatch.setattr(remote, "remote_size", lambda url: 12)
    with pytest.raises(PrepareStopped, match="memory://ends/early.txt: reading broke off at byte 8 of 12"):
        list(documents(["memory://ends/early.txt"]))


def test_a_server_that_is_not_there_or_lacks_the_file_or_its_size_is_named(corpus, fsspec):
    with serving(corpus) as (url, handler):
        with pytest.raises(InputError, match=r"/none.txt: cannot be found \(.*404.*check the URL"):
            find_files([f"{url}/none.txt"])
        with pytest.raises(InputError, match=r"\*.html: no file matches; some servers do not list"):
            find_files([f"{url}/*.html"])
        handler.quiet = True
        with pytest.raises(InputError, match=r"/0.txt: the server does not say how many bytes it has"):
            check_formats(find_files([f"{url}/0.txt"]), "lines")
    with pytest.raises(InputError, match=r"/0.txt: cannot be found \(.*Error"):
        find_files([f"{url}/0.txt"])
    with pytest.raises(InputError, match="memory://nothing: cannot be found"):
        find_files(["memory://nothing"])
    with pytest.raises(InputError, match=r"file:///: is not a file; name the files in it, such as"):
        find_files(["file:///"])
    with pytest.raises(InputError, match="nowhere://a: .*nowhere.*; expected a protocol that fsspec knows"):
        find_files(["nowhere://a"])


@pytest.mark.parametrize(
    "url, missing, package",
    [("s3://b/a", "fsspec", "s3fs"), ("gs://b/a", "gcsfs", "gcsfs"), ("https://h/a", "aiohttp", "aiohttp")],
)
def test_a_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch, url, missing, package):
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=f"{url}: a package that .* needs is missing .*`pip install fsspec {package}`"):
        find_remote(url)


def test_a_file_has_the_same_name_by_its_path_and_its_url():
    assert base_name("https://host/a/b%20c.txt.gz?key=secret#top") == base_name("/a/b c.txt.gz") == "b c.txt.gz"
    assert base_name("s3://bucket/a/b?.txt") == "b?.txt"


def test_preparing_local_text_needs_no_fsspec(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    make(corpus, tmp_path / "out")
