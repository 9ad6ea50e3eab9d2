"""`generate_batches`: tokens for many prompts in batches of sequences that share experts.

Checks what it is given and hands it on; the loop, the grouping and the caches are others'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

from transformers import PreTrainedModel

from moe_runtime.batch_check import compare_alone
from moe_runtime.batch_loop import BatchLoop
from moe_runtime.batch_run import BatchRun
from moe_runtime.errors import AttachError, ConfigError, UnsupportedModelError
from moe_runtime.path_forecast import PathForecast, check_predictor
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.token_path import TokenPath
from moe_runtime.prompt_state import LoopOptions, PromptState, check_prompts
from moe_runtime.runtime import Runtime, runtime_of
from moe_runtime.scheduler import METHODS
from moe_runtime.token_choice import TokenChoice

__all__ = ["SCHEDULES", "generate_batches", "sequences_held"]

_LOG = logging.getLogger("moe_runtime")
SCHEDULES = (*METHODS, "order")
_WINDOW = 4  # two, as the paper has it, save half as much: bench/token_scheduler.py


def generate_batches(  # noqa: PLR0913  its options
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    schedule: str = "union",
    window: int | str | None = None,
    every: int = 1,
    predictor: Predictor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    least_gain: float = 0.01,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BatchRun:
    """Generate for many prompts, with sequences regrouped by the experts they are about to need.

    `window` batches are under way at once. Each step gives every sequence a token, batch by batch;
    before it, sequences are put into batches anew by the predicted paths of their next tokens, and
    their keys and values are gathered. A sequence that ends gives its place to the next prompt.
    ExpertFlow (He), 2410.17954, section 3.3, regroups two batches; `window` may be more.

    A prompt's tokens are those that it has alone: logits agree to rounding (about 1e-6 of the
    largest in float32), so a token can differ only where the top two are that close.

    Args:
        model: a decoder-only model; with our runtime it tells where tokens went, without it nothing
            is counted and only a `predictor` that needs no telling can schedule.
        prompts: token ids of each prompt, one or more.
        batch_size: sequences of a forward call.
        max_new_tokens: of each prompt.
        schedule: `"union"` or `"k-medoids"`, see `scheduler.group_sequences`; `"order"`, prompts
            stay in the batches in which they come.
        window: batches under way at once; `"all"`: every prompt. Memory for keys and values grows
            with it. None: 4, and 1 in order.
        every: steps between regroupings.
        predictor: of the next token's path, for this model's layers; it is reset. None: what
            the run itself has shown of the token and of its sequence (`TokenPath`).
        temperature, seed: 0 takes the likeliest token; else tokens are drawn, with random numbers
            that belong to the prompt's place in `prompts`.
        stop_tokens: ids that end a sequence; None: those of the model's generation configuration.
        least_gain: regroup only if this share of the present groups' experts is promised to be
            saved, as gathering has a price.
        verify: afterwards run each prompt alone and compare (`BatchRun.agreement`). It takes one
            call a prompt, which whoever records sees too.
        progress: called after each step with finished prompts and new tokens so far.

    Raises:
        ConfigError: an option out of range, prompts without a token or with ids outside the
            vocabulary, a predictor for other layers or one that needs hidden states.
        UnsupportedModelError: an encoder-decoder, or a layer whose past is no keys and values.
    """
    runtime = _runtime(model)
    _check_model(model)
    check_prompts(prompts, model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    options = LoopOptions(
        batch_size=_at_least_one("batch_size", batch_size),
        window=_window(window, schedule, len(prompts), batch_size),
        max_new_tokens=_at_least_one("max_new_tokens", max_new_tokens),
        stop_tokens=_stop_tokens(model, stop_tokens),
        method=_method(schedule),
        every=_at_least_one("every", every),
        least_gain=_share("least_gain", least_gain),
        seed=_seed(seed),
        keep_logits=verify,
    )
    if not temperature >= 0.0:
        raise ConfigError(f"temperature is 0 or more, found {temperature}")
    if predictor is not None:
        check_predictor(predictor, None if runtime is None else runtime.spec.grid)
    elif runtime is not None:
        predictor = TokenPath(runtime.spec.grid)
    used = predictor if options.method else None
    unknown = "no path is known: the model has no runtime and no predictor was given"
    fallback = unknown if options.method and used is None else ""
    if fallback:
        _LOG.warning("%s; prompts stay in order", fallback)
    forecast = PathForecast(used)

    def choices() -> list[TokenChoice]:
        numbers = range(len(prompts))
        return [TokenChoice(temperature=temperature, seed=seed, number=at) for at in numbers]

    states = [
        PromptState(number=at, prompt=[int(token) for token in prompt], choice=choice)
        for at, (prompt, choice) in enumerate(zip(prompts, choices(), strict=True))
    ]
    loop = BatchLoop(model, runtime, states, options, forecast, progress)
    loop.run()
    return BatchRun(
        outputs=tuple(tuple(state.tokens) for state in states),
        schedule=schedule,
        scheduled=used is not None,
        fallback=fallback or forecast.failure,
        predictor="" if used is None else used.name,
        batch_size=options.batch_size,
        window=options.window,
        every=options.every,
        prefill=loop.prefill,
        decode=loop.decode,
        rounds=loop.rounds,
        regroupings=loop.regroupings,
        moved=loop.moved,
        schedule_seconds=loop.schedule_seconds,
        gather_seconds=loop.gather_seconds,
        agreement=compare_alone(model, states, choices()) if verify else None,
    )


def sequences_held(
    prompts: int, *, batch_size: int, schedule: str = "union", window: int | str | None = None
) -> int:
    """A bound on the sequences whose keys and values `generate_batches` holds at once.

    Those under way, as many that have ended while others take their places, and as many that are
    being gathered into new batches. As `max_batch` of `from_pretrained`, with the longest prompt
    and its new tokens as `max_length`, an automatic budget leaves room for them.

    Args:
        prompts: how many.
        batch_size, schedule, window: as `generate_batches` takes them.

    Raises:
        ConfigError: an option out of range.
    """
    _method(schedule)
    size = _at_least_one("batch_size", batch_size)
    under_way = min(prompts, size * _window(window, schedule, prompts, size))
    gathered = under_way if size > 1 and under_way > 1 else 0
    return min(prompts, 2 * under_way) + gathered


def _runtime(model: PreTrainedModel) -> Runtime | None:
    try:
        return runtime_of(model)
    except AttachError:
        return None


def _check_model(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; generate_batches runs decoder-only "
            "models. Use model.generate"
        )


def _at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is a number, 1 or more, found {value!r}")
    return value


def _share(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} is a share, 0 or more and below 1, found {value!r}")
    return value


def _seed(value: int) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise ConfigError(f"seed is a number, 0 to 2**32 - 1, found {value!r}")
    return value


def _method(schedule: str) -> str | None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    return None if schedule == "order" else schedule


def _window(window: int | str | None, schedule: str, prompts: int, batch_size: int) -> int:
    """Batches under way at once, no more than the prompts need."""
    most = -(-prompts // max(batch_size, 1))
    if window is None:
        return min(most, 1 if schedule == "order" else _WINDOW)
    if window == "all":
        return most
    if not isinstance(window, int) or window < 1:
        raise ConfigError(f"window is a number of batches, 1 or more, or 'all', found {window!r}")
    return min(window, most)


def _stop_tokens(model: PreTrainedModel, given: Collection[int] | None) -> frozenset[int]:
    if given is not None:
        return frozenset(int(token) for token in given)
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if known is None:
        return frozenset()
    return frozenset([known] if isinstance(known, int) else [int(token) for token in known])
