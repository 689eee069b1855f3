"""Order on the simulated device: streams and host threads are vector clocks. Two accesses of
overlapping bytes, one of them a write, that nothing orders are a race."""

from collections import defaultdict
from collections.abc import Callable
from itertools import count

NUMBERS = count(1)


class Actor:
    """A stream or a host thread: what it has done, and what it knows that others have done."""

    def __init__(self, name: str) -> None:
        self.number = next(NUMBERS)
        self.name = name
        self.clock = {self.number: 1}

    def tick(self) -> int:
        self.clock[self.number] += 1
        return self.clock[self.number]

    def join(self, clock: dict[int, int]) -> None:
        """From now on it comes after what the clock says."""
        for number, time in clock.items():
            if self.clock.get(number, 0) < time:
                self.clock[number] = time

    def saw(self, number: int, time: int) -> bool:
        return self.clock.get(number, 0) >= time


Range = tuple[int, int]  # first byte, end
Users = dict[Actor, tuple[int, str]]  # when, and by what


class Accesses:
    """Who read and wrote which bytes of one storage last."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.num_actors = 0
        self.freed = False
        self._report = report
        self._written = defaultdict[Range, Users](dict)
        self._read = defaultdict[Range, Users](dict)
        self._actors = set[int]()

    def add(self, actor: Actor, bytes_: Range, is_write: bool, what: str) -> None:
        """The actor's clock has ticked for it."""
        if self.freed:
            self._report(f"{what} uses memory that was freed")
        self._actors.add(actor.number)
        if len(self._actors) > 1:
            self._compare(actor, bytes_, is_write, what)
        done = (actor.clock[actor.number], what)
        if is_write:
            self._written[bytes_] = {actor: done}
            self._read.pop(bytes_, None)
        else:
            self._read[bytes_][actor] = done

    def unordered_with(self, *after: Actor) -> list[str]:
        """What ran, and none of the actors has seen."""
        every = [*self._written.values(), *self._read.values()]
        return [
            f"{what} on {user.name}"
            for users in every
            for user, (time, what) in users.items()
            if user not in after and not any(one.saw(user.number, time) for one in after)
        ]

    def _compare(self, actor: Actor, bytes_: Range, is_write: bool, what: str) -> None:
        for table in (self._written, self._read) if is_write else (self._written,):
            for (first, end), users in table.items():
                if first >= bytes_[1] or bytes_[0] >= end:
                    continue
                for user, (time, before) in users.items():
                    if user is not actor and not actor.saw(user.number, time):
                        verb = "writes" if is_write else "reads"
                        other = "written" if table is self._written else "read"
                        self._report(
                            f"{what} on {actor.name} {verb} bytes {bytes_[0]}..{bytes_[1]} that "
                            f"{before} on {user.name} has {other}, unordered"
                        )
