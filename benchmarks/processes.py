"""A process for each of what is measured in turns: memory, allocator settings and compiled code are then its own."""

import multiprocessing
import sys

__all__ = ["Worker"]


class Worker:
    """A process that holds make(*arguments) until it is closed. It works while `ask` waits for it, and else idles."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, make) + arguments)
        self.process.start()
        other.close()  # held open here, it would hide that the process ended

    def ask(self, function, *arguments):
        """Calls function(what the process holds, *arguments) there, and returns its result."""
        try:
            self.pipe.send((function, arguments))
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            sys.exit(f"error: a process of the benchmark ended with exit code {self.process.exitcode}; see above")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pipe.close()
        self.process.join()


def serve(pipe, make, *arguments):
    held = make(*arguments)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(held, *arguments))
