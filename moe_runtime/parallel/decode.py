"""The decode loop of one rank: prefill at home, then steps, coherent or vanilla, in lock-step.

Knows the model's forward, sequences and links; what layers do with rows is their handlers'.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.parallel.coherent import CoherentDecoder, Step
from moe_runtime.parallel.homes import settled
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.options import ParallelOptions
from moe_runtime.parallel.sequence_cache import Added, SequenceCache
from moe_runtime.parallel.vanilla import VanillaLayer, id_dtype
from moe_runtime.token_choice import TokenChoice

__all__ = ["HOMES", "KEYS_VALUES", "PREFILL", "TOKENS", "Decode", "Place", "Prompt"]

PREFILL = "prefill."
KEYS_VALUES, TOKENS, HOMES = "keys_values", "tokens", "homes"

# Told before each call of its real rows, as prompt number, place and token, and if it is a step.
Place = Callable[[list[tuple[int, int, int]], bool], None]


@dataclass(eq=False, kw_only=True)
class Prompt:
    """One prompt on its way.

    Attributes:
        number: its place among the prompts.
        choice: draws its tokens; `chosen` steps have been drawn here or skipped.
        rank: where its next row begins.
        tokens: the new ones, known to all ranks, the last of them not fed yet.
        forced: tokens to feed in the place of those chosen.
    """

    number: int
    prompt: Sequence[int]
    choice: TokenChoice
    rank: int = 0
    tokens: list[int] = field(default_factory=list)
    forced: Sequence[int] | None = None
    chosen: int = 0
    done: bool = False

    @property
    def fed(self) -> int:
        """Tokens that have gone into the model; the place of the next."""
        return len(self.prompt) + len(self.tokens) - 1

    def token(self, place: int) -> int:
        """The token at a place, prompt and new ones."""
        new = place - len(self.prompt)
        return int(self.prompt[place]) if new < 0 else self.tokens[new]


class Decode:
    """Generates for prompts on one rank; all ranks run the same with the same arguments.

    Args:
        handlers: the experts' vanilla handlers, by position.
        decoder: with its hooks in place, for coherent steps; None for vanilla ones.
        after_first: index of the layer after the first MoE layer.
        keep: told of each chosen step's prompt number, step and logits `[V]`; None for nobody.
        place: see `Place`; None for nobody.

    Attributes:
        steps, rows: decode steps, and rows of this rank's calls in them at their beginning.
        cache_bytes: the most that keys and values took here.
        kv_row_bytes: of a token's keys and values, all layers; 0 in vanilla mode.
        kv_forms: shapes of keys and values among the layers; 0 in vanilla mode.
        prefill_seconds: of prefills here; of them `prefill_wait_seconds` waiting for other ranks
            and for bytes on their way, stated latency included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        link: Link,
        options: ParallelOptions,
        stop_tokens: frozenset[int],
        handlers: Sequence[VanillaLayer],
        decoder: CoherentDecoder | None,
        *,
        after_first: int,
        keep: Callable[[int, int, torch.Tensor], None] | None = None,
        place: Place | None = None,
    ) -> None:
        self._model, self._link, self._options = model, link, options
        self._stop, self._handlers, self._decoder = stop_tokens, handlers, decoder
        self._after_first, self._keep, self._place = after_first, keep, place
        self._names = frozenset(inspect.signature(model.forward).parameters)
        self._first_home: dict[int, int] = {}  # of a token; the same on all ranks
        self._real = torch.zeros(0, dtype=torch.long)
        self.steps = self.rows = self.cache_bytes = self.kv_row_bytes = self.kv_forms = 0
        self.prefill_seconds = self.prefill_wait_seconds = 0.0

    def run(self, prompts: Sequence[Prompt]) -> None:
        """All of them, `batch_size` at a time."""
        size = self._options.batch_size or len(prompts)
        with torch.no_grad():
            for start in range(0, len(prompts), size):
                self._batch(list(prompts[start : start + size]))

    # -- one batch -------------------------------------------------------------------------------

    def _batch(self, batch: list[Prompt]) -> None:
        for at, one in enumerate(batch):
            one.rank = at * self._link.size // len(batch)
        mine = [one for one in batch if one.rank == self._link.rank]
        began, waited = time.perf_counter(), self._link.ledger.waited_seconds
        mine, cache = self._read_prompts(batch, mine)
        self.prefill_seconds += time.perf_counter() - began
        self.prefill_wait_seconds += self._link.ledger.waited_seconds - waited
        moving = self._decoder is not None
        active = batch if moving else mine
        while not all(one.done for one in batch):
            left = [at for at, one in enumerate(active) if not one.done]
            if len(left) < len(active):
                cache.keep(torch.tensor(left, dtype=torch.long, device=self._model.device))
                active = [active[at] for at in left]
            if moving:
                self._coherent_step(active, cache)
            else:
                going = [one for one in batch if not one.done]
                self._vanilla_step(active, cache)
                self._share_tokens(going, active, "")
            self.cache_bytes = max(self.cache_bytes, cache.nbytes)
            self.steps += 1

    def _read_prompts(
        self, batch: list[Prompt], mine: list[Prompt]
    ) -> tuple[list[Prompt], SequenceCache]:
        """Prefill, its first tokens chosen, and what it gave handed round; the prompts that this
        rank goes on with, and the keys and values that it needs.
        """
        logits, cache = self._prefill(mine)
        self._choose(mine, logits)
        if self._decoder is not None:
            return mine, self._spread(batch, mine, cache)
        self._share_tokens(batch, mine, PREFILL)
        if self._options.homes == "prefill" and not all(one.done for one in batch):
            return self._resettle(batch, mine, cache)
        for added in cache.take():
            cache.commit(added)
        return mine, cache

    def _prefill(self, mine: list[Prompt]) -> tuple[torch.Tensor, SequenceCache]:
        """The last token's logits `[n, V]` of this rank's prompts, and their keys and values."""
        cache = SequenceCache(self._model)
        longest = max((len(one.prompt) for one in mine), default=1)
        ids = torch.zeros(max(len(mine), 1), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(mine):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, longest - len(one.prompt) :] = 1
        self._real = torch.nonzero(mask.flatten()).flatten().to(self._model.device)
        if not mine:  # one row in vain
            mask[:] = 1
        self._begin(
            PREFILL, self._real, [(one, at) for one in mine for at in range(len(one.prompt))]
        )
        places = (mask.cumsum(1) - 1).clamp_min(0)
        return self._forward(ids, mask, places, cache)[: len(mine)], cache

    def _spread(
        self, batch: list[Prompt], mine: list[Prompt], cache: SequenceCache
    ) -> SequenceCache:
        """Hand round what prefill gave: tokens, keys and values, where tokens' rows want to be.

        Only real tokens are sent, all layers of one side by side, in an order that all ranks know.
        """
        link, device = self._link, self._model.device
        taken = cache.take()
        ordered = [one for rank in range(link.size) for one in batch if one.rank == rank]
        narrow = id_dtype(link.size)
        groups = [[self._tokens_of(mine)], [self._homes_of_prefill().to(narrow)]]
        last = self._options.max_new_tokens == 1
        if not last:
            groups += [[self._real_rows(added)] for added in taken]
        kinds = [TOKENS, HOMES, *[KEYS_VALUES] * len(taken)][: len(groups)]
        arrived = link.gather_groups([PREFILL + kind for kind in kinds], groups)
        self._learn_tokens(ordered, mine, arrived[0].rows[0])
        fed = [token for one in ordered for token in one.prompt]
        self._first_home.update(zip(fed, arrived[1].rows[0].tolist(), strict=True))
        whole = SequenceCache(self._model)
        longest, at = _columns(batch, ordered, device)
        for added, come in zip(taken, arrived[2:], strict=not last):
            whole.commit(_placed(added, come.rows[0], at, len(batch), longest))
        if not last:
            self.kv_forms = len(taken)
            self.kv_row_bytes = sum(
                one.numbers.shape[-1] * one.numbers.itemsize * len(one.layers) for one in taken
            )
        return whole

    def _resettle(
        self, batch: list[Prompt], mine: list[Prompt], cache: SequenceCache
    ) -> tuple[list[Prompt], SequenceCache]:
        """Give each prompt to the rank with most of the experts that its tokens chose, as many to
        each as before; keys and values follow. Returns this rank's prompts and their cache.
        """
        link, device = self._link, self._model.device
        lengths = torch.tensor([len(one.prompt) for one in mine], dtype=torch.long)
        of_row = torch.repeat_interleave(torch.arange(len(mine)), lengths).to(device)
        uses = torch.zeros(len(mine), link.size, dtype=torch.int32, device=device)
        for handler in self._handlers:
            ids, _ = handler.last
            uses.index_add_(0, of_row, handler.share.held[ids].any(1).int())
        (every,) = link.gather(PREFILL + HOMES, None, [uses])
        homes = settled(every.to("cpu").numpy(), [one.rank for one in batch], link.size)
        for one, home in zip(batch, homes, strict=True):
            one.rank = home
        to = torch.repeat_interleave(
            torch.tensor([one.rank for one in mine], dtype=torch.long), lengths
        )
        # What arrives is in the batch's order: so are the ranks that prompts were on before.
        mine = [one for one in batch if one.rank == link.rank]
        longest, at = _columns(mine, mine, device)
        whole = SequenceCache(self._model)
        for added in cache.take():
            (rows,), _ = link.exchange(PREFILL + KEYS_VALUES, None, [self._real_rows(added)], to)
            if mine:
                whole.commit(_placed(added, rows, at, len(mine), longest))
        return mine, whole

    def _real_rows(self, added: Added) -> torch.Tensor:
        """`[real tokens, layers, numbers]` of a prefill's keys and values."""
        layers = len(added.layers)
        numbers = added.numbers.unflatten(0, (layers, -1))  # [layers, sequences, length, numbers]
        flat = numbers.permute(1, 2, 0, 3).flatten(0, 1)
        real: torch.Tensor = flat[self._real]
        return real

    def _homes_of_prefill(self) -> torch.Tensor:
        """int64 `[real tokens]`: where a row of each would go in the first MoE layer."""
        ids, weights = self._handlers[0].last
        here = torch.full((len(ids),), self._link.rank, device=ids.device)
        return self._handlers[0].share.homes(here, ids, weights)

    # -- steps -----------------------------------------------------------------------------------

    def _vanilla_step(self, active: list[Prompt], cache: SequenceCache) -> None:
        """A token for each of this rank's prompts; a rank without any computes one in vain."""
        real = torch.arange(len(active), device=self._model.device)
        self._begin("", real, [(one, one.fed) for one in active])
        if not active:
            one = torch.zeros(1, 1, dtype=torch.long)
            self._forward(one, one + 1, one, SequenceCache(self._model))
            return
        logits = self._forward(*self._fed(active, cache), cache)
        for added in cache.take():
            cache.commit(added)
        self._choose(active, logits)

    def _coherent_step(self, active: list[Prompt], cache: SequenceCache) -> None:
        """A token for each prompt, wherever its row is."""
        decoder, link = self._decoder, self._link
        assert decoder is not None
        if self._options.start == "token":
            for one in active:
                one.rank = self._first_home.get(one.tokens[-1], one.rank)
        here = [at for at, one in enumerate(active) if one.rank == link.rank]
        rows = torch.tensor(here, dtype=torch.long, device=self._model.device)
        decoder.step = step = Step(batch=len(active), rows=rows, cache=cache)
        self._begin("", rows, [(one, one.fed) for one in active])
        try:
            logits = self._forward(*self._fed(active, cache), cache)
        finally:
            decoder.step = None
            cache.rows = cache.count = None
        ended = [active[at] for at in step.rows.tolist()]
        self._choose(ended, logits[: len(ended)])
        self._finish(active, ended, step, cache)

    def _finish(
        self, active: list[Prompt], ended: list[Prompt], step: Step, cache: SequenceCache
    ) -> None:
        """Hand round what the step gave: one all-gather of tokens, keys and values.

        Each layer's keys and values of a row are where the row was in that layer.
        """
        narrow = id_dtype(len(active))
        taken = cache.take()
        mine = {id(one) for one in ended}
        fed = [one.tokens[-1 - (id(one) in mine)] for one in active]
        before = len(active[0].tokens) - (id(active[0]) in mine)  # the same of all that go on
        last = before + 1 >= self._options.max_new_tokens
        groups = [[self._tokens_of(ended), step.rows.to(narrow)]]
        if not last:
            many = id_dtype(max((at for one in taken for at in one.layers), default=0) + 1)
            groups += [[one.numbers, one.layer.to(many), one.sequence.to(narrow)] for one in taken]
        kinds = [TOKENS, *[KEYS_VALUES] * len(taken)][: len(groups)]
        arrived = self._link.gather_groups(kinds, groups)
        order = [active[at] for at in arrived[0].rows[1].tolist()]
        self._learn_tokens(order, ended, arrived[0].rows[0])
        for one, rank in zip(order, arrived[0].source.tolist(), strict=True):
            one.rank = rank
        for added, come in zip(taken, arrived[1:], strict=not last):
            numbers, layer, sequence = come.rows
            layer, sequence = layer.long(), sequence.long()
            # Where a row was in the layer after the first MoE layer is where that one sent it.
            seen = layer == self._after_first
            where = zip(sequence[seen].tolist(), come.source[seen].tolist(), strict=True)
            self._first_home.update({fed[at]: rank for at, rank in sorted(where)})
            cache.commit(
                Added(
                    form=added.form,
                    layers=added.layers,
                    layer=layer,
                    sequence=sequence,
                    numbers=numbers,
                )
            )

    # -- parts -----------------------------------------------------------------------------------

    def _begin(self, phase: str, real: torch.Tensor, rows: list[tuple[Prompt, int]]) -> None:
        """A call is to come: what it is counted under, its real rows, and whose tokens they are."""
        for handler in self._handlers:
            handler.phase, handler.real = phase, real
        self.rows += len(real) if not phase else 0
        if self._place is not None:
            self._place([(one.number, at, one.token(at)) for one, at in rows], not phase)

    def _fed(
        self, active: list[Prompt], cache: SequenceCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and places of a step: each prompt's last token, right-aligned."""
        columns = int(cache.get_seq_length())
        places = torch.tensor([one.fed for one in active])[:, None]
        mask = (torch.arange(columns + 1) >= columns - places).long()
        return torch.tensor([[one.tokens[-1]] for one in active]), mask, places

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, cache: SequenceCache
    ) -> torch.Tensor:
        """Logits `[rows, V]` of each row's last token, float32."""
        device = self._model.device
        options: dict[str, Any] = {"position_ids": places.to(device), "logits_to_keep": 1}
        output = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._names},
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _choose(self, prompts: list[Prompt], logits: torch.Tensor) -> None:
        """The next token of prompts whose rows ended here."""
        for one, row in zip(prompts, logits.to("cpu"), strict=True):
            step = len(one.tokens)
            one.choice.skip(step - one.chosen, len(row))  # chosen on other ranks
            token = int(one.choice.scores(row).argmax())
            one.chosen = step + 1
            if self._keep is not None:
                self._keep(one.number, step, row)
            self._add(one, token if one.forced is None else int(one.forced[step]))

    def _add(self, one: Prompt, token: int) -> None:
        one.tokens.append(token)
        one.done = token in self._stop or len(one.tokens) >= self._options.max_new_tokens

    def _tokens_of(self, prompts: list[Prompt]) -> torch.Tensor:
        last = [one.tokens[-1] for one in prompts]
        return torch.tensor(last, dtype=torch.int32, device=self._model.device)

    def _learn_tokens(self, order: list[Prompt], known: list[Prompt], tokens: torch.Tensor) -> None:
        mine = {id(one) for one in known}
        for one, token in zip(order, tokens.tolist(), strict=True):
            if id(one) not in mine:
                self._add(one, token)

    def _share_tokens(self, batch: list[Prompt], mine: list[Prompt], phase: str) -> None:
        """Vanilla ranks tell each other their tokens, by which all know when all have ended."""
        (tokens,) = self._link.gather(phase + TOKENS, None, [self._tokens_of(mine)])
        ordered = [one for rank in range(self._link.size) for one in batch if one.rank == rank]
        self._learn_tokens(ordered, mine, tokens)


def _columns(
    batch: list[Prompt], ordered: list[Prompt], device: torch.device
) -> tuple[int, torch.Tensor]:
    """(columns, int64 `[real tokens]` sequence * columns + column) of prompts' tokens, prompt by
    prompt as `ordered`, where `batch`'s sequences stand right-aligned.
    """
    longest = max((len(one.prompt) for one in batch), default=0)
    place = {id(one): at for at, one in enumerate(batch)}
    at = [
        place[id(one)] * longest + longest - len(one.prompt) + step
        for one in ordered
        for step in range(len(one.prompt))
    ]
    return longest, torch.tensor(at, dtype=torch.long, device=device)


def _placed(
    like: Added, rows: torch.Tensor, at: torch.Tensor, sequences: int, longest: int
) -> Added:
    """Rows of a prefill `[real tokens, layers, numbers]` as what all sequences add.

    Args:
        at: int64 `[real tokens]`, sequence * longest + column of each; other columns are padding,
            which the attention mask hides.
    """
    numbers = rows.new_zeros(sequences * longest, *rows.shape[1:])
    numbers[at] = rows
    numbers = numbers.unflatten(0, (sequences, longest)).permute(2, 0, 1, 3).flatten(0, 1)
    grid = torch.cartesian_prod(torch.tensor(like.layers), torch.arange(sequences)).to(rows.device)
    return Added(
        form=like.form,
        layers=like.layers,
        layer=grid[:, 0],
        sequence=grid[:, 1],
        numbers=numbers,
    )
