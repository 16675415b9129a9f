"""Kills at the moments that matter: after each change of what lies on the disk."""

from stores import BlockWriter
from stores.folder import Folder

CHANGES = ("write", "create", "remove", "clear", "move")


class Killed(BaseException):
    """What no code under test catches."""


def kill_after(monkeypatch, changes, kind=Folder):
    """The process seems to be killed after so many changes, or amid one that clears a place."""
    left = [changes]
    for name in CHANGES:
        monkeypatch.setattr(kind, name, _counted(getattr(kind, name), left))
    monkeypatch.setattr(BlockWriter, "append", _counted(BlockWriter.append, left))


def _counted(change, left):
    def call(self, *arguments):
        clearing = change.__name__ == "clear"
        names = self.walk() if clearing else []
        if clearing and not (names or self.taken()):
            return
        left[0] -= 1
        if clearing and not left[0]:
            for name in names[::2]:
                self.remove(name)
            raise Killed
        change(self, *arguments)
        if not left[0]:
            raise Killed

    return call
