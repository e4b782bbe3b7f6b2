import pytest

from data.errors import InputError
from data.loading import ring


def group(folder, monkeypatch, limit, current=0, files=0):
    for name, content in (
        ("memory.max", limit),
        ("memory.current", current),
        ("memory.stat", f"anon 7\ninactive_file {files // 2}\nactive_file {files - files // 2}"),
    ):
        (folder / name).write_text(f"{content}\n")
    monkeypatch.setattr(ring, "CONTROL_GROUP", str(folder))


def test_a_containers_limit_bounds_the_memory_that_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "CONTROL_GROUP", str(tmp_path))
    machine = ring.available_memory()
    assert machine > 100 << 20
    group(tmp_path, monkeypatch, 50 << 20, current=40 << 20, files=25 << 20)
    assert ring.available_memory() == 35 << 20
    group(tmp_path, monkeypatch, 50 << 20, current=60 << 20)
    assert ring.available_memory() == 0
    group(tmp_path, monkeypatch, "max", current=40 << 20)
    assert ring.available_memory() > machine // 2


def test_batches_beyond_a_containers_limit_are_refused(tmp_path, monkeypatch):
    group(tmp_path, monkeypatch, 50 << 20, current=40 << 20)
    ring.shared_file(1 << 20).close()
    with pytest.raises(InputError, match="need 20.0 MB in memory, 10.5 MB are available"):
        ring.shared_file(20000000)
