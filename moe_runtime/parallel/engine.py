"""One rank of a parallel run put together: handlers, hooks, self-check, loop, record.

Knows a model in memory and a link; not where the model came from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.errors import MoERuntimeError, ParallelError, UnsupportedModelError
from moe_runtime.model_spec import MoESpec
from moe_runtime.parallel.coherent import CoherentDecoder
from moe_runtime.parallel.decode import Decode, Prompt
from moe_runtime.parallel.experts_call import ExpertsHandler, handled
from moe_runtime.parallel.foretell import foretell, foretell_prefill, links_of, sizes_of
from moe_runtime.parallel.held import HeldExperts
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.options import ParallelOptions
from moe_runtime.parallel.routing_log import RoutingLog
from moe_runtime.parallel.run import LayerStays, ParallelRun, SelfCheck
from moe_runtime.parallel.shares import Shares
from moe_runtime.parallel.structure import decoder_layers
from moe_runtime.parallel.traffic import Ledger, Traffic, add_traffic
from moe_runtime.parallel.vanilla import VanillaLayer
from moe_runtime.placement.plan import Plan
from moe_runtime.token_choice import TokenChoice
from moe_runtime.trace import RoutingTrace

__all__ = ["CHECK_LIMITS", "Engine"]

# Differences of logits, relative to a step's largest, that the self-check lets pass as rounding.
CHECK_LIMITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
_CHECK_PROMPTS, _CHECK_TOKENS, _CHECK_STEPS = 4, 12, 3

Keep = Callable[[int, int, torch.Tensor], None]


class Engine:
    """One rank's part of a run.

    Args:
        model: with its dense weights in place; expert tensors are taken from `held`.
        held: this rank's experts, by position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: MoESpec,
        plan: Plan,
        shares: Shares,
        held: Sequence[HeldExperts],
        link: Link,
        options: ParallelOptions,
        stop_tokens: frozenset[int],
    ) -> None:
        self._model, self._spec, self._plan, self._shares = model, spec, plan, shares
        self._held, self._link, self._options, self._stop = held, link, options, stop_tokens
        links = options.links or links_of(plan)
        self._links = None if links is None else replace(links, rounds=link.rounds)
        self._vanilla = [
            VanillaLayer(link, at, share, one)
            for at, (share, one) in enumerate(zip(shares.layers, held, strict=True))
        ]

    def run(self, prompts: Sequence[Sequence[int]], keep: Keep | None = None) -> ParallelRun:
        """Generate for the prompts; the same value on every rank.

        Args:
            keep: told of the logits of steps whose rows ended here.
        """
        mode, check = self._options.mode, None
        decoder = None
        if mode == "coherent":
            decoder, check = self._coherent(prompts)
            mode = mode if decoder is not None else "vanilla"
        self._link.ledger = Ledger()
        log = RoutingLog(self._spec) if self._options.keep_routing else None
        began = time.perf_counter()
        states = self._prompts(prompts)
        loop = self._decode(states, decoder, keep, log)
        seconds = time.perf_counter() - began
        return self._gathered(states, loop, decoder, mode, check, seconds, log)

    # -- running ---------------------------------------------------------------------------------

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> list[Prompt]:
        options = self._options
        return [
            Prompt(
                number=at,
                prompt=prompt,
                choice=TokenChoice(temperature=options.temperature, seed=options.seed, number=at),
            )
            for at, prompt in enumerate(prompts)
        ]

    def _decode(
        self,
        prompts: Sequence[Prompt],
        decoder: CoherentDecoder | None,
        keep: Keep | None,
        log: RoutingLog | None,
        options: ParallelOptions | None = None,
    ) -> Decode:
        layers = self._spec.layers
        own: list[ExpertsHandler] = list(self._vanilla if decoder is None else decoder.handlers)
        handlers: Mapping[str, ExpertsHandler] = {
            layer.path: one for layer, one in zip(layers, own, strict=True)
        }
        heard = None if log is None else log.heard
        for vanilla in self._vanilla:
            vanilla.heard = heard
        if decoder is not None:
            decoder.heard = heard
        loop = Decode(
            self._model,
            self._link,
            options or self._options,
            self._stop if options is None else frozenset(),
            self._vanilla,
            decoder,
            after_first=layers[0].layer + 1,
            keep=keep,
            place=None if log is None else log.place,
        )
        with ExitStack() as stack:
            stack.enter_context(handled(self._model, handlers))
            if decoder is not None:
                stack.enter_context(decoder.hooked())
            loop.run(prompts)
        return loop

    # -- self-check ------------------------------------------------------------------------------

    def _coherent(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[CoherentDecoder | None, SelfCheck | None]:
        """A decoder for coherent steps, if the model takes to them on every rank."""
        reason = ""
        decoder = None
        try:
            layers = decoder_layers(self._model, self._spec)
            decoder = CoherentDecoder(
                self._link, layers, self._vanilla, self._shares.layers, self._held
            )
        except UnsupportedModelError as error:
            reason = str(error)
        reasons = self._link.agree("structure", reason)
        check = None
        if not any(reasons) and self._options.check != "off":
            assert decoder is not None
            check = self._compared(prompts, decoder)
            reasons = [check.reason]
        reason = next((one for one in reasons if one), "")
        if not reason:
            return decoder, check
        if self._options.check != "fallback":
            raise self._link.agreed(
                UnsupportedModelError(
                    "coherent expert parallelism does not fit "
                    f"{type(self._model).__name__}: {reason} (mode 'vanilla' works; check "
                    "'fallback' takes it by itself)"
                )
            )
        if check is None:
            check = SelfCheck(steps=0, largest=0.0, limit=0.0, passed=False, reason=reason)
        return None, check

    def _compared(self, prompts: Sequence[Sequence[int]], decoder: CoherentDecoder) -> SelfCheck:
        """A few short prompts vanilla, then coherent with the same tokens."""
        some = _check_prompts(prompts, self._link.size)
        options = replace(
            self._options, max_new_tokens=_CHECK_STEPS + 1, temperature=0.0, batch_size=None
        )
        reference, tokens = self._checked(some, None, options, None)
        problem = ""
        try:
            found, _ = self._checked(some, decoder, options, tokens)
        except MoERuntimeError as error:
            if isinstance(error, ParallelError):
                raise
            raise UnsupportedModelError(f"the self-check failed: {error}") from error
        scale = reference.abs().amax(1, keepdim=True)
        largest = float(((found - reference).abs() / scale).max())
        limit = CHECK_LIMITS.get(self._model.dtype, 1e-4)
        if not largest <= limit:
            wide = "its layers do something with the experts' output that this mode does not do"
            problem = f"logits differ from vanilla by {largest:.2g} of the largest: {wide}"
        for handler in decoder.handlers:
            handler.forget_counts()
        return SelfCheck(
            steps=len(reference),
            largest=largest,
            limit=limit,
            passed=not problem,
            reason=problem,
        )

    def _checked(
        self,
        prompts: Sequence[Sequence[int]],
        decoder: CoherentDecoder | None,
        options: ParallelOptions,
        forced: list[list[int]] | None,
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Logits `[prompts * steps, V]` of a short run, the same on all ranks, and its tokens."""
        kept: list[tuple[int, torch.Tensor]] = []
        states = self._prompts(prompts)
        for at, state in enumerate(states):
            state.choice = TokenChoice(temperature=0.0, seed=0, number=at)
            state.forced = None if forced is None else forced[at]

        def keep(number: int, step: int, logits: torch.Tensor) -> None:
            kept.append((number * options.max_new_tokens + step, logits))

        self._decode(states, decoder, keep, None, options)
        size = int(self._model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        names = torch.tensor([name for name, _ in kept], dtype=torch.long)
        rows = torch.stack([one for _, one in kept]) if kept else torch.zeros(0, size)
        device = self._link.device
        where, logits = self._link.gather("check", None, [names.to(device), rows.to(device)])
        return logits[where.argsort()], [state.tokens for state in states]

    # -- record ----------------------------------------------------------------------------------

    def _gathered(
        self,
        states: Sequence[Prompt],
        loop: Decode,
        decoder: CoherentDecoder | None,
        mode: str,
        check: SelfCheck | None,
        seconds: float,
        log: RoutingLog | None,
    ) -> ParallelRun:
        link = self._link
        ledger, link.ledger = link.ledger, Ledger()
        stays = [] if decoder is None else [asdict(one.stays) for one in decoder.handlers]
        told = link.agree(
            "record",
            {
                "traffic": [one.to_dict() for one in ledger.entries()],
                "idle": ledger.idle_seconds,
                "slept": ledger.slept_seconds,
                "seconds": seconds,
                "prefill": loop.prefill_seconds,
                "prefill_wait": loop.prefill_wait_seconds,
                "cache": loop.cache_bytes,
                "stays": stays,
            },
        )
        each = [[Traffic(**entry) for entry in one["traffic"]] for one in told]
        routing = None if log is None else log.gathered(link)
        return ParallelRun(
            outputs=tuple(tuple(state.tokens) for state in states),
            mode=mode,
            asked=self._options.mode,
            ranks=link.size,
            steps=loop.steps,
            traffic=add_traffic([entry for one in each for entry in one], alike=True),
            sent=tuple(
                sum(e.cross_bytes for e in one if not e.kind.startswith("prefill.")) for one in each
            ),
            stays=tuple(
                LayerStays(
                    layer=layer.layer,
                    **{name: sum(one["stays"][at][name] for one in told) for name in stays[at]},
                )
                for at, layer in enumerate(self._spec.layers)
                if stays
            ),
            lean=() if decoder is None else decoder.lean,
            kv_row_bytes=loop.kv_row_bytes,
            cache_bytes=tuple(one["cache"] for one in told),
            idle_seconds=tuple(one["idle"] for one in told),
            slept_seconds=tuple(one["slept"] for one in told),
            seconds=max(one["seconds"] for one in told),
            prefill_seconds=max(one["prefill"] for one in told),
            prefill_wait_seconds=tuple(one["prefill_wait"] for one in told),
            check=check,
            predicted=self._predicted(routing, loop, mode),
            routing=routing,
        )

    def _predicted(self, routing: RoutingTrace | None, loop: Decode, mode: str) -> dict[str, Any]:
        if routing is None:
            return {}
        several = len(self._spec.layers) > 1
        steps = foretell(self._plan, self._shares, routing.decode()) if several else {}
        if mode == "vanilla" and self._options.homes == "prefill":
            return steps  # what a prefill sends that deals prompts out anew is not foretold
        prefill = foretell_prefill(
            self._plan,
            routing.prefill(),
            sizes_of(
                self._spec,
                hidden=self._model.config.get_text_config(decoder=True).hidden_size,
                itemsize=self._model.dtype.itemsize,
                weight=self._vanilla[0].last[1].itemsize,
                kv_row_bytes=loop.kv_row_bytes,
            ),
            mode,
            self._links,
            steps_follow=self._options.max_new_tokens > 1,
            forms=loop.kv_forms,
        )
        return steps | {"prefill": prefill}


def _check_prompts(prompts: Sequence[Sequence[int]], ranks: int) -> list[Sequence[int]]:
    """A few prompts' beginnings of unlike lengths, at least as many as ranks: padding is tried."""
    some: list[Sequence[int]] = []
    for at in range(max(_CHECK_PROMPTS, ranks)):
        prompt = prompts[at % len(prompts)]
        some.append(prompt[: max(1, min(len(prompt), _CHECK_TOKENS) - at % _CHECK_PROMPTS)])
    return some
