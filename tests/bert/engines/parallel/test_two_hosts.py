"""Two hosts, as network namespaces with a link between them: torchrun on each trains one run, also when the link is
cut, and when it is back."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.bert.engines.parallel.started import SMALL, environment, torchrun_command
from tests.bert.run.runs import arguments, checkpoints, make_shards, read_lines, saved_step

ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
CONF = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5,read_timeout=10,close_timeout=1"
TIMEOUT = 12


@contextlib.contextmanager
def namespace(command):
    """A process that keeps namespaces of its own."""
    keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if keeper.stdout.readline() != b"there\n":
            pytest.skip(f"namespaces are not allowed here: {keeper.communicate()[1].decode().strip()}")
        yield keeper
    finally:
        keeper.kill()
        keeper.communicate()


@pytest.fixture
def hosts():
    """Name -> the words before a command that runs it on that host; what sets the link up or down; and an ExitStack."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("unshare, nsenter and ip are not all here")
    with contextlib.ExitStack() as closing:
        users = closing.enter_context(namespace(["unshare", "-Ur", "sh", "-c", "echo there; exec sleep 600"]))
        inside = ["nsenter", "--preserve-credentials", "-U", "-t", str(users.pid)]
        words = {}
        for host in ADDRESSES:
            keep = ["unshare", "-nu", "sh", "-c", f"hostname {host}; echo there; exec sleep 600"]
            keeper = closing.enter_context(namespace([*inside, *keep]))
            words[host] = ["nsenter", "--preserve-credentials", "-U", "-n", "-u", "-t", str(keeper.pid)]
        run = subprocess.check_call
        pid = words["two"][-1]
        run([*words["one"], "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pid])
        for host, address in ADDRESSES.items():
            run([*words[host], "ip", "address", "add", f"{address}/24", "dev", "eth0"])
            for device in ("lo", "eth0"):
                run([*words[host], "ip", "link", "set", device, "up"])
        yield words, lambda state: run([*words["two"], "ip", "link", "set", "eth0", state]), closing


class Started:
    """torchrun on a host."""

    def __init__(self, closing, folder, words, host, name, command):
        options = ["--nnodes", "1:2", "--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
        options += ["--rdzv-endpoint", f"{ADDRESSES['one']}:29400", "--local-addr", ADDRESSES[host]]
        options += ["--rdzv-conf", f"is_host={int(host == 'one')},{CONF}"]
        self.output = folder / f"{name}.txt"
        command = [*words, *torchrun_command(1, folder / name, command, options=options)]
        with open(self.output, "w") as file:
            own = environment(GLOO_SOCKET_IFNAME="eth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            self.process = subprocess.Popen(command, env=own, stdout=file, stderr=file)
        closing.callback(self.end)

    def count(self, words):
        return self.output.read_text().count(words)

    def wait_for(self, words, times=1, after=""):
        """`after`: counts from where these words are for the last time."""
        until = time.monotonic() + 120
        while self.output.read_text().rpartition(after or "\0")[2].count(words) < times:
            assert time.monotonic() < until and self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(60)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_where_the_link_is_cut_one_host_goes_on_and_both_do_when_it_is_back(hosts, tmp_path):
    words, link, closing = hosts
    changes = {**SMALL, "training__max_steps": 100000, "parallel__timeout": TIMEOUT}
    command = arguments(tmp_path, make_shards(tmp_path / "shards"), **changes)
    one, two = (Started(closing, tmp_path, words[host], host, host, command) for host in ADDRESSES)
    one.wait_for("2 processes")
    one.wait_for("  loss ", after="2 processes")  # on a slow machine the first may have begun alone
    link("down")
    one.wait_for("error: process 0 of 2: process 1 on two has ended or hangs")
    two.wait_for("error: process 1 of 2: process 0 on one has ended or hangs")
    two.end(signal.SIGKILL)
    one.wait_for("device: cpu (1 threads), float32", after="has ended or hangs")  # alone, started by its torchrun
    alone = saved_step(checkpoints(tmp_path)[-1])
    one.wait_for(f"step {alone + 2}/")
    times = one.count("2 processes")
    link("up")
    again = Started(closing, tmp_path, words["two"], "two", "again", command)
    one.wait_for("2 processes", times=times + 1)
    together = saved_step(checkpoints(tmp_path)[-1])
    assert together > alone
    one.wait_for(f"step {together + 2}/")
    one.end()
    again.process.wait(90)
    said = again.output.read_text()
    assert "has ended or hangs" not in said, said
    assert one.count("continues from") >= 2
    steps = [line["step"] for line in read_lines(tmp_path)]
    assert steps == sorted(set(steps)) and saved_step(checkpoints(tmp_path)[-1]) >= steps[-1] > together
