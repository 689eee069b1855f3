"""Checkpoints in FP8: what config.json says about them, and the scales beside their matrices.

Two ways of writing them are read: that of transformers' fine-grained FP8 (DeepSeek, Qwen), with
scales of blocks in `weight_scale_inv`, and that of compressed-tensors, with scales of channels,
tensors or blocks in `weight_scale`. A target is exact: its weights are the FP8 codes times their
scales, rounded once to bfloat16, and activations stay bfloat16. What other engines do to
activations, by `activation_scheme` or `input_activations`, is not part of it.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import GROUP_SIZE, HEAD, ModelSpec, ScaleBlock
from subspec.planner.model.fields import MAX_WIDTH, Fields
from subspec.planner.model.names import stored_names
from subspec.planner.model.stored import (
    AGAIN,
    Rows,
    StoredTensor,
    StoredTensors,
    read_pieces,
    read_small,
)

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZATION = "quantization_config"
E4M3 = "F8_E4M3"
EXPONENTS = "U8"  # a dtype of scales: F8_E8M0 by another name, as MXFP8 checkpoints store it
SCALE_DTYPES = ("BF16", "F16", "F32", "F8_E8M0", EXPONENTS)
USUAL_BLOCK = (128, 128)  # of fine-grained FP8 that does not say, as in transformers
SUFFIXES = ("_scale_inv", "_scale")  # of the name of the weight that they belong to
LINEAR = "Linear"  # in place of a name: all of them
PATTERN = "re:"  # what a name begins with that is a regular expression
MAX_PATTERN, MAX_PATTERNS = 200, 64
MAX_REPEATS, MAX_CHOICES = 3, 8  # in a pattern, which would otherwise take forever
NEEDED_FOR_INT8 = (
    "; 8-bit integers as exact targets would need an encoding of their own, their upper four bits "
    "as the substitute and the lower four streamed"
)
ORIGINAL = "use the original checkpoint in bfloat16: we make the 4-bit copy"
PACKED = ("U8", "I8")  # dtypes of weights that share a byte
MODELOPT = "hf_quant_config.json"  # where NVIDIA's ModelOpt writes how it quantised


@dataclass(frozen=True)
class Quantization:
    """FP8 settings of config.json."""

    block: tuple[int, int] | None  # rows and columns of a block, if scales belong to blocks
    per_channel: bool  # of matrices without blocks: a scale for each row, else one for all
    kept: tuple[str, ...]  # which modules are not in FP8, by _chosen
    targets: tuple[str, ...] = (LINEAR,)  # which are, but for those


@dataclass(frozen=True)
class StoredScales:
    """The scales of a matrix: those of a stored tensor from `first` on, one a block."""

    tensor: StoredTensor
    block: ScaleBlock
    first: int  # row of blocks
    is_aligned: bool  # blocks begin at the matrix's first row, and hold whole groups


def read_quantization(written: Fields) -> Quantization | None:
    """FP8 settings of a config; None if the checkpoint is not quantised. Raises
    SubspecError(UNSUPPORTED) for quantisations other than FP8."""
    if not written.has(QUANTIZATION):
        return None
    values = written.values[QUANTIZATION]
    if not isinstance(values, dict):
        raise written.wrong(QUANTIZATION, values, "an object")
    fields = Fields(f"{written.where}: {QUANTIZATION}", values)
    method = fields.text("quant_method", "")
    if method == "fp8":
        return _fine_grained(fields)
    if method == "compressed-tensors":
        return _compressed(fields)
    raise SubspecError(
        Exit.UNSUPPORTED,
        f"{fields.where} says that the weights are already quantised, by {method[:60]!r}; of these "
        "we read FP8 by 'fp8' or 'compressed-tensors'",
        ORIGINAL,
    )


def _fine_grained(fields: Fields) -> Quantization:
    if fields.text("fmt", "e4m3") != "e4m3":
        raise fields.unsupported("fmt", "'e4m3'")
    usual = "modules_to_not_convert"
    kept = tuple(fields.texts(usual if fields.has(usual) else "ignored_layers"))
    size = "weight_block_size"
    if size not in fields.values:
        return Quantization(USUAL_BLOCK, False, kept)
    # null: one scale for a matrix
    return Quantization(_block(fields, size) if fields.has(size) else None, False, kept)


def _compressed(fields: Fields) -> Quantization:
    for name, what in (
        ("kv_cache_scheme", "keys and values in bfloat16"),
        ("transform_config", "weights that are not transformed"),
    ):
        if fields.values.get(name):
            raise fields.unsupported(name, what)
    groups = fields.values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise fields.wrong("config_groups", groups, "an object")
    found = set[tuple[tuple[int, int] | None, bool]]()
    targets = list[str]()
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise fields.wrong(f"config_groups.{name[:40]}", group, "an object")
        where = f"{fields.where}.config_groups.{name[:40]}.weights"
        values = group.get("weights")
        if values is None:
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{where} is null: the group quantises activations alone, of attention or of keys "
                "and values, which we compute only in bfloat16",
                ORIGINAL,
            )
        if not isinstance(values, dict):
            raise fields.wrong(f"config_groups.{name[:40]}.weights", values, "an object")
        weights = Fields(where, values)
        kind, num_bits = weights.text("type", "int"), weights.integer("num_bits", 1, 64, 8)
        if (kind, num_bits) != ("float", 8):
            raise SubspecError(
                Exit.UNSUPPORTED,
                f"{where} is {num_bits}-bit {kind[:60]}, of compressed-tensors we read only 8-bit "
                f"float{NEEDED_FOR_INT8 if (kind, num_bits) == ('int', 8) else ''}",
                ORIGINAL,
            )
        if not weights.flag("symmetric", True):
            raise weights.unsupported("symmetric", "true")
        strategy = weights.text("strategy", "tensor")
        if strategy not in ("tensor", "channel", "block"):
            raise weights.unsupported("strategy", "'tensor', 'channel' or 'block'")
        block = _block(weights, "block_structure") if strategy == "block" else None
        found.add((block, strategy == "channel"))
        own = Fields(where.removesuffix(".weights"), group).texts("targets")
        targets += own or [LINEAR]
    if len(found) > 1:
        raise fields.unsupported("config_groups", "groups whose scales belong to the same")
    [(block, per_channel)] = found
    return Quantization(block, per_channel, tuple(fields.texts("ignore")), tuple(targets))


def _block(fields: Fields, name: str) -> tuple[int, int]:
    value = fields.values.get(name)
    expected = f"two integers from 1 to {MAX_WIDTH}"
    if not isinstance(value, list) or len(value) != 2:
        raise fields.wrong(name, value, expected)
    if not all(type(n) is int and 1 <= n <= MAX_WIDTH for n in value):
        raise fields.wrong(name, value, expected)
    return value[0], value[1]


def expected_fp8(spec: ModelSpec, quantization: Quantization | None) -> dict[str, ScaleBlock]:
    """The FP8 matrices by config.json alone: those that it names, except the head and excluded
    ones."""
    if quantization is None:
        return {}
    is_kept, is_target = _chosen(quantization.kept), _chosen(quantization.targets)
    return {
        one.name: _block_of(quantization, one.out_features, one.in_features)
        for one in spec.linears
        if one.can_be_fp8 and one.name != HEAD and is_target(one.name) and not is_kept(one.name)
    }


def _chosen(names: Sequence[str]) -> Callable[[str], bool]:
    """Predicate: a list in a config matches a linear by any of its names in checkpoints. An entry
    may also be the beginning or end of a name, a pattern, or LINEAR."""
    whole = {one for one in names if not one.startswith(PATTERN)}
    written = [one.removeprefix(PATTERN) for one in names if one.startswith(PATTERN)]
    patterns = [one for one in map(_pattern, written[:MAX_PATTERNS]) if one is not None]

    def chooses(name: str) -> bool:
        spelled = [one.removesuffix(".weight") for one in stored_names(f"{name}.weight")]
        return (
            LINEAR in whole
            or any(not whole.isdisjoint(_ends(one)) for one in spelled)
            or any(pattern.match(one) for pattern in patterns for one in spelled)
        )

    return chooses


def _ends(name: str) -> set[str]:
    """Prefixes and suffixes of a name, in whole parts."""
    parts = name.split(".")
    begins = {".".join(parts[: count + 1]) for count in range(len(parts))}
    return begins | {".".join(parts[first:]) for first in range(len(parts))}


def _pattern(text: str) -> re.Pattern[str] | None:
    """Compiled pattern; None if it is invalid or might take very long to match. It is then ignored,
    since only a dry run needs it."""
    repeats = len(re.findall(r"[*+{]", text))
    choices = len(re.findall(r"\||(?<!\()\?", text))
    if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or choices > MAX_CHOICES:
        return None
    if re.search(r"\)[*+{]", text):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            return re.compile(text)
    except (re.error, OverflowError):
        return None


def _block_of(quantization: Quantization, num_rows: int, num_columns: int) -> ScaleBlock:
    if quantization.block:
        return ScaleBlock(*quantization.block)
    return ScaleBlock(1 if quantization.per_channel else num_rows, num_columns)


def scales_beside(
    rows: Rows, stored: StoredTensors, quantization: Quantization | None
) -> StoredScales:
    """The scales of a matrix that is stored in FP8. Raises SubspecError: CORRUPT if there are none,
    or not for its shape, UNSUPPORTED if nothing says what they belong to."""
    weight = rows.tensor
    where = f"{weight.file.name}: {weight.name}"
    if quantization is None:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{where} is {E4M3}, but config.json has no {QUANTIZATION}, which says what its scales "
            "belong to",
            ORIGINAL,
        )
    names = [weight.name + suffix for suffix in SUFFIXES]
    for name in names:
        if name in stored.misplaced:
            raise SubspecError(Exit.CORRUPT, stored.misplaced[name], AGAIN)
    found = [stored.tensors[name] for name in names if name in stored.tensors]
    if len(found) != 1:
        got = " and ".join(one.name for one in found) or "no scales"
        message = f"{where} is {E4M3} with {got}, expected one of {' and '.join(names)}"
        raise SubspecError(Exit.CORRUPT, message, AGAIN)
    [tensor] = found
    if tensor.dtype not in SCALE_DTYPES:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{tensor.file.name}: {tensor.name} is {tensor.dtype}, expected "
            f"{', '.join(SCALE_DTYPES)}",
        )
    num_rows, num_columns = weight.shape
    if tensor.shape in ((), (1,), (1, 1)):
        block = ScaleBlock(rows.count, num_columns)
        return StoredScales(tensor, block, 0, True)
    if tensor.shape in ((num_rows,), (num_rows, 1)):
        return StoredScales(tensor, ScaleBlock(1, num_columns), rows.first, True)
    if quantization.block is not None:
        height, width = quantization.block
        if tensor.shape == (-(-num_rows // height), -(-num_columns // width)):
            first, before = divmod(rows.first, height)
            whole = width % GROUP_SIZE == 0 or width >= num_columns
            columns = -(-min(width, num_columns) // GROUP_SIZE) * GROUP_SIZE if whole else width
            block = ScaleBlock(height, columns)
            return StoredScales(tensor, block, first, whole and not before)
    raise SubspecError(
        Exit.CORRUPT,
        f"{tensor.file.name}: {tensor.name} has the shape {list(tensor.shape)}, expected one "
        f"scale, {[num_rows, 1]}, or one for each block of {QUANTIZATION} in {list(weight.shape)}",
        AGAIN,
    )


def read_scales(scales: StoredScales, rows: Rows) -> "Tensor":
    """f32 [row blocks, column blocks] of the matrix that `rows` are. Raises SubspecError: CORRUPT
    for one that is not finite, UNSUPPORTED for one that is not used in practice."""
    import torch

    from subspec.artifacts.format.fp8 import MAX_SCALE, MIN_SCALE

    tensor = scales.tensor
    found = read_small(tensor)
    if tensor.dtype == EXPONENTS:  # the power of two with this biased exponent; 255 is NaN
        found = found.view(torch.float8_e8m0fnu)
    found = found.float().view(tensor.shape[0] if tensor.shape else 1, -1)
    if len(found) > 1:
        last = rows.first + rows.count
        found = found[scales.first : -(-last // scales.block.rows)]
    if not bool(found.isfinite().all()):
        raise SubspecError(
            Exit.CORRUPT,
            f"{tensor.file.name}: {tensor.name} has scales that are NaN or infinite, expected "
            "finite numbers",
            AGAIN,
        )
    if bool(((found != 0) & ((found < MIN_SCALE) | (found > MAX_SCALE))).any()):
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"{tensor.file.name}: {tensor.name} has a scale that is negative, below 2^-100 or "
            "above 2^100, expected 0 or one between these",
        )
    return found.contiguous()


def read_codes(rows: Rows) -> "Tensor":
    """FP8 codes uint8 [rows, columns]. Raises SubspecError(CORRUPT) for NaN."""
    import torch

    from subspec.artifacts.format.fp8 import NAN_CODE

    found = torch.empty(rows.count, rows.tensor.shape[1], dtype=torch.uint8)
    first = num_bad = 0
    for piece in read_pieces(rows):
        codes = piece.view(torch.uint8)
        num_bad += int(((codes & 0x7F) == NAN_CODE).sum())
        found[first : first + len(codes)] = codes
        first += len(codes)
    if num_bad:
        raise SubspecError(
            Exit.CORRUPT,
            f"{rows.tensor.name}: {num_bad} FP8 weights are NaN, expected numbers",
            AGAIN,
        )
    return found


def dequantize(codes: "Tensor", values: "Tensor", scales: StoredScales, rows: Rows) -> "Tensor":
    """FP8 codes uint8 [rows, columns] -> the exact weights in bfloat16, for any blocks."""
    import torch

    row = (torch.arange(len(codes)) + rows.first) // scales.block.rows - scales.first
    if len(values) == 1:
        row.zero_()
    column = (torch.arange(codes.shape[1]) // scales.block.columns).clamp(max=values.shape[1] - 1)
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    for some in torch.arange(len(codes)).split(1024):
        of_some = values[row[some]][:, column]
        found[some] = (codes[some].view(torch.float8_e4m3fn).float() * of_some).bfloat16()
    return found


def refused_packed(tensor: StoredTensor, expected: tuple[int, ...]) -> SubspecError:
    """Why a matrix of another shape, with several weights in a byte, is not a target."""
    beside = f", as {MODELOPT} says" if (tensor.file.parent / MODELOPT).exists() else ""
    return SubspecError(
        Exit.UNSUPPORTED,
        f"{tensor.file.name}: {tensor.name} is {tensor.dtype} of the shape {list(tensor.shape)}, "
        f"expected weights of {list(expected)}: they are packed{beside}, and of quantised "
        "weights we read only FP8",
        ORIGINAL,
    )


def refused_dtype(tensor: StoredTensor, expected: str) -> SubspecError:
    """Why a weight of such a dtype is not a target."""
    where = f"{tensor.file.name}: {tensor.name}"
    if tensor.dtype == "F8_E5M2":
        return SubspecError(
            Exit.UNSUPPORTED, f"{where} is F8_E5M2, of FP8 we read only {E4M3}", ORIGINAL
        )
    if tensor.dtype in ("I8", "U8"):
        message = f"{where} is {tensor.dtype}, of 8 bits we read only FP8{NEEDED_FOR_INT8}"
        return SubspecError(Exit.UNSUPPORTED, message, ORIGINAL)
    message = f"{where} is {tensor.dtype}, expected {expected}"
    return SubspecError(
        Exit.UNSUPPORTED,
        message,
        "use the original checkpoint, before quantisation: we make the 4-bit copy",
    )
