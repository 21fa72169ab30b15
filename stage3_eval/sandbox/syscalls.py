"""The system calls that a program in the sandbox is refused, as a seccomp filter. Called by `sandbox`.

Namespaces and limits leave gaps that the filter closes: the limit on processes does not bind the root user; shared
memory that is detached again, and files in memory, count towards no process. So a program is one process with one
thread, has no socket, and no memory that outlives it: what the kernel keeps for it (pages of pipes, inodes of its
folder) is not counted towards its limit, and goes with the sandbox. Everything refused fails with EPERM.
"""

import platform
import struct

from pipeline.errors import RunError

# name -> number on x86-64, on arm64 (None: there is none); linux/asm/unistd_64.h and asm-generic/unistd.h
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # another process or thread
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    # a namespace or a mount
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # a socket, or calls that pass the filter by
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    # memory that no process is charged for
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # other processes, and the kernel's larger surfaces
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's AUDIT_ARCH
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF: absolute word, jump if ==, if >=, return
_NUMBER_AT, _MACHINE_AT = 0, 4  # offsets in struct seccomp_data
_X32 = 0x40000000  # numbers from here are the x32 calls of an x86-64 kernel
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # the whole process; EPERM; go on


def program() -> bytes:
    """The filter as `struct sock_filter`s. Raises RunError on a machine whose numbers are not in the table."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise RunError(f"programs are run on {' and '.join(_MACHINES)} only, found {machine}; leave their task out")
    column, audit = _MACHINES[machine]
    steps = [
        *[(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)],
        *[(_LOAD, 0, 0, _NUMBER_AT), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)],
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
