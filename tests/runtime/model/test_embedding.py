"""Embedding rows from slow memory are those of the matrix, or an error."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import StoredTensor, read_header
from subspec.runtime.memory import bytes_of
from subspec.runtime.model import embedding
from subspec.runtime.model.embedding import FileRows, MappedRows, gather_on_host

V, H = 300, 48
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def written(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Path, StoredTensor]:
    """The matrix, the file that it is in, with other tensors around it, and where."""
    table = torch.randn(V, H, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = folder / "resident.safetensors"
    save_file({"a": torch.ones(7), "embedding": table, "z": torch.ones(5, dtype=dtype)}, path)
    return table, path, read_header(path)["embedding"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [[0], [V - 1], [0, V - 1, 0], [5, 5, 5], [*range(V)][::-1], []])
def test_rows_of_a_file_are_those_of_the_matrix(
    dtype: torch.dtype, tokens: list[int], tmp_path: Path
) -> None:
    table, path, stored = written(tmp_path, dtype)
    rows, ids = FileRows(path, stored, dtype), torch.tensor(tokens, dtype=torch.int64)
    for _ in range(2):
        assert torch.equal(rows(ids), table[ids])
    rows.close()


def test_rows_are_read_when_they_are_asked_for_and_are_the_callers_own(tmp_path: Path) -> None:
    table, path, stored = written(tmp_path)
    rows = FileRows(path, stored, torch.bfloat16)
    first = rows(torch.tensor([3]))
    first.zero_()
    assert torch.equal(rows(torch.tensor([3])), table[[3]])
    rows.close()


@pytest.mark.parametrize("missing", [1, H * 2, 3 * H * 2])
def test_a_file_that_ends_within_a_row_is_an_error_that_names_it(
    missing: int, tmp_path: Path
) -> None:
    table, path, stored = written(tmp_path)
    rows = FileRows(path, stored, torch.bfloat16)
    with open(path, "r+b") as file:
        file.truncate(stored.offset + table.nbytes - missing)
    assert torch.equal(rows(torch.tensor([0, V - 4])), table[[0, V - 4]])
    with pytest.raises(SubspecError, match=f"embedding row of token {V - 1}") as caught:
        rows(torch.tensor([0, V - 1]))
    assert caught.value.exit_code == Exit.CORRUPT and path.name in caught.value.message
    rows.close()


def test_the_plain_twin_of_mapped_rows_gathers_on_the_host(tmp_path: Path) -> None:
    table, _, _ = written(tmp_path)
    ids = torch.tensor([0, V - 1, 17, 17])
    got = gather_on_host(table, ids)
    assert torch.equal(got, table[ids]) and got.device == ids.device


@pytest.fixture
def host_only(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Mapped rows without a GPU: what is pinned and not unpinned."""
    pinned = list[Tensor]()

    def pin(num_bytes: int) -> Tensor:
        pinned.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return pinned[-1]

    def unpin(buffer: Tensor) -> None:
        [index] = [n for n, one in enumerate(pinned) if one is buffer]
        del pinned[index]

    monkeypatch.setattr(embedding, "pinned_buffer", pin)
    monkeypatch.setattr(embedding, "unpin", unpin)
    monkeypatch.setattr(embedding, "mapped_on", lambda host, device: host)
    return pinned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mapped_rows_are_a_copy_of_the_matrix_and_give_it_back(
    dtype: torch.dtype, host_only: list[Tensor], tmp_path: Path
) -> None:
    table, path, stored = written(tmp_path, dtype)
    rows = MappedRows(path, stored, dtype, torch.device("cpu"))
    ids = torch.tensor([V - 1, 0, 3])
    assert torch.equal(rows.host, table)
    assert torch.equal(rows(ids), gather_on_host(rows.host, ids))
    assert bytes(bytes_of(host_only[0])) == bytes(bytes_of(table.view(torch.uint8).view(-1)))
    rows.close()
    assert host_only == []


def test_a_truncated_matrix_is_an_error_and_leaves_nothing_pinned(
    host_only: list[Tensor], tmp_path: Path
) -> None:
    table, path, stored = written(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(stored.offset + table.nbytes - 1)
    with pytest.raises(SubspecError, match="ends within the embedding") as caught:
        MappedRows(path, stored, torch.bfloat16, torch.device("cpu"))
    assert caught.value.exit_code == Exit.CORRUPT and host_only == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gathers_the_rows_that_the_plain_twin_does(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    table, path, stored = written(tmp_path, dtype)
    device = torch.device("cuda", 0)
    rows = MappedRows(path, stored, dtype, device)
    ids = torch.tensor([0, V - 1, 0, 17], device=device)
    assert torch.equal(rows(ids), gather_on_host(rows.host, ids))
    assert torch.equal(rows(ids).cpu(), table[ids.cpu()])
    torch.cuda.synchronize()
    rows.close()
