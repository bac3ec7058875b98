"""On what kind of file system a path lies."""

from __future__ import annotations

from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")
_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "afs", "beegfs", "gpfs", "fuse")
"""What the names of file systems begin with whose files another machine, or another process, may take away."""


def file_system_of(path: Path) -> str:
    """Return the kernel's name of the file system a path lies on, such as 'ext4'; '' if unknown."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    where = path.resolve()
    found = [(point, kind) for _, point, kind, *_ in mounts if where.is_relative_to(_unescaped(point))]
    # The longest mount point is the innermost; of two at the same place the later one hides the other.
    return max(reversed(found), key=lambda mount: len(mount[0]), default=("", ""))[1]


def is_local(path: Path) -> bool:
    """Whether a path lies on a disk of this machine."""
    return not file_system_of(path).startswith(_REMOTE)


def _unescaped(point: str) -> str:
    """Undo the octal escapes of /proc/mounts, in which a space is a backslash and 040 (see `man 5 fstab`)."""
    return point.encode().decode("unicode_escape")
