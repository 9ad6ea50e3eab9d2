"""ExpertFlow's routing-path predictor at work: a whole path for each token, before its first layer.

Owns the state of the sequences under way. Knows no cache of experts, no executor and no file form;
`train` makes the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.path_cache import CHUNK, PathCache
from moe_runtime.predictors.path_config import PathConfig
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_sequences import Vocabulary, multi_hot
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import UNUSED

__all__ = ["RoutingPathPredictor"]

KEPT_SEQUENCES = 64  # beyond those of the present step, the ones used last are remembered
_WEIGHT, _SCALE = "network.", "scale."

Logits = NDArray[np.float32]


@dataclass(eq=False)
class _Sequence:
    """What is kept of one sequence; the prompt only where an encoder reads it."""

    slot: int
    last: int = -1
    prompt: list[int] = field(default_factory=list)
    memory: list[tuple[Tensor, Tensor]] | None = None  # for each layer keys and values [H, P, d]


class RoutingPathPredictor:
    """Forecasts all layers of a token at once from the tokens up to it.

    After ExpertFlow (He), arXiv 2410.17954, section 3.2. Two things are added: a decoder may read
    the prompt itself (`PathConfig.encoder_layers` 0), and what routers have chosen in the layers
    passed may shift the forecast of those to come (`correction`).

    Args:
        origin: the model and the rows that it was trained on.
        network: trained; it is put into evaluation mode.
        vocabulary: the token ids of the network's rows.
        popularity: float32 `[G]`, share of tokens that went to each expert; the forecast for
            tokens whose id is unknown, and for prompts where the network forecasts none.
        correction: float32 `[G, G]`, or None. Row i: what expert i chosen, rather than forecast
            with some probability, adds to the logits of experts of later layers, times one minus
            that probability.

    Raises:
        PredictorError: sizes do not fit each other.
    """

    name: ClassVar[str] = "routing-path"
    kind: ClassVar[str] = "routing-path"
    needs_token_ids: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __init__(
        self,
        *,
        origin: Origin,
        network: PathNetwork,
        vocabulary: Vocabulary,
        popularity: NDArray[np.float32],
        correction: NDArray[np.float32] | None = None,
    ) -> None:
        size = origin.grid.size
        if network.head.out_features != size or popularity.shape != (size,):
            raise PredictorError(
                f"the network has {network.head.out_features} outputs and popularity "
                f"{popularity.shape}, the model {size} experts"
            )
        if network.vocabulary != len(vocabulary):
            raise PredictorError(
                f"the network has {network.vocabulary} tokens, the vocabulary {len(vocabulary)}"
            )
        if correction is not None and correction.shape != (size, size):
            raise PredictorError(f"correction must be {size} x {size}, found {correction.shape}")
        self.origin = origin
        self.grid: ExpertGrid = origin.grid
        self.network = network.eval()
        self.vocabulary = vocabulary
        self.popularity = popularity
        self.correction = correction
        share = popularity.clip(1e-4, 1 - 1e-4)
        self._popular_logits = np.log(share / (1 - share)).astype(np.float32)
        self.reset()

    # -- the protocol ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the run (sequences, the step under way); what was fitted stays."""
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._free: list[int] = []
        self._cache = PathCache(self.network.config, 0)
        self._logits: Logits = np.zeros((0, self.grid.size), np.float32)

    def begin_step(self, rows: StepRows) -> None:
        """A forward call begins: its tokens are read, all layers forecast. Mutates."""
        self._logits = np.tile(self._popular_logits, (len(rows), 1))
        if not len(rows):
            return
        ids = self.vocabulary.rows(rows.token_ids)
        runs = _runs(rows.sequence_ids)
        self._take_up(rows, runs)
        if self.network.config.encoder_layers and not rows.decode:
            for run in runs:
                one = self._sequences[int(rows.sequence_ids[run[0]])]
                one.prompt += ids[run].tolist()
                one.memory = None
            return
        with torch.inference_mode():
            for same in _by_length(runs):
                self._forecast(rows, ids, same)
        unknown = rows.token_ids < 0
        self._logits[unknown] = self._popular_logits

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """The router of a layer has chosen: later layers' forecasts are shifted. Mutates."""
        del hidden  # token ids are all that the network reads
        if self.correction is None or position + 1 == len(self.grid.layers):
            return
        start = self.grid.offsets[position]
        stop = start + self.grid.experts[position]
        one = ExpertGrid(layers=(0,), experts=(self.grid.experts[position],))
        chosen = np.where(topk_ids < 0, UNUSED, topk_ids).astype(np.uint16)
        surprise = multi_hot(chosen[:, None], one) - _sigmoid(self._logits[:, start:stop])
        surprise[(topk_ids < 0).all(axis=1)] = 0.0
        self._logits[:, stop:] += surprise @ self.correction[start:stop, stop:]

    def predict(self, position: int) -> Probabilities:
        """Probability of each expert to be among a row's choices, float32 `[T, experts]`."""
        start = self.grid.offsets[position]
        return _sigmoid(self._logits[:, start : start + self.grid.experts[position]])

    # -- sequences -------------------------------------------------------------------------------

    def _take_up(self, rows: StepRows, runs: list[IntArray]) -> None:
        """A slot for each sequence of the step; what does not go on where it was is cut."""
        wanted = [int(rows.sequence_ids[run[0]]) for run in runs]
        for name in wanted:
            if name in self._sequences:
                self._sequences.move_to_end(name)
        for name, run in zip(wanted, runs, strict=True):
            first, last = int(rows.positions[run[0]]), int(rows.positions[run[-1]])
            one = self._sequences.get(name)
            if one is None:
                one = self._sequences[name] = _Sequence(slot=self._slot(wanted))
                self._cache.cut(one.slot, 0)
            elif first <= one.last:
                # A candidate that was not accepted is taken back, or the number has a new owner.
                self._cache.cut(one.slot, first)
                if first == 0:
                    one.prompt, one.memory = [], None
            one.last = last

    def _slot(self, wanted: list[int]) -> int:
        """A free slot; that of the sequence left alone longest, if too many are remembered."""
        if not self._free and len(self._sequences) >= KEPT_SEQUENCES:
            oldest = next(iter(self._sequences))
            if oldest not in wanted:
                return self._sequences.pop(oldest).slot
        if not self._free:
            had = len(self._cache)
            self._cache.grow(max(1, 2 * had, min(len(wanted), KEPT_SEQUENCES)))
            self._free = list(range(len(self._cache) - 1, had - 1, -1))
        return self._free.pop()

    def _forecast(self, rows: StepRows, ids: IntArray, runs: list[IntArray]) -> None:
        """The logits of runs of one length, in chunks."""
        at = np.stack(runs)
        names = rows.sequence_ids[at[:, 0]].tolist()
        slots = torch.tensor([self._sequences[name].slot for name in names])
        memory = self._memory(names) if self.network.config.encoder_layers else None
        for start in range(0, at.shape[1], CHUNK):
            part = at[:, start : start + CHUNK]
            logits = self.network.extend(
                torch.from_numpy(ids[part]),
                torch.from_numpy(rows.positions[part]),
                slots,
                self._cache,
                memory,
            )
            self._logits[part] = logits.numpy()

    def _memory(self, names: list[int]) -> list[tuple[Tensor, ...]]:
        """Keys and values of these sequences' prompts, encoded when first needed."""
        chosen = [self._sequences[name] for name in names]
        window = self.network.config.window
        for one in chosen:
            if one.memory is None:
                # Never seen from its beginning: a prompt of one unknown token.
                prompt = one.prompt[-window:] or [len(self.vocabulary)]
                read = self.network.encode(torch.tensor([prompt]), torch.tensor([len(prompt)]))
                one.memory = [
                    (keys[0], values[0])
                    for keys, values, _ in (
                        self.network.memory(block, read) for block in self.network.decoder
                    )
                ]
        lengths = torch.tensor([one.memory[0][0].shape[1] for one in chosen if one.memory])
        hidden = torch.where(torch.arange(int(lengths.max())) < lengths[:, None], 0.0, -torch.inf)
        return [
            (
                _padded([one.memory[layer][0] for one in chosen if one.memory]),
                _padded([one.memory[layer][1] for one in chosen if one.memory]),
                hidden[:, None, None],
            )
            for layer in range(len(self.network.decoder))
        ]

    # -- files -----------------------------------------------------------------------------------

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """What was trained, and the network's sizes; matrices as int8 with a scale for each row."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, parameter in self.network.named_parameters():
            weight = parameter.detach().numpy()
            if weight.ndim == 2:
                largest = np.abs(weight).max(axis=1, keepdims=True)
                scale = np.maximum(largest / 127, 1e-7).astype(np.float16)
                scaled = (weight / scale.astype(np.float32)).round().clip(-127, 127)
                arrays[_SCALE + name] = scale[:, 0]
                arrays[_WEIGHT + name] = scaled.astype(np.int8)
            else:
                arrays[_WEIGHT + name] = weight.astype(np.float32)
        arrays["vocabulary"] = self.vocabulary.ids.astype(np.int32)
        arrays["popularity"] = self.popularity
        if self.correction is not None:
            arrays["correction"] = self.correction.astype(np.float16)
        return arrays, {"network": self.network.config.as_dict()}

    @classmethod
    def from_arrays(cls, origin: Origin, arrays: Arrays, constants: Mapping[str, Any]) -> Self:
        """Made again; PredictorError if the arrays are not those of such a network."""
        sizes = constants["network"]
        if not isinstance(sizes, dict):
            raise PredictorError(f"constant 'network' is no JSON object: {sizes!r}")
        ids = take_array(arrays, "vocabulary", (None,), np.int32).astype(np.int64)
        if not len(ids) or np.any(np.diff(ids) <= 0) or ids[0] < 0:
            raise PredictorError("array 'vocabulary' must hold ascending token ids")
        size = origin.grid.size
        config = PathConfig(**sizes)
        with torch.device("meta"):  # the sizes are not trusted before the arrays have them
            bare = PathNetwork(config, vocabulary=len(ids), outputs=size)
        weights = {
            name: torch.from_numpy(_weight(arrays, name, tuple(weight.shape)))
            for name, weight in bare.named_parameters()
        }
        network = PathNetwork(config, vocabulary=len(ids), outputs=size)
        network.load_state_dict(weights)
        correction = None
        if "correction" in arrays:
            correction = take_array(arrays, "correction", (size, size), np.float16)
            correction = correction.astype(np.float32)
        return cls(
            origin=origin,
            network=network,
            vocabulary=Vocabulary(ids=ids),
            popularity=take_array(arrays, "popularity", (size,), np.float32),
            correction=correction,
        )


def _weight(arrays: Arrays, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(shape) != 2:
        whole: NDArray[np.float32] = take_array(arrays, _WEIGHT + name, shape, np.float32)
        return whole
    scaled = take_array(arrays, _WEIGHT + name, shape, np.int8)
    scale = take_array(arrays, _SCALE + name, shape[:1], np.float16)
    weight: NDArray[np.float32] = scaled.astype(np.float32) * scale[:, None].astype(np.float32)
    return weight


def _sigmoid(logits: Logits) -> Logits:
    # exp of a large number would warn; beyond 30 nothing is left to tell.
    found: Logits = (1.0 / (1.0 + np.exp(-logits.clip(-30, 30)))).astype(np.float32)
    return found


def _padded(tensors: list[Tensor]) -> Tensor:
    """`[H, P, d]` of several lengths as `[B, H, P, d]`."""
    if len(tensors) == 1:
        return tensors[0][None]
    return torch.nn.utils.rnn.pad_sequence(
        [tensor.transpose(0, 1) for tensor in tensors], batch_first=True
    ).transpose(1, 2)


def _runs(sequence_ids: IntArray) -> list[IntArray]:
    """The row numbers of each sequence, in order."""
    order = np.argsort(sequence_ids, kind="stable")
    ends = np.flatnonzero(np.diff(sequence_ids[order])) + 1
    return [run.astype(np.int64) for run in np.split(order, ends)]


def _by_length(runs: list[IntArray]) -> list[list[IntArray]]:
    same: dict[int, list[IntArray]] = {}
    for run in runs:
        same.setdefault(len(run), []).append(run)
    return list(same.values())
