"""Opening a dump of SGLang's expert distribution recorder: a `.pt` file, checked before it is read.

Knows the dump's outer form; what its numbers mean is worked out elsewhere.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.importers.facts import MOST_LAYERS
from moe_runtime.trace import UNUSED

__all__ = ["Dump", "array_of", "load_dump"]

_HOW = "is it a whole .pt dump of SGLang's recorder?"


@dataclass(frozen=True, kw_only=True)
class Dump:
    """The content of one file.

    Args:
        path: the file.
        mode: `"stat"` (also of `stat_approx`), `"per_pass"` or `"per_token"`.
        data: what the file holds.
    """

    path: Path
    mode: str
    data: dict[str, Any]

    def records(self) -> list[dict[str, Any]]:
        """The forward passes of a `per_pass` or `per_token` dump."""
        records = self.data["records"]
        assert isinstance(records, list)
        return records

    def physical_to_logical(self) -> NDArray[np.int64]:
        """`[L, P]`: the expert in each physical slot; every expert has one at least.

        Raises:
            TraceError: the table is missing, or a layer lacks an expert.
        """
        where = f"{self.path}: last_physical_to_logical_map"
        table = array_of(self.data.get("last_physical_to_logical_map"), "iu", (2,), where)
        if 0 in table.shape or len(table) > MOST_LAYERS:
            raise TraceError(f"{where} has shape {list(table.shape)}; the recording is empty")
        # An expert has one slot at least, so no number reaches the number of slots.
        if table.min() < 0 or table.max() >= min(table.shape[1], UNUSED):
            layer, slot = (int(i) for i in np.argwhere(
                (table < 0) | (table >= min(table.shape[1], UNUSED)))[0])  # fmt: skip
            raise TraceError(
                f"{where}: layer {layer} slot {slot} holds expert {table[layer, slot]}, past "
                f"{table.shape[1]} slots"
            )
        result = table.astype(np.int64)
        held = np.zeros((len(result), int(result.max()) + 1), np.bool_)
        held[np.arange(len(result))[:, None], result] = True
        if not held.all():
            layer, expert = (int(i) for i in np.argwhere(~held)[0])
            raise TraceError(f"{where}: layer {layer} has no slot for expert {expert}")
        return result

    def digest(self) -> bytes:
        """Equal for the files of ranks that saw the same passes, as under tensor parallelism."""
        state = hashlib.sha256()
        if self.mode == "stat":
            _feed(state, self.data["logical_count"], str(self.path))
            return state.digest()
        for number, record in enumerate(self.records()):
            where = f"{self.path}: record {number}"
            state.update(f"{record.get('forward_pass_id')!r:.40};".encode())
            if self.mode == "per_pass":
                _feed(state, record.get("global_physical_count"), where)
            else:  # routing follows from the tokens, and comparing them is cheaper
                for name in ("input_ids", "positions"):
                    state.update(whole_numbers(record.get(name), f"{where}: {name}").tobytes())
        return state.digest()


def _feed(state: Any, tensor: Any, where: str) -> None:
    values = array_of(tensor, "iuf", (2, 3), where)
    state.update(repr(values.shape).encode())
    state.update(np.ascontiguousarray(values).data)


def load_dump(path: Path) -> Dump:
    """Open a dump; tensors stay in the file until they are looked at.

    Only tensors and plain Python values are accepted: a file that would run code on loading is
    refused, and so is one that says it holds more than it does.

    Raises:
        TraceError: no such file, damaged, or of another form.
    """
    import torch

    _check_archive(path)
    try:
        data = torch.load(  # noqa: TID251  the engine's format; weights_only runs no code
            path, map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:  # a damaged pickle makes it raise anything
        reason = str(error).strip().split("\n")[0]
        raise TraceError(f"{path}: cannot be loaded ({reason:.160}); {_HOW}") from error
    if not isinstance(data, dict):
        raise TraceError(f"{path}: holds {type(data).__name__}, not a dump; {_HOW}")
    if "logical_count" in data:
        return Dump(path=path, mode="stat", data=data)
    records = data.get("records")
    if not isinstance(records, list):
        names = ", ".join(f"{name!r:.20}" for name in list(data)[:5])
        raise TraceError(
            f"{path}: has neither 'logical_count' nor 'records', but {names or 'nothing'}; {_HOW}"
        )
    if not records:
        raise TraceError(f"{path}: has no records; send requests while the recorder runs")
    if any(not isinstance(record, dict) for record in records):
        raise TraceError(f"{path}: a record is no mapping; {_HOW}")
    detailed = [("topk_ids_of_layer" in record) for record in records]
    if any(detailed) and not all(detailed):
        raise TraceError(f"{path}: record {detailed.index(False)} has no topk_ids_of_layer; {_HOW}")
    return Dump(path=path, mode="per_token" if any(detailed) else "per_pass", data=data)


def _check_archive(path: Path) -> None:
    """A zip archive that stores its members as they are: what it says is not more than it is."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        stored = sum(member.file_size for member in members)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or stored > size:
            raise TraceError(f"{path}: an archive with packed members, which torch.save never has")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise TraceError(f"{path}: not a .pt archive ({error}); {_HOW}") from error


def array_of(tensor: Any, kinds: str, dimensions: tuple[int, ...], where: str) -> NDArray[Any]:
    """A tensor's numbers; TraceError if it is none of these kinds and dimensions.

    A tensor that repeats its memory is refused: a few bytes could claim any size.
    """
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise TraceError(f"{where} is missing or no tensor: {type(tensor).__name__}")
    if tensor.dim() not in dimensions:
        raise TraceError(f"{where} has shape {list(tensor.shape)}; not {dimensions} dimensions")
    if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TraceError(f"{where}: shape {list(tensor.shape)} is more than the file holds")
    if tensor.dtype in {torch.bfloat16} or tensor.is_quantized or tensor.is_complex():
        raise TraceError(f"{where} holds {tensor.dtype}, not whole numbers")
    try:
        values: NDArray[Any] = tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise TraceError(f"{where} holds {tensor.dtype} ({error})") from error
    if values.dtype.kind not in kinds:
        raise TraceError(f"{where} holds {tensor.dtype}, not whole numbers")
    return values


def whole_numbers(value: Any, where: str) -> NDArray[np.int64]:
    """int64 `[N]` from a list or a tensor of whole numbers; TraceError otherwise."""
    if isinstance(value, list):
        if any(type(item) is not int for item in value):
            raise TraceError(f"{where}: holds something else than whole numbers")
        try:
            return np.array(value, np.int64)
        except OverflowError as error:
            raise TraceError(f"{where}: holds a number past 64 bits") from error
    return array_of(value, "iu", (1,), where).astype(np.int64)
