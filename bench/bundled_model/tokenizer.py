"""Owns the bundled model's tokenizer: byte-level BPE, digits one by one, think tokens.

Does not know where texts come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken as Added
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bundled_model.puzzles import END_THINK, THINK

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
VOCABULARY = 4096


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE of `vocabulary` tokens, the five named ones first.

    The think tokens are not special: decoding keeps them even where special tokens are skipped.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[
            Added(PAD),
            Added(BEGIN),
            Added(END),
            Added(THINK, normalized=False),
            Added(END_THINK, normalized=False),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = id_of(tokenizer, BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return _keeping_think(tokenizer)


def _keeping_think(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with think tokens that are not special, whatever the trainer made of them."""
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] not in (THINK, END_THINK)
    return Tokenizer.from_str(json.dumps(document))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The number of a token that must be there."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token!r}; train it with this module")
    return int(number)


def as_transformers(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and AutoTokenizer loads it; pads on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
