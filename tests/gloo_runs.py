"""What two gloo processes check about whole runs; processes that are spawned import it.

Knows `generate`; not how links are tested.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_runtime.parallel import GroupLink, generate
from parallel_models import alone, largest_difference, random_plan, some_prompts, tiny


def check_gloo_run(rank: int, folder: str) -> None:
    """Both modes, and both framings of a coherent run: one process's tokens, counts alike."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    prompts = some_prompts()
    for top_k in (4,):
        model = tiny(top_k)
        want, wanted = alone(model, prompts, 5)
        for mode in ("vanilla", "coherent"):
            runs = []
            for framing in ("eager", "sizes")[: 1 + (mode == "coherent")]:
                logits: dict[tuple[int, int], torch.Tensor] = {}
                run = generate(
                    model,
                    prompts,
                    plan=random_plan(model, 2, seed=4),
                    mode=mode,
                    max_new_tokens=5,
                    stop_tokens=(),
                    check="stop",
                    link=GroupLink(framing=framing, timeout=60.0),
                    keep=lambda n, s, row, into=logits: into.__setitem__((n, s), row),
                )
                assert run.outputs == want, (top_k, mode, framing)
                mine = {at: wanted[at] for at in logits}
                assert not logits or largest_difference(logits, mine) < 1e-5
                runs.append(run)
            assert runs[0].cross_bytes == runs[-1].cross_bytes
            assert runs[0].stays == runs[-1].stays
    dist.destroy_process_group()
