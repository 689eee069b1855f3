"""Children end with whoever waits for them, and take their own children along."""

import os
import time

import pytest

from subspec.artifacts.common.child import child_process, end_group, start_child

# It ends at once, and prints the number of a process that it leaves in its group.
LEAVES = ["sh", "-c", "sleep 77 >/dev/null 2>&1 & echo $!"]


def has_ended(number: int) -> bool:
    """Within seconds; a zombie has."""
    for _ in range(100):
        try:
            with open(f"/proc/{number}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is not there")
def test_who_is_left_of_a_group_is_ended_also_after_its_first_process() -> None:
    with start_child(LEAVES) as child:
        out, _ = child.communicate()
        assert child.returncode == 0
        end_group(child)
    assert has_ended(int(out))
    with pytest.raises(KeyError), child_process(LEAVES) as child:
        out, _ = child.communicate()
        raise KeyError
    assert has_ended(int(out))
