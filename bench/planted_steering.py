"""A tiny MoE model whose weights are written by hand so that one known expert carries the answer.

The positive control of steering: identification has to find the expert, and accuracy has to move
with beta as `accuracy_at` says. Does not know how experts are found or steered.

A problem is the text `Question Q3 Answer`. The model goes on `<think>`, some words, `</think>`, an
answer, the end:

    layer 0     attention copies the question to every later position;
    PLANTED     where `<think>` is read, and nowhere else, the router picks one expert, which turns
                the question into evidence for the right answer, `EVIDENCE` in logits;
    the layer   attention at `</think>` copies the evidence from `<think>`;
    after it
    the head    gives a wrong answer, another for each question, the same `EVIDENCE` always.

So the answer is drawn between two: right with the probability sigmoid(EVIDENCE * (beta - 1)), one
half unsteered. All other experts write to dimensions that only later routers read: they change
routing, and no answer. One huge dimension ("ballast") sets the norm of the residual stream, so
that every RMSNorm, with a weight of the same size, passes the rest on as it is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

__all__ = [
    "ANSWERS",
    "EVIDENCE",
    "LAYERS",
    "PLANTED",
    "accuracy_at",
    "answer_of",
    "planted_model",
    "planted_tokenizer",
    "prompt_of",
    "reference_of",
    "save_planted",
]

LAYERS, EXPERTS, TOP_K = 4, 8, 2
PLANTED = (1, 5)  # layer, expert
ANSWERS = 16
EVIDENCE = 1.0
WORDS = ("hmm", "so", "Alternatively")
VOCABULARY = (
    *("<pad>", "<eos>", "<unk>", "Question", "Answer", "<think>", "</think>"),
    *WORDS,
    *(f"Q{n}" for n in range(ANSWERS)),
    *(f"A{n}" for n in range(ANSWERS)),
)
THINK, END_THINK, EOS = (VOCABULARY.index(t) for t in ("<think>", "</think>", "<eos>"))

# The residual stream: which token was read, which question was asked, the evidence where it was
# made, the evidence where it is used, what other experts write, the ballast.
_TOKEN = 0
_QUESTION = len(VOCABULARY)
_MADE = _QUESTION + ANSWERS
_USED = _MADE + ANSWERS
_NOISE = _USED + ANSWERS
_NOISES = 8
HIDDEN = 128  # the sum of these and some that are never used; grouped kernels want whole lines
_BALLAST = HIDDEN - 1
HEAD = 16  # two of its dimensions turn so slowly under RoPE that places do not matter
_SLOW = (HEAD // 2 - 1, HEAD - 1)
_SIZE = 1e5  # of the ballast
_ALLOWED, _SETTLED = 400.0, 60.0  # logits: of the words that may come next, of the two answers
_CERTAIN = 20.0  # silu(20) is 20 up to 4e-8, and a router's lead of 20 is always chosen


def prompt_of(question: int) -> str:
    """The prompt of a question, 0 to `ANSWERS` - 1."""
    return f"Question Q{question} Answer"


def answer_of(question: int) -> str:
    """What follows `</think>` if the model is right."""
    return f"A{question}"


def reference_of(question: int, words: int = 2) -> str:
    """A solved problem of the model's own form, to read routing off."""
    thought = " ".join(WORDS[(question + n) % len(WORDS)] for n in range(words))
    return f"{prompt_of(question)} <think> {thought} </think> {answer_of(question)}"


def accuracy_at(beta: float) -> float:
    """The share of right answers when drawing at temperature 1 with the planted expert at beta."""
    return 1 / (1 + math.exp(-EVIDENCE * (beta - 1)))


def planted_tokenizer() -> Any:
    """Words between spaces, each a token."""
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # spaces between words
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def planted_model(seed: int = 0) -> Any:
    """The model, float32, in evaluation mode; the seed draws all other routing."""
    config = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=ANSWERS,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e14},
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.zero_()
    tokens = torch.arange(len(VOCABULARY))
    model.model.embed_tokens.weight[tokens, _TOKEN + tokens] = 1.0
    model.model.embed_tokens.weight[:, _BALLAST] = _SIZE
    for norm in [model.model.norm, *(n for layer in model.model.layers for n in _norms(layer))]:
        norm.weight.fill_(_SIZE / math.sqrt(HIDDEN))
    _copy_question(model.model.layers[0].self_attn)
    for at, layer in enumerate(model.model.layers):
        _route(layer.mlp.gate.weight, at, draw)
        _write_noise(layer.mlp.experts, draw)
    _plant(model.model.layers[PLANTED[0]].mlp)
    _copy_evidence(model.model.layers[PLANTED[0] + 1].self_attn)
    _choose_tokens(model.lm_head.weight)
    return model


def save_planted(folder: Path, seed: int = 0) -> Path:
    """Model and tokenizer as a checkpoint."""
    planted_model(seed).save_pretrained(folder)
    planted_tokenizer().save_pretrained(folder)
    return folder


def _norms(layer: Any) -> list[Any]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def _questions() -> torch.Tensor:
    return torch.tensor([VOCABULARY.index(f"Q{n}") for n in range(ANSWERS)])


def _look(attention: Any) -> None:
    """Scores of about 60 where a query's dimension is the key's: all attention goes there."""
    attention.q_norm.weight.fill_(15.0)
    attention.k_norm.weight.fill_(1.0)


def _copy_question(attention: Any) -> None:
    """Every token looks at the question's and takes its number along."""
    questions, numbers = _questions(), torch.arange(ANSWERS)
    _look(attention)
    attention.q_proj.weight[_SLOW[0], : len(VOCABULARY)] = 1.0
    attention.k_proj.weight[_SLOW[0], questions] = 1.0
    attention.v_proj.weight[numbers, questions] = 1.0
    attention.o_proj.weight[_QUESTION + numbers, numbers] = 1.0


def _copy_evidence(attention: Any) -> None:
    """`</think>` looks at `<think>` and takes the evidence; all others at the question: nothing."""
    numbers = torch.arange(ANSWERS)
    _look(attention)
    attention.q_proj.weight[_SLOW[1], : len(VOCABULARY)] = 1.0
    attention.q_proj.weight[_SLOW[1], END_THINK] = 0.0
    attention.q_proj.weight[_SLOW[0], END_THINK] = 1.0
    attention.k_proj.weight[_SLOW[0], THINK] = 1.0
    attention.k_proj.weight[_SLOW[1], _questions()] = 1.0
    attention.v_proj.weight[numbers, _MADE + numbers] = 1.0
    attention.o_proj.weight[_USED + numbers, numbers] = 1.0


def _route(gate: torch.Tensor, layer: int, draw: torch.Generator) -> None:
    """Each token has preferences of its own in each layer; later layers heed what was written."""
    gate[:, : len(VOCABULARY)] = torch.randn(EXPERTS, len(VOCABULARY), generator=draw)
    if layer > PLANTED[0]:
        gate[:, _MADE : _MADE + ANSWERS] = torch.randn(EXPERTS, ANSWERS, generator=draw)
    if layer:
        gate[:, _NOISE : _NOISE + _NOISES] = 0.2 * torch.randn(EXPERTS, _NOISES, generator=draw)


def _write_noise(experts: Any, draw: torch.Generator) -> None:
    """Every expert writes something of its own, by the token, that only routers read."""
    experts.gate_up_proj[:, :ANSWERS, : len(VOCABULARY)] = _CERTAIN
    up = torch.randn(EXPERTS, ANSWERS, len(VOCABULARY), generator=draw)
    experts.gate_up_proj[:, ANSWERS:, : len(VOCABULARY)] = up / _CERTAIN
    down = torch.randn(EXPERTS, _NOISES, ANSWERS, generator=draw)
    experts.down_proj[:, _NOISE : _NOISE + _NOISES, :] = down / math.sqrt(ANSWERS)


def _plant(block: Any) -> None:
    """The router of `<think>`, and of nothing else, goes to the expert that knows the answer."""
    expert, numbers = PLANTED[1], torch.arange(ANSWERS)
    gate = block.gate.weight
    gate[expert, :] = 0.0
    gate[expert, : len(VOCABULARY)] = -_CERTAIN
    # What lower layers wrote must not move its weight, so that its part is known.
    gate[:, _NOISE : _NOISE + _NOISES] = 0.0
    others = gate[:, THINK].clone()
    others[expert] = -math.inf
    gate[expert, THINK] = others.max()  # equal to the other chosen one: a weight of one half each
    block.experts.gate_up_proj[expert, ANSWERS:] = 0.0
    block.experts.gate_up_proj[expert, ANSWERS + numbers, _QUESTION + numbers] = 1.0
    block.experts.down_proj[expert] = 0.0
    block.experts.down_proj[expert, _MADE + numbers, numbers] = EVIDENCE / (0.5 * _CERTAIN)


def _choose_tokens(head: torch.Tensor) -> None:
    """Which token follows which; after `</think>` the right answer or one wrong one."""
    follows: dict[str, tuple[str, ...]] = {
        "Answer": ("<think>",),
        "<think>": WORDS,
        **dict.fromkeys(WORDS, (*WORDS, "</think>")),
        **{f"A{n}": ("<eos>",) for n in range(ANSWERS)},
    }
    for token, allowed in follows.items():
        for one in allowed:
            head[VOCABULARY.index(one), _TOKEN + VOCABULARY.index(token)] = _ALLOWED
    for number in range(ANSWERS):
        right, wrong = (VOCABULARY.index(f"A{n}") for n in (number, (number + 1) % ANSWERS))
        head[right, _QUESTION + number] += _SETTLED
        head[wrong, _QUESTION + number] += _SETTLED + EVIDENCE
        head[right, _USED + number] = 1.0
