"""Ranks watched by each other: weights that must be bit-equal and are not, and machines that are slower than the rest.

Llama 3 lost 6 of its 419 unexpected interruptions to silent corruption and found single slow GPUs that held back
16,384 (arXiv 2407.21783, section 3.3.4, table 5).
"""

import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

ROW = 4096  # bytes; sums of rows and of columns find every change but those that cancel in both
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed word: an odd number with mixed bits


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A hash of the bits of a tensor, or of the local shard of a DTensor: int64, no dimensions, on its device.

    Rows and columns of 64-bit words are added up (modulo 2^64, so in any order), and the sums are weighed by their
    places: a change goes unseen about once in 2^64. No copy of the weights is made. Not for adversaries.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    bytes_N = local.detach().contiguous().view(-1).view(torch.uint8)
    if bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    whole = len(bytes_N) // ROW * ROW
    rest_W = torch.nn.functional.pad(bytes_N[whole:], (0, whole + ROW - len(bytes_N))).view(torch.int64)
    words_RW = bytes_N[:whole].view(torch.int64).view(whole // ROW, ROW // 8)
    sums = torch.cat([words_RW.sum(1), rest_W.sum()[None], words_RW.sum(0) + rest_W])
    halves = sums.view(torch.int32).long()  # else two flips of a word's top bit would cancel, whatever their weights
    odd = torch.arange(len(halves), device=halves.device) * 2 + 1
    return (halves * (odd * odd * odd * GOLDEN)).sum()


@dataclass(frozen=True)
class Difference:
    """A parameter that replicas do not agree on."""

    name: str
    ranks: tuple[int, ...]
    """Those that differ from the majority; without a majority all that disagree."""
    has_majority: bool

    def __str__(self) -> str:
        ranks = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        if self.has_majority:
            return f"{self.name} on {ranks} differs from the other replicas"
        return f"{self.name} differs between {ranks}, and no majority tells which is right"


def differences(names: list[str], prints_RP: list[list[int]], ranks: list[int]) -> list[Difference]:
    """Compare the prints of R replicas, which live on `ranks`, of P parameters."""
    found = []
    for name, column in zip(names, zip(*prints_RP, strict=True), strict=True):
        value, votes = Counter(column).most_common(1)[0]
        if votes == len(ranks):
            continue
        has_majority = 2 * votes > len(ranks)
        odd = [rank for rank, seen in zip(ranks, column, strict=True) if seen != value or not has_majority]
        found.append(Difference(name, tuple(odd), has_majority))
    return found


def compare(tensors: Iterable[tuple[str, Tensor]], mesh: DeviceMesh, axis: str = "dp") -> list[Difference] | None:
    """Where the replicas along `axis` disagree on named weights or gradients; the same answer on every rank.

    None where there are no replicas (one rank on the axis): nothing can be said. Every rank of the world must call
    this together. Costs one pass over the local shards and 8 bytes a parameter and replica on the wire.
    """
    group = mesh.get_group(axis)
    if group.size() == 1:
        return None
    names, values = zip(*((name, fingerprint(tensor)) for name, tensor in tensors), strict=True)
    mine_P = torch.stack(values)
    prints_RP = [torch.empty_like(mine_P) for _ in range(group.size())]
    dist.all_gather(prints_RP, mine_P, group=group)
    found = differences(list(names), [prints_P.tolist() for prints_P in prints_RP], dist.get_process_group_ranks(group))
    count = torch.tensor(len(found), device=mine_P.device)
    dist.all_reduce(count)
    if not count.item():
        return []
    everyone: list[list[Difference]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return list(dict.fromkeys(difference for theirs in everyone for difference in theirs))


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    factor: float
    """Its time over that of the median rank, in the last window."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} takes {self.factor:.1f} times as long as the median rank"


class Pace:
    """Finds ranks that are slow by themselves, not because they wait for others. Needs a process group.

    Two measures: `with pace.own():` around what a rank does without collectives, such as reading data, added up; and
    `probe`, a fixed piece of work, whose fastest time in a window tells a slow device under every layout.
    """

    def __init__(self, device: torch.device, *, every: int = 50, factor: float = 1.5, windows: int = 3):
        """A rank is named when it is slower than `factor` medians in `windows` windows of `every` steps in a row."""
        self.device, self.every, self.factor, self.windows = device, every, factor, windows
        self.steps = 0
        self.slow: Counter[int] = Counter()  # windows in a row, by rank
        self._open()

    def _open(self) -> None:
        self.seconds, self.fastest, self.began = 0.0, float("inf"), time.perf_counter()

    @contextmanager
    def own(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def probe(self) -> None:
        """Time a matmul: a few milliseconds on a CPU core or a GPU."""
        size = 4096 if self.device.type == "cuda" else 512
        square = torch.ones(size, size, device=self.device)
        _wait(self.device)
        began = time.perf_counter()
        square @ square
        _wait(self.device)
        self.fastest = min(self.fastest, time.perf_counter() - began)

    def step(self) -> list[Straggler]:
        """End a step; at the end of a window, the ranks that are to be named. The same answer on every rank."""
        self.steps += 1
        if self.steps % self.every:
            return []
        wall = time.perf_counter() - self.began
        mine = torch.tensor([self.seconds, self.fastest, wall], dtype=torch.float64, device=self.device)
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        factors = slowness([tuple(one.tolist()) for one in theirs], self.factor)
        for rank, factor in enumerate(factors):
            self.slow[rank] = self.slow[rank] + 1 if factor > self.factor else 0
        named = [rank for rank, windows in self.slow.items() if windows == self.windows]
        hosts = [""] * len(factors)
        if named:
            dist.all_gather_object(hosts, socket.gethostname())
        self._open()
        return [Straggler(rank, hosts[rank], factors[rank]) for rank in named]


def slowness(measured: list[tuple[float, float, float]], limit: float) -> list[float]:
    """How many times the median rank's time each rank takes, from (own seconds, fastest probe, wall) of all ranks.

    Own seconds count only where those beyond the limit are 2% of the window: nobody is held back by microseconds.
    """
    own, probe, wall = (median_low(column) for column in zip(*measured, strict=True))
    return [
        max(
            mine / own if own and mine - limit * own > 0.02 * wall else 1.0,
            fastest / probe if probe < float("inf") else 1.0,
        )
        for mine, fastest, _ in measured
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
