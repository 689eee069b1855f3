import hashlib
import threading

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.stream.digests import Digests


def digest_threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("subspec-digest")}


def test_threads_end_with_their_checks_and_others_follow() -> None:
    """One that has run torch would keep OpenMP threads, which slow down everyone's barriers."""
    before, digests = digest_threads(), Digests(2)
    done = []
    for count in (1, 2):
        digests.submit(lambda: done.append(torch.ones(1 << 20).sum().item()))
        digests.finish()
        assert done == [1 << 20] * count
        assert digest_threads() <= before
    digests.close()


def test_a_part_that_differs_is_corrupt_when_all_are_waited_for() -> None:
    digests = Digests(2)
    stored = torch.arange(100, dtype=torch.uint8)
    digests.check_part("model.norm.0", stored, hashlib.sha256(b"other").hexdigest(), None)
    with pytest.raises(SubspecError, match=r"model\.norm\.0 does not match its digest") as caught:
        digests.finish()
    assert caught.value.exit_code == Exit.CORRUPT
    digests.close()
