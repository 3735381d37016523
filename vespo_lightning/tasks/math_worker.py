"""The process in which math-verify runs, so that it can be killed. Imports nothing else of this package.

Started as a script with the number of an inherited connection and the deadline in seconds. It sends
``"ready"``, then answers each ``(reference, answer)`` with True or False.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import sys
from multiprocessing.connection import Connection

from math_verify import parse, verify

#: Powers of powers eat memory faster than time; beyond this the worker fails instead of the machine.
MEMORY_LIMIT_BYTES = 4 << 30

_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\s+")


def same_answer(reference: str, answer: str) -> bool:
    """Whether math-verify holds two expressions for equal; False where it cannot read one of them.

    math-verify's own time limits are signals and work in main threads only: they are off, the parent's
    deadline takes their place.
    """
    return verify(_parse(reference), _parse(answer), timeout_seconds=None)


def _parse(expression: str) -> list[object]:
    # as one formula, so that it is not searched for numbers: "3 and a half" is not 3
    formula = _DELIMITERS.sub(" ", expression).replace("\\%", "%").strip()
    return parse(f"${formula}$", parsing_timeout=None)


def serve(connection: Connection, timeout_s: float) -> None:
    """Answer until the other side goes away."""
    connection.send("ready")
    while True:
        try:
            reference, answer = connection.recv()
        except EOFError:
            return
        # should the parent be gone by the time of the deadline, nobody else would end this process
        signal.alarm(math.ceil(timeout_s) + 10)
        connection.send(same_answer(reference, answer))
        signal.alarm(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the connection
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):  # not on this system, or a lower limit is already set
        pass
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))


if __name__ == "__main__":
    main()
