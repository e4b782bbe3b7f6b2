"""HDF5 files that are written whole, or fail with one plain error."""

import contextlib
import io
from typing import Iterator

import h5py

__all__ = ["new_hdf5"]


@contextlib.contextmanager
def new_hdf5(path: str) -> Iterator[h5py.File]:
    """A new HDF5 file to write to. In the end it raises OSError that names it if a write failed, as on a full disk."""
    with KeptError(path, "w+") as file:
        with h5py.File(file, "w") as contents:
            yield contents
        if file.error is not None:
            raise OSError(f"{path}: cannot be written ({file.error.strerror})")


class KeptError(io.FileIO):
    """A file that keeps the first error of writing for later: HDF5 crashes the process when it cannot close a file."""

    error = None

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return size

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size
