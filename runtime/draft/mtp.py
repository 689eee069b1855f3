"""A head for multi-token prediction: one decoder layer that predicts the token after the next one,
as the qwen3_5 family has it.

Row t takes the embedding of token t + 1 and the model's hidden state of token t behind its final
norm; the model's own head turns the result into the logits of token t + 2. A further step takes
what this one returned. T = rows, H = hidden size
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.format.checks import MTP_FILE
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.format.tensors import TensorFile, read_header
from subspec.artifacts.model import (
    FINAL_NORM,
    MTP,
    MTP_FINAL_NORM,
    MTP_NORMS,
    MTP_PROJECTION,
    layer_name,
)
from subspec.runtime.kernels.linear import Calls, calls_of
from subspec.runtime.memory import bytes_of
from subspec.runtime.model.transformer import (
    Pass,
    Rows,
    SharedWeights,
    add_layer,
    embed,
    make_shared,
    normalize,
    rms_norm,
)
from subspec.runtime.stream.digests import Digests


@dataclass(frozen=True)
class MtpHead:
    decoder: SharedWeights  # of a model of this one layer; embedding and ropes are the model's own
    tensors: Mapping[str, Tensor]

    def __call__(self, name: str, x: Tensor, calls: Calls, gate: Tensor | None = None) -> Tensor:
        """A product of the layer."""
        prefix = f"{MTP}.layers.0.{name}"
        product = F.linear(x, self.tensors[f"{prefix}.weight"], self.tensors.get(f"{prefix}.bias"))
        return product if gate is None else gate.mul_(product)


def next_hidden(head: MtpHead, rows: Rows, hidden: Tensor) -> Tensor:
    """hidden [T, H]: of each row's token, behind the final norm -> the head's own [T, H], behind
    its final norm. rows: of the tokens that follow these, with the positions that they are counted
    at, over a cache of the head's one attention."""
    style = head.decoder.spec.norm
    parts = zip(MTP_NORMS, (embed(head.decoder, rows.tokens), hidden), strict=True)
    normed = [rms_norm(style, head.tensors[f"{name}.weight"], part) for name, part in parts]
    x = F.linear(torch.cat(normed, dim=1), head.tensors[f"{MTP_PROJECTION}.weight"])
    now = Pass(head.decoder, [rows], calls_of([len(x)]), rows.positions)
    add_layer(now, 0, head, x)
    return normalize(head.decoder, FINAL_NORM, x)


def make_head(
    shared: SharedWeights, tensors: Mapping[str, Tensor], keep: Callable[[Tensor], Tensor]
) -> MtpHead:
    """tensors: those of `spec.mtp_shapes`, in the dtype of the model's activations. keep: see
    make_shared()."""
    assert shared.spec.mtp is not None
    spec = replace(shared.spec, layers=(shared.spec.mtp,), mtp=None)
    own = {f"{FINAL_NORM}.weight": tensors[f"{MTP_FINAL_NORM}.weight"]}
    for name, tensor in tensors.items():
        if name.startswith(f"{MTP}.layers.0."):
            own[f"{layer_name(0)}.{name.removeprefix(f'{MTP}.layers.0.')}"] = tensor
    decoder = make_shared(spec, shared.embedding, own, shared.tables, shared.dtype, keep)
    return MtpHead(decoder, tensors)


def read_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The head's tensors by name, on the host, as stored. Raises SubspecError(CORRUPT) if a byte of
    the file does not match its digest."""
    path, spec = artifact.path / MTP_FILE, artifact.spec
    [entry] = (one for one in artifact.manifest.files if one.path == MTP_FILE)
    digests = Digests(1)
    try:
        digests.check_file(path, entry)
        digests.finish()
    finally:
        digests.close()
    dtype: torch.dtype = getattr(torch, spec.dtype)
    header, found = read_header(path), dict[str, Tensor]()
    with TensorFile(path) as file:
        for name, shape in spec.mtp_shapes.items():
            found[name] = torch.empty(shape, dtype=dtype)
            file.read_into(bytes_of(found[name].view(-1).view(torch.uint8)), header[name].offset)
    return found
