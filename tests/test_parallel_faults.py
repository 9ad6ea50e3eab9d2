"""Ranks that die, hang, differ or are interrupted: an error on every rank, in time, none left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_runtime.errors import BudgetError, ConfigError, ParallelError
from moe_runtime.parallel import Link, run_ranks
from moe_runtime.parallel.agreement import require_same, together
from moe_runtime.parallel.footprint import Footprint, cache_bytes, require_memory
from moe_runtime.parallel.launch import TERMINATED, process_group
from parallel_ranks import some_ranks, two_ranks
from rank_program import main
from tiny import tiny_config

PROGRAM = Path(__file__).with_name("rank_program.py")
SLACK = 10.0  # seconds that a busy machine may add


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])  # rank 0 keeps the store
def test_a_rank_that_dies_is_an_error_on_the_others_long_before_the_timeout(
    tmp_path: Path, rank: int
) -> None:
    with two_ranks(main, "exchange", 60.0, tmp_path) as both:
        for one in both:
            one.wait_for("ready")
        lost, well = both[rank], both[1 - rank]
        lost.send(signal.SIGKILL)
        code, errors = well.ended(SLACK)
        assert code == 1
        assert (
            f"error: rank {1 - rank}: move of layer 0 did not come to an end within 60 s" in errors
        )
        assert "Traceback" not in errors


@pytest.mark.slow
def test_of_a_lost_rank_the_others_do_not_blame_each_other(tmp_path: Path) -> None:
    with some_ranks(3, main, "exchange", 60.0, tmp_path) as ranks:
        for one in ranks:
            one.wait_for("ready")
        ranks[2].send(signal.SIGKILL)
        for rank in (0, 1):
            code, errors = ranks[rank].ended(SLACK)
            assert code == 1
            assert f"error: rank {rank}: move of layer 0 did not come to an end" in errors
            assert "failed:" not in errors


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_on_the_others_after_the_timeout(tmp_path: Path) -> None:
    with two_ranks(main, "exchange", 2.0, tmp_path) as (well, lost):
        for one in (well, lost):
            one.wait_for("ready")
        lost.send(signal.SIGSTOP)
        began = time.monotonic()
        code, errors = well.ended(2.0 + SLACK)
        assert time.monotonic() - began > 1.5
        assert code == 1
        assert "error: rank 0: move of layer 0 did not come to an end within 2 s" in errors


@pytest.mark.slow
def test_ranks_that_differ_all_say_in_what(tmp_path: Path) -> None:
    with two_ranks(main, "differ", 60.0, tmp_path) as both:
        for one in both:
            code, errors = one.ended()
            assert code == 1
            assert 'the ranks differ in plan file (rank 0: "a"; rank 1: "b")' in errors


@pytest.mark.slow
def test_a_failure_of_one_rank_is_told_on_all(tmp_path: Path) -> None:
    with two_ranks(main, "fail", 60.0, tmp_path) as (well, failing):
        code, errors = failing.ended()
        assert code == 1
        assert "error: the disk is gone" in errors
        code, errors = well.ended()
        assert code == 1
        assert "loading failed elsewhere: rank 1: OSError: the disk is gone" in errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_rank_exits_with_130_and_ends_the_others(tmp_path: Path, rank: int) -> None:
    with two_ranks(main, "exchange", 60.0, tmp_path) as both:
        for one in both:
            one.wait_for("ready")
        pressed, well = both[rank], both[1 - rank]
        pressed.send(signal.SIGINT)
        assert pressed.ended()[0] == 130
        code, errors = well.ended(SLACK)
        assert code == 1
        assert f"rank {rank} failed: KeyboardInterrupt" in errors


def test_sigterm_is_answered_while_waiting_for_others(tmp_path: Path) -> None:
    with two_ranks(main, "exchange", 60.0, tmp_path) as (waiting, lost):
        for one in (waiting, lost):
            one.wait_for("ready")
        lost.send(signal.SIGSTOP)
        time.sleep(0.5)  # it waits in the exchange now
        waiting.send(signal.SIGTERM)
        code, errors = waiting.ended(SLACK)
        assert code == TERMINATED
        assert "stopped by the launcher" in errors


@pytest.mark.slow
def test_torchrun_leaves_no_process_when_a_rank_dies_or_it_is_killed_itself() -> None:
    for victim in ("rank", "launcher"):
        launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--standalone", str(PROGRAM), "exchange", "10"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        children: list[psutil.Process] = []
        try:
            assert launcher.stdout is not None
            said = ""  # two processes write into one pipe, and may mix their lines
            while said.count("ready") < 2:
                line = launcher.stdout.readline()
                assert line, "both ranks start"
                said += line
            children = psutil.Process(launcher.pid).children(recursive=True)
            assert len(children) >= 2
            (children[0] if victim == "rank" else launcher).send_signal(signal.SIGKILL)
            launcher.wait(timeout=60)
            assert launcher.returncode != 0
            _, left = psutil.wait_procs(children, timeout=10)
            assert not left
        finally:
            launcher.kill()
            for child in children:
                if child.is_running():
                    child.kill()
            launcher.communicate()


def test_without_torchrun_the_error_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"), process_group():
        pass


# -- agreement and memory, on threads -----------------------------------------------------------


def test_every_difference_is_named_with_its_ranks() -> None:
    def work(link: Link) -> str:
        facts = {"seed": 1 if link.rank == 2 else 0, "plan": "p", "steps": link.rank % 2}
        with pytest.raises(ParallelError) as caught:
            require_same(link, facts)
        return str(caught.value)

    told = run_ranks(work, 3)
    assert len(set(told)) == 1
    assert "seed (ranks 0, 1: 0; rank 2: 1)" in told[0]
    assert "steps (ranks 0, 2: 0; rank 1: 1)" in told[0]
    assert "plan" not in told[0].split("; give")[0]


def test_what_goes_well_everywhere_gives_each_rank_its_result() -> None:
    assert run_ranks(lambda link: together(link, "work", lambda: link.rank), 3) == [0, 1, 2]


def test_memory_is_added_up_by_machine_and_refused_with_numbers() -> None:
    need = Footprint(experts=600, dense=100, cache=300)

    def work(link: Link, free: int, apart: bool) -> None:
        host = f"host{link.rank}" if apart else "host"
        require_memory(link, need, free=free, host=host)

    run_ranks(lambda link: work(link, 1000, True), 2)
    run_ranks(lambda link: work(link, 2000, False), 2)

    def refused(link: Link) -> str:
        with pytest.raises(BudgetError) as caught:
            work(link, 1999, False)
        return str(caught.value)

    told = run_ranks(refused, 2)
    assert "2 ranks need 1.95 KiB (2000 bytes), 1.95 KiB (1999 bytes) are free" in told[0]
    assert "600 B of experts" in told[0]
    assert told[0] == told[1]


def test_the_replicated_cache_is_counted_at_full_length() -> None:
    config = tiny_config()
    token = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    lengths = [3, 9, 5, 7]
    every = cache_bytes(config, lengths, max_new_tokens=10, batch_size=None)
    assert every == (sum(lengths) + 40) * token
    assert cache_bytes(config, lengths, max_new_tokens=10, batch_size=2) == (12 + 20) * token
    shared = cache_bytes(config, lengths, max_new_tokens=10, batch_size=None, share=2)
    assert shared == (9 + 7 + 20) * token
