"""Errors a user can mend. The CLI prints them without a traceback and exits with status 2."""

import errno


class UserError(Exception):
    """Something the user can mend: what was found, what was expected, and the next command.

    Args:
        found: what is there, in words, with the offending value or path.
        expected: what should have been there.
        next_step: the command (or edit) that mends it.
    """

    def __init__(self, found: str, expected: str, next_step: str):
        self.found, self.expected, self.next_step = found, expected, next_step
        super().__init__(f"found: {found}\nexpected: {expected}\nnext: {next_step}")

    def __reduce__(self) -> tuple:
        """Travels between processes: an exception is rebuilt from its message unless it says how."""
        return type(self), (self.found, self.expected, self.next_step)


def mendable(error: UserError | OSError) -> UserError | None:
    """What a user can mend, a folder that cannot be written included; None where it is a defect of ours."""
    if isinstance(error, UserError):
        return error
    mend = {
        errno.ENOSPC: "free some space (df -h) and run the same command again: what is finished is kept",
        errno.EDQUOT: "free some space (quota) and run the same command again: what is finished is kept",
        errno.EACCES: "name another folder, or change the permissions (ls -ld shows them)",
        errno.EPERM: "name another folder, or change the permissions (ls -ld shows them)",
        errno.EROFS: "name a folder on a disk that can be written",
        errno.EIO: "name a folder on a local disk, or see what the system says of this one (dmesg)",
        errno.ENOTDIR: "name another folder: a file is in the way",
        errno.EEXIST: "name another folder: a file is in the way",
    }.get(error.errno or 0)
    if mend is None:
        return None
    return UserError(f"{error.filename or 'a file'}: {error.strerror}", "a folder with room and permission", mend)


FEW = 10


def nearest(name: str, known: list[str]) -> str:
    """``"a, b"``: the known names closest to a misspelt one (the first few where none is close)."""
    import difflib

    if close := difflib.get_close_matches(name, known, n=3):
        return ", ".join(close)
    return ", ".join(sorted(known)[:FEW]) + (", ..." if len(known) > FEW else "")
