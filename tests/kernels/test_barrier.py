"""The kernel by which ranks wait for each other: two ranks on one GPU, and its machine code."""

import multiprocessing
import re
from datetime import timedelta

import pytest
import torch

from cute_quant.distributed.barrier import Barrier
from cute_quant.kernels.config import BarrierSpec
from cute_quant.lab.machine_code import machine_code

RANKS = 2


def barriers(ranks: int, timeout: timedelta = timedelta(seconds=20)) -> list[Barrier]:
    counters = [torch.zeros(ranks + 1, dtype=torch.int32, device="cuda") for _ in range(ranks)]
    # Numbers that wrap around while the ranks wait.
    for own in counters:
        own += 2**31 - 4
    torch.cuda.synchronize()
    return [Barrier(counters, rank, timeout) for rank in range(ranks)]


@pytest.mark.gpu
@pytest.mark.parametrize("slow", range(RANKS))
def test_the_fast_rank_sees_what_the_slow_one_wrote(slow):
    waits, streams = barriers(RANKS), [torch.cuda.Stream() for _ in range(RANKS)]
    written = torch.zeros(1 << 20, device="cuda")
    seen = [torch.empty_like(written) for _ in range(6)]
    torch.cuda.synchronize()
    for number, copy in enumerate(seen):
        with torch.cuda.stream(streams[slow]):
            torch.cuda._sleep(20_000_000)
            written.fill_(number + 1)
            waits[slow]()
            # The other one has read it.
            waits[slow]()
        with torch.cuda.stream(streams[1 - slow]):
            waits[1 - slow]()
            copy.copy_(written)
            waits[1 - slow]()
    torch.cuda.synchronize()
    for number, copy in enumerate(seen):
        assert copy.eq(number + 1).all()


@pytest.mark.gpu
def test_many_ranks():
    """More than a warp has lanes. All others have been there before, but for one."""
    ranks, rank, late = 40, 3, 35
    counters = torch.zeros(ranks, ranks + 1, dtype=torch.int32, device="cuda")
    counters[rank, :ranks] = 1
    counters[rank, late] = 0
    wait = Barrier(list(counters), rank, timedelta(seconds=20))
    waiting, other, done = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(waiting):
        wait()
        done.record()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        other.synchronize()
        assert not done.query()
        counters[rank, late] = 1
    torch.cuda.synchronize()
    expected = torch.zeros_like(counters)
    expected[:, rank] = 1
    expected[rank] = 1
    assert torch.equal(counters, expected)


def wait_alone(connection) -> None:
    barriers(RANKS, timedelta(milliseconds=50))[0]()
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        connection.send(str(error))
    else:
        connection.send("no error")


@pytest.mark.gpu
def test_a_rank_that_does_not_come():
    """The others trap, which ends the context, so it is one of another process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=wait_alone, args=(theirs,))
    process.start()
    assert ours.poll(120)
    assert re.search("launch failure|trap", ours.recv())
    process.join()


def test_machine_code(arch):
    """A fence of all stores before a signal; loads of counters and their stores pass no cache."""
    code = machine_code(BarrierSpec(), arch)
    lines = [line for line in code.text.splitlines() if ";" in line]
    fence = next(i for i, line in enumerate(lines) if "MEMBAR" in line and ".SYS" in line)
    signal = next(i for i, line in enumerate(lines) if "STG.E.STRONG.SYS" in line)
    loads = [i for i, line in enumerate(lines) if "LDG.E.STRONG.SYS" in line]
    assert fence < signal < loads[0]
    assert all("CCTL.IVALL" in lines[i + 1] for i in loads)
    assert code.stack == 0
    # Dependents start when all ranks are there, and do not hold the SMs until then.
    dependents = next(i for i, line in enumerate(lines) if "PREEXIT" in line)
    assert dependents > loads[-1]
