"""The first process of ``sandbox``: reads a program from standard input, runs it under limits in a
process of its own, and writes one JSON object: the token if the program ran to its end, else the
reason. It uses only the standard library, since it is started without site packages.

The program is confined, as far as the kernel supports each, by namespaces (no network, other
processes invisible), Landlock (no writing outside its directory), seccomp (no new processes, no
signals to others, no sockets, no changes of file modes) and resource limits.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any

NEW_USER, NEW_NETWORK, NEW_PROCESSES, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
SET_DEATH_SIGNAL, SET_SUBREAPER, NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 36, 38, 22, 2

libc = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """Cuts this process off from the network and from seeing others, if the kernel allows it.

    The next process that is started is the first of a new process namespace: when it ends, the
    kernel ends all others in there.
    """
    apart = NEW_NETWORK | NEW_PROCESSES | NEW_IPC
    if os.geteuid() == 0 and libc.unshare(apart) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_USER | apart) != 0:
        return
    for name, mapped in (("uid_map", user), ("setgroups", None), ("gid_map", group)):
        with suppress(OSError), open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write("deny" if mapped is None else f"{mapped} {mapped} 1")


CREATE_RULESET, ADD_RULE, RESTRICT_SELF, VERSION = 444, 445, 446, 1
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))


def keep_writes_here() -> None:
    """Forbids writing, creating or removing files outside the working directory from here on."""
    version = libc.syscall(CREATE_RULESET, None, 0, VERSION)
    if version < 1:
        return
    in_place = WRITE_FILE | (TRUNCATE if version >= 3 else 0)
    rules = libc.syscall(CREATE_RULESET, struct.pack("Q", in_place | REMOVE_AND_MAKE), 8, 0)
    for path, allowed in ((".", in_place | REMOVE_AND_MAKE), (os.devnull, in_place)):
        opened = os.open(path, os.O_PATH)
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    libc.syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


# machine -> its name in the kernel; the number of clone; the refused calls: fork, vfork, kill, and
# calls that neither namespaces nor Landlock restrict: socket (for files), chmod, fchmod, chown,
# fchown, lchown, fchownat, fchmodat, utimensat
CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 62, 41, 90, 91, 92, 93, 94, 260, 268, 280)),
    "aarch64": (0xC00000B7, 220, (129, 198, 52, 53, 54, 55, 88)),
}
PIDFD_SEND_SIGNAL, FCHMODAT2 = 424, 452  # for every machine
CLONE3, CLONE_THREAD = 435, 0x10000
LOAD, IF_EQUAL, IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def refuse_calls() -> None:
    """Forbids, from here on, new processes (threads are allowed), signals to others, sockets, and
    changes of a file's mode, owner or times."""
    if platform.machine() not in CALLS:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))  # this limit does not apply to root
        return
    machine, clone, refused = CALLS[platform.machine()]
    refuse = (RETURN, 0, 0, REFUSE | errno.EPERM)
    steps = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, machine), refuse, (LOAD, 0, 0, 0)]
    for call in (*refused, PIDFD_SEND_SIGNAL, FCHMODAT2):
        steps += [(IF_EQUAL, 0, 1, call), refuse]
    # The C library then falls back to clone, whose flags a filter can read.
    steps += [(IF_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    steps += [(IF_EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (IF_SET, 1, 0, CLONE_THREAD), refuse]
    steps += [(RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc.prctl(SET_SECCOMP, FILTER, program)


def end_with_reader(pipe: int) -> None:
    """Ends this process with its parent, which reads the pipe; now, if it has ended before."""
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    poll = select.poll()
    poll.register(pipe, 0)  # errors are ignored: they mean that the reader has ended
    if poll.poll(0):
        os._exit(1)


def run(task: dict[str, Any], told: int) -> None:
    """Runs the program in this process, and writes the token once it has run to its end."""
    end_with_reader(told)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    keep_writes_here()
    refuse_calls()
    for kind, most in (
        (resource.RLIMIT_CPU, task["cpu_s"]),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    end = "passed"
    try:
        exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        end = f"{type(error).__name__}: {error}"[:200]
    os.write(told, (task["token"] if end == "passed" else end).encode("utf-8", "replace"))
    os._exit(0)


def end_descendants() -> None:
    """Ends all processes that the program left. Orphans are children of this process by then."""
    while True:
        with suppress(ProcessLookupError):
            for child in children():
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(number) for number in file.read().split()]


MOST_TOLD = 4096
"""The most bytes of the report of a program's process that are kept."""


def wait(child: int, listening: int, wall_s: float) -> tuple[str, int | None]:
    """Waits for the end of the program's process or for ``wall_s``. Returns its report, and its
    wait status, None if it still runs."""
    until = time.monotonic() + wall_s
    told = b""
    while time.monotonic() < until:
        if listening in select.select([listening], [], [], 0.05)[0]:
            piece = os.read(listening, 4096)
            told = (told + piece)[:MOST_TOLD]
            if piece:
                continue
            time.sleep(0.005)  # it has ended, or has closed its end of the pipe and still runs
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return told.decode("utf-8", "replace"), status
    return "", None


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    end_with_reader(sys.stdout.fileno())
    libc.prctl(SET_SUBREAPER, 1)
    leave_network()
    listening, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(listening)
        run(task, told)
    os.close(told)
    said, status = wait(child, listening, task["wall_s"])
    end_descendants()
    if status is None:
        reason = f"still running after {task['wall_s']:g} s"
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        over = number in (signal.SIGXCPU, signal.SIGKILL)
        reason = f"more than {task['cpu_s']} s of CPU" if over else signal.Signals(number).name
    else:
        reason = said or f"exit status {os.WEXITSTATUS(status)} before its end"
    token = said if said == task["token"] else ""
    print(json.dumps({"token": token, "reason": reason}))


if __name__ == "__main__":
    main()
