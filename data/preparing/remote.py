"""Text that lies elsewhere, through fsspec: s3://, gs://, hf://, https:// and what else it knows.

fsspec and the packages of its protocols are optional, and credentials are theirs to find. A file is read as a stream:
in blocks, each a request of its own, the next one fetched while one is read. So nothing is stored, and a reader that
pauses keeps no connection waiting. An HTTP server that cannot send a part of a file sends it in one piece.
"""

import io
import os
from typing import Any, BinaryIO, Dict, List, Tuple
from urllib.parse import unquote, urlsplit

from data.errors import InputError, PrepareStopped

__all__ = ["base_name", "find_remote", "is_url", "open_remote", "remote_size", "remote_state"]

BLOCK_BYTES = 8 << 20
HTTP = ("http", "https")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "mtime", "created")


def is_url(name: str) -> bool:
    return "://" in name


def base_name(path: str) -> str:
    """The name of a file by its path or URL, the same for both."""
    return os.path.basename(unquote(urlsplit(path).path) if path.split("://")[0] in HTTP else path)


def find_remote(url: str) -> List[str]:
    """The URLs of the files that a URL names, which may be a glob where its protocol lists files.

    Raises InputError that names the URL when there is none, it cannot be looked up, or a package is missing.
    """
    file_system, path = open_file_system(url)
    try:
        if set(path) & set("*[" if is_http(url) else "*?["):
            infos = file_system.glob(path, detail=True)
            found = [file_system.unstrip_protocol(name) for name, info in infos.items() if info["type"] == "file"]
        elif file_system.info(path)["type"] == "file":
            found = [url]
        else:
            raise InputError(f"{url}: is not a file; name the files in it, such as '{url.rstrip('/')}/*.txt'")
    except InputError:
        raise
    except Exception as error:  # what else a protocol raises, its package decides
        raise InputError(f"{url}: cannot be found ({reason(error)}); check the URL, the network and the credentials")
    if not found:
        raise InputError(f"{url}: no file matches; some servers do not list their files: there, name each")
    return found


def remote_size(url: str) -> int:
    """Bytes of a file. Raises InputError where the server does not tell."""
    return remote_state(url)[1]


def remote_state(url: str) -> List[Any]:
    """What tells whether a file is still the one that a stopped run has read: its URL, size, and any sign of its
    version."""
    file_system, path = open_file_system(url)
    try:
        info = file_system.info(path)
    except Exception as error:
        raise InputError(f"{url}: cannot be found ({reason(error)})")
    if info["size"] is None:
        raise InputError(
            f"{url}: the server does not say how many bytes it has, so that a download that breaks off cannot be told "
            "from a whole one; download the file and give its path"
        )
    return [url, info["size"], *(str(info[key]) for key in VERSIONS if key in info)]


def open_remote(url: str) -> BinaryIO:
    """A file to read; where the server sends parts of a file, from any place in it. Raises PrepareStopped, also later,
    when that breaks off."""
    return io.BufferedReader(RemoteFile(url), 1 << 20)  # type: ignore[return-value]  # mypy takes it for no BinaryIO


class RemoteFile(io.RawIOBase):
    """A remote file whose errors name it."""

    def __init__(self, url: str):
        self.url, self.size, self.done = url, remote_size(url), 0
        file_system, path = open_file_system(url)
        try:
            stream = self.size > BLOCK_BYTES and is_http(url) and not sends_parts(file_system, path)
            cache = {"cache_type": "background", "cache_options": {"maxblocks": 3}}
            self.file = file_system.open(path, block_size=0 if stream else BLOCK_BYTES, **({} if stream else cache))
        except Exception as error:
            raise self.broken(error)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            self.done = self.file.seek(offset, whence)
        except Exception as error:
            raise self.broken(error)
        return self.done

    def tell(self) -> int:
        return self.done

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.file.read(len(buffer))
            if not data and self.done < self.size:
                raise EOFError("no more came")
        except Exception as error:
            raise self.broken(error)
        buffer[: len(data)] = data
        self.done += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()

    def broken(self, error: Exception) -> PrepareStopped:
        return PrepareStopped(f"{self.url}: reading broke off at byte {self.done} of {self.size} ({reason(error)})")


def open_file_system(url: str) -> Tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    protocol = url.split("://")[0]
    settings: Dict[str, Any] = {}
    try:
        from fsspec.core import url_to_fs

        if protocol in HTTP:
            from aiohttp import ClientTimeout

            # By default all of a file has to come within 5 minutes.
            client = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60), "trust_env": True}
            settings = {"client_kwargs": client, "headers": {"Accept-Encoding": "identity"}}
        return url_to_fs(url, **settings)
    except ImportError as error:
        packages = " ".join(["fsspec", *filter(None, [PACKAGES.get(protocol)])])
        raise InputError(f"{url}: a package that {protocol}:// needs is missing ({error}): `pip install {packages}`")
    except ValueError as error:
        raise InputError(f"{url}: {error}; expected a protocol that fsspec knows, such as s3, gs, hf or https")


def sends_parts(file_system: Any, path: str) -> bool:
    """Whether an HTTP server sends a part of a file when it is asked for one."""
    with file_system.open(path, block_size=1, cache_type="none") as file:
        file.seek(1)
        try:
            return len(file.read(1)) == 1
        except ValueError:
            return False


def is_http(url: str) -> bool:
    return url.split("://")[0] in HTTP


def reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"
