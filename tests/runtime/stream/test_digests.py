import hashlib

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.stream.digests import Digests


def test_a_part_that_differs_is_corrupt_when_all_are_waited_for() -> None:
    digests = Digests(2)
    stored = torch.arange(100, dtype=torch.uint8)
    digests.check_part("model.norm.0", stored, hashlib.sha256(b"other").hexdigest(), None)
    with pytest.raises(SubspecError, match=r"model\.norm\.0 does not match its digest") as caught:
        digests.finish()
    assert caught.value.exit_code == Exit.CORRUPT
    digests.close()
