"""Kills at the moments that matter: after each change of what lies on the disk."""

import itertools

from stores import BlockWriter
from stores.folder import Folder

CHANGES = ("write", "create", "remove", "clear", "move")


class Killed(BaseException):
    """What no code under test catches."""


def kill_after(monkeypatch, changes, kind=Folder):
    """The process seems to be killed after so many changes, or amid one that clears a place."""
    # Threads share it; a change that makes others is still the one it was counted as.
    numbers = itertools.count(1)
    for name in CHANGES:
        monkeypatch.setattr(kind, name, _counted(getattr(kind, name), numbers, changes))
    monkeypatch.setattr(BlockWriter, "append", _counted(BlockWriter.append, numbers, changes))


def _counted(change, numbers, last):
    def call(self, *arguments):
        clearing = change.__name__ == "clear"
        names = self.walk() if clearing else []
        if clearing and not (names or self.taken()):
            return
        killed = next(numbers) == last
        if clearing and killed:
            for name in names[::2]:
                self.remove(name)
            raise Killed
        change(self, *arguments)
        if killed:
            raise Killed

    return call
