"""A terminal as far as a line of progress needs one: what is seen at the end, and a command's bytes in a real one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios

CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def in_terminal(argv: list[str], columns: int, **environment: str) -> tuple[int, str]:
    """Exit status of ``python ARGV`` in a pseudo-terminal of that width, and all that it wrote there."""
    size = struct.pack("HHHH", 24, columns, 0, 0)
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            os.environ.pop("COLUMNS", None)
            os.environ.pop("NO_COLOR", None)
            os.environ.update({"TERM": "xterm-256color", **environment})
            os.execv(sys.executable, [sys.executable, *argv])
        finally:
            os._exit(127)
    parts = []
    try:
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    except OSError:  # Linux' way to say that nobody is at the other end
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), b"".join(parts).decode()


def screen(text: str) -> list[str]:
    """The lines that are seen once ``text`` was written, without colours.

    It knows line feed, carriage return, colours, and the erasing of a line; anything else is an error.
    """
    lines: list[list[str]] = [[]]
    column, at = 0, 0
    while at < len(text):
        code = CODE.match(text, at)
        if code:
            assert code[2] in "Km", f"unexpected code {code[0]!r}"
            if code[2] == "K":
                lines[-1] = [] if code[1] == "2" else lines[-1][:column]
            at = code.end()
            continue
        mark, at = text[at], at + 1
        if mark == "\n":
            lines.append([])
            column = 0
        elif mark == "\r":
            column = 0
        else:
            line = lines[-1]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = mark
            column += 1
    return ["".join(line).rstrip() for line in lines]


def states(text: str) -> list[str]:
    """Every state that a line had, in order, without codes."""
    return [CODE.sub("", state) for state in re.split(r"[\r\n]+", text) if CODE.sub("", state)]
