"""Several processes on one machine, two virtual devices each, against one process; and what they do when one dies."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import member
import numpy as np
import pytest

from moe_jax import LLM, SamplingParams
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.engine.distributed import Driver, SingleProcess, Worker
from moe_jax.errors import ProcessGroupError
from moe_jax.llm.batch_files import generate_file
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import as_placement

MEMBER = str(Path(member.__file__))
COMMAND = "from moe_jax.cli import main; main()"
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
PATIENCE = 240
"""Seconds for a busy machine to start and compile."""


class Process:
    """One that runs, with what it has printed so far."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | QUICKLY_COMPILED,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out, self.err = "", ""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_out, self._read_err)]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        for line in self._process.stdout or ():
            self.out += line

    def _read_err(self) -> None:
        for line in self._process.stderr or ():
            self.err += line

    def kill(self) -> None:
        self._process.kill()

    def status(self, seconds: float) -> int:
        """How it ended, within so many seconds."""
        status = self._process.wait(seconds)
        for reader in self._readers:
            reader.join()
        return status

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Something that it does."""
        until = time.monotonic() + PATIENCE
        while not happened():
            assert self._process.poll() is None, self.err
            assert time.monotonic() < until
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.out)


Start = Callable[[list[list[str]]], list[Process]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes; those that are left are killed."""
    started: list[Process] = []

    def start(commands: list[list[str]]) -> list[Process]:
        new = [Process(command) for command in commands]
        started.extend(new)
        return new

    yield start
    for process in started:
        process.kill()


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def members(processes: int, mesh: str, how_often: str) -> list[list[str]]:
    where = coordinator()
    return [[MEMBER, where, str(processes), str(process), mesh, how_often] for process in range(processes)]


def generating(*own: list[str]) -> list[list[str]]:
    """`moe-jax generate`, each process with arguments of its own."""
    joined = ["--coordinator", coordinator(), "--num-processes", str(len(own)), "--process-id"]
    return [
        ["-c", COMMAND, "--cpu-devices", "2", "generate", *arguments, "--dtype", "float32", *joined, str(process)]
        for process, arguments in enumerate(own)
    ]


def test_four_processes_give_the_tokens_of_one(start: Start) -> None:
    mesh = "expert=4,tensor=2"
    first, *others = start(members(4, mesh, "once"))
    assert [process.status(PATIENCE) for process in (first, *others)] == [0] * 4, first.err
    assert not any("[[" in process.out for process in others)
    (got,) = (json.loads(line) for line in first.out.splitlines() if line.startswith("[["))
    outputs = LLM(mesh=mesh, **member.OPTIONS).generate(member.PROMPTS, member.PARAMS)
    for (tokens, *logprobs), (same, *close) in zip(got, json.loads(member.readable(outputs)), strict=True):
        assert tokens == same
        for here, there in zip(logprobs, close, strict=True):
            np.testing.assert_allclose(np.array(here, float), np.array(there, float), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("moment", "victim", "size"),
    [("joined", 1, 2), ("[[", 1, 3), ("[[", 0, 2)],
    ids=["loading", "in_mid_run", "leader_in_mid_run"],
)
def test_all_end_where_one_dies(start: Start, moment: str, victim: int, size: int) -> None:
    processes = start(members(size, f"data={size},expert=2", "forever"))
    processes[0].wait_for(moment)
    processes[victim].wait_for("joined")
    processes[victim].kill()
    began = time.monotonic()
    for process in processes:
        assert process.status(60) != 0
    assert time.monotonic() - began < 60
    for survivor in (process for process in processes if process is not processes[victim]):
        (line,) = [line for line in survivor.err.splitlines() if line.startswith("moe-jax:")]
        assert line.startswith(f"moe-jax: process {victim} has died, so all end: start them again")


def test_a_file_is_gone_on_with_after_a_death(start: Start, tmp_path: Path) -> None:
    """With weights that orbax restores on several processes; the results are those of a single process that nobody
    disturbed."""
    source, output, undisturbed = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "undisturbed.jsonl"))
    checkpoint, model = Checkpoint(ADDER), tmp_path / "model"
    one_device = ShardedDecoder(checkpoint.config, as_placement("data=1"), "float32")
    checkpoint.save_orbax(model, checkpoint.load(one_device))
    lines = [{"prompt": f"{n}+{n}=", "seed": n, "temperature": 2, "ignore_eos": True} for n in range(32)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ["--mesh", "data=2,expert=2", "--max-batch-size", "4", "--max-tokens", "16"]
    asked = ["--model", str(model), "--input", str(source), "--output", str(output), *sizes]
    journal = output.with_name("out.jsonl.partial")

    first, second = start(generating(asked, asked))
    first.wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4)
    second.kill()
    assert first.status(60) != 0
    assert "process 1 has died" in first.err
    assert 4 < journal.read_bytes().count(b"\n") <= len(lines)
    assert not output.exists()

    first, second = start(generating(asked, asked))
    assert [first.status(PATIENCE), second.status(PATIENCE)] == [0, 0], first.err + second.err
    assert first.out
    assert second.out == ""
    assert not journal.exists()
    llm = LLM(mesh="data=2,expert=2", dtype="float32", max_batch_size=4)
    generate_file(llm, source, undisturbed, SamplingParams(temperature=0, max_tokens=16))
    tokens = [
        [json.loads(line)["samples"][0]["token_ids"] for line in path.read_text().splitlines()]
        for path in (output, undisturbed)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["1" * 65], ["1" * 65], "prompt 0 has 65 tokens, a sequence can have 64"),
        (
            ["1+1="],
            ["1+1=", "--combine", "reduce"],
            "process 1 was given the route reduce, auto, exact, process 0 auto",
        ),
        (
            ["1+1=", "--mesh", "expert=2"],
            ["1+1="],
            "mesh data=1,expert=2,tensor=1 leaves processes without devices (1)",
        ),
    ],
    ids=["bad_prompt", "other_options", "mesh_too_small"],
)
def test_a_mistake_ends_all_with_status_2(start: Start, first: list[str], second: list[str], message: str) -> None:
    for process in start(generating(first, second)):
        assert process.status(PATIENCE) == 2, process.err
        assert process.out == ""
        assert message in process.err
        assert "Traceback" not in process.err


@pytest.fixture
def pair() -> Iterator[tuple[Driver, Worker]]:
    """Both ends in this process, which neither may end."""
    here, there = Pipe()
    leader, follower = Driver({here: 1}), Worker(1, there)
    yield leader, follower
    leader._leave()


class Script(SingleProcess):
    """Writes down what is told, and has another follow it."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    def broadcast(self, order: Any) -> None:
        self.told.append(pickle.dumps(order))

    def orders(self) -> Iterator[Any]:
        return map(pickle.loads, self.told)


def test_who_follows_the_orders_ends_with_the_same_sequences() -> None:
    script = Script()
    leader, follower = (LLM(mesh="expert=2", process_group=script, **member.OPTIONS) for _ in range(2))
    leader.generate(member.PROMPTS, member.PARAMS)
    leader.explain(2)
    follower.run_worker()
    tapes = [np.asarray(llm.engine._executor._slots.token_buffer) for llm in (leader, follower)]
    assert tapes[0].any()
    np.testing.assert_array_equal(tapes[0], tapes[1])
    assert [llm._programs.compilations for llm in (leader, follower)] == [len(leader._programs._compiled)] * 2


def test_orders_reach_followers_until_the_leader_is_done(pair: tuple[Driver, Worker]) -> None:
    leader, follower = pair
    leader.broadcast("one")
    leader.broadcast([2])
    leader._leave()
    assert list(follower.orders()) == ["one", [2]]
    assert follower._leave() is None


def test_who_leaves_early_is_told(pair: tuple[Driver, Worker]) -> None:
    leader, follower = pair
    leader.broadcast("one")
    assert "process 1 left while process 0 went on" in str(follower._leave())


def test_who_does_what(pair: tuple[Driver, Worker]) -> None:
    leader, follower = pair
    with pytest.raises(ProcessGroupError, match="call follow here, and all else there"):
        follower.broadcast("one")
    for process_group in (leader, SingleProcess()):
        with pytest.raises(ProcessGroupError, match="call generate"):
            process_group.orders()


def test_all_must_have_been_given_the_same(pair: tuple[Driver, Worker]) -> None:
    leader, follower = pair
    for dtype in ("float32", "float32"):
        leader.check_agreement({"the dtype": dtype})
    follower.check_agreement({"the dtype": "float32"})
    with pytest.raises(ProcessGroupError, match="process 1 was given the dtype bfloat16, process 0 float32"):
        follower.check_agreement({"the dtype": "bfloat16"})
