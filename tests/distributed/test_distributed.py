"""Several processes on one machine, two virtual devices each: their tokens are those of one process, and all end when
one dies."""

from __future__ import annotations

import json
import os
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
from moe_jax.engine.distributed import Driver, SingleProcess, Worker, decode, encode
from moe_jax.engine.distributed.messages import Shutdown
from moe_jax.errors import ProcessGroupError
from moe_jax.llm.batch_files import generate_file
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import as_placement

MEMBER = str(Path(member.__file__))
COMMAND = "from moe_jax.cli import main; main()"
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
PATIENCE = 240
"""Seconds that a busy machine may take to start and compile."""


class Process:
    """A running process, with its output so far."""

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
        """Wait at most `seconds` for the end of the process; return its exit status."""
        status = self._process.wait(seconds)
        for reader in self._readers:
            reader.join()
        return status

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until the condition holds; fail if the process ends before."""
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
    """Start processes; kill the remaining ones after the test."""
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
    address = coordinator()
    return [[MEMBER, address, str(processes), str(process), mesh, how_often] for process in range(processes)]


def generate_commands(*arguments_each: list[str]) -> list[list[str]]:
    """Return the command `moe-jax generate` of each process, with the arguments given for it."""
    joined = ["--coordinator", coordinator(), "--num-processes", str(len(arguments_each)), "--process-id"]
    return [
        ["-c", COMMAND, "--cpu-devices", "2", "generate", *arguments, "--dtype", "float32", *joined, str(process)]
        for process, arguments in enumerate(arguments_each)
    ]


def test_four_processes_generate_the_tokens_of_one(start: Start) -> None:
    mesh = "expert=4,tensor=2"
    first, *others = start(members(4, mesh, "once"))
    assert [process.status(PATIENCE) for process in (first, *others)] == [0] * 4, first.err
    assert not any("[[" in process.out for process in others)
    (got,) = (json.loads(line) for line in first.out.splitlines() if line.startswith("[["))
    outputs = LLM(mesh=mesh, **member.OPTIONS).generate(member.PROMPTS, member.PARAMS)
    for (tokens, *logprobs), (same, *close) in zip(got, json.loads(member.readable(outputs)), strict=True):
        assert tokens == same
        for found, expected in zip(logprobs, close, strict=True):
            np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("moment", "victim", "size"),
    [("joined", 1, 2), ("[[", 1, 3), ("[[", 0, 2)],
    ids=["worker_while_loading", "worker_while_running", "driver_while_running"],
)
def test_all_processes_end_when_one_dies(start: Start, moment: str, victim: int, size: int) -> None:
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
        assert line.startswith(f"moe-jax: process {victim} has died, so all processes end: start them again")


def test_a_batch_file_resumes_after_a_death(start: Start, tmp_path: Path) -> None:
    """Two processes that load an orbax checkpoint write the results of one process that was never interrupted.

    The last line fails.
    """
    source, output, uninterrupted = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "uninterrupted.jsonl"))
    checkpoint, model = Checkpoint(ADDER), tmp_path / "model"
    one_device = ShardedDecoder(checkpoint.config, as_placement("data=1"), "float32")
    checkpoint.save_orbax(model, checkpoint.load(one_device))
    lines = [{"prompt": f"{n}+{n}=", "seed": n, "temperature": 2, "ignore_eos": True} for n in range(32)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    sizes = ["--mesh", "data=2,expert=2", "--max-batch-size", "4", "--max-tokens", "16"]
    arguments = ["--model", str(model), "--input", str(source), "--output", str(output), *sizes]
    journal = output.with_name("out.jsonl.partial")

    first, second = start(generate_commands(arguments, arguments))
    first.wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4)
    second.kill()
    assert first.status(60) != 0
    assert "process 1 has died" in first.err
    assert 4 < journal.read_bytes().count(b"\n") <= len(lines)
    assert not output.exists()

    first, second = start(generate_commands(arguments, arguments))
    assert [first.status(PATIENCE), second.status(PATIENCE)] == [1, 0], first.err + second.err
    assert "1 of 33 lines failed" in first.err
    assert "Traceback" not in first.err
    assert first.out
    assert second.out == ""
    assert not journal.exists()
    llm = LLM(mesh="data=2,expert=2", dtype="float32", max_batch_size=4)
    generate_file(llm, source, uninterrupted, SamplingParams(temperature=0, max_tokens=16))
    tokens = [
        [json.loads(line)["samples"][0]["token_ids"] for line in path.read_text().splitlines()[:-1]]
        for path in (output, uninterrupted)
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
def test_a_mistake_ends_all_processes_with_status_1(
    start: Start, first: list[str], second: list[str], message: str
) -> None:
    for process in start(generate_commands(first, second)):
        assert process.status(PATIENCE) == 1, process.err
        assert process.out == ""
        assert message in process.err
        assert "Traceback" not in process.err


@pytest.fixture
def pair() -> Iterator[tuple[Driver, Worker]]:
    """A driver and a worker in this process."""
    near, far = Pipe()
    driver, worker = Driver({near: 1}), Worker(1, far)
    yield driver, worker
    driver._leave()


class Recording(SingleProcess):
    """A process group that records the driver's messages and replays them to a worker."""

    def __init__(self) -> None:
        self.encoded: list[bytes] = []

    def broadcast(self, message: Any) -> None:
        self.encoded.append(encode(message))

    def messages(self) -> Iterator[Any]:
        return map(decode, self.encoded)


def test_a_worker_that_runs_the_messages_has_the_same_token_buffer() -> None:
    recording = Recording()
    driver, worker = (LLM(mesh="expert=2", process_group=recording, **member.OPTIONS) for _ in range(2))
    driver.generate(member.PROMPTS, member.PARAMS)
    driver.explain(2)
    worker.run_worker()
    buffers = [np.asarray(llm.engine_loop.engine._executor._slots.token_buffer) for llm in (driver, worker)]
    assert buffers[0].any()
    np.testing.assert_array_equal(buffers[0], buffers[1])
    assert [llm._programs.compilations for llm in (driver, worker)] == [len(driver._programs._compiled)] * 2


def test_messages_reach_a_worker_until_the_driver_leaves(pair: tuple[Driver, Worker]) -> None:
    driver, worker = pair
    driver.broadcast("one")
    driver.broadcast([2])
    driver._leave()
    assert list(worker.messages()) == ["one", [2]]
    assert worker._leave() is None


def test_a_worker_that_leaves_early_gets_an_error(pair: tuple[Driver, Worker]) -> None:
    driver, worker = pair
    driver.broadcast("one")
    assert "process 1 left while process 0 was still running" in str(worker._leave())


def test_calls_that_belong_to_another_process_are_refused(pair: tuple[Driver, Worker]) -> None:
    driver, worker = pair
    with pytest.raises(ProcessGroupError, match="call run_worker in this process, and everything else in process 0"):
        worker.broadcast("one")
    for process_group in (driver, SingleProcess()):
        with pytest.raises(ProcessGroupError, match="call generate"):
            process_group.messages()


def test_an_interrupt_ends_a_process_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    near, far = Pipe()
    worker = Worker(1, far)
    near.send_bytes(encode(None))  # the driver leaves, which ends the worker's thread
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        worker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "moe-jax: interrupted\n"
    assert decode(near.recv_bytes()) == Shutdown("process 1 was interrupted")


def test_settings_must_agree(pair: tuple[Driver, Worker]) -> None:
    driver, worker = pair
    for dtype in ("float32", "float32"):
        driver.check_agreement({"the dtype": dtype})
    worker.check_agreement({"the dtype": "float32"})
    with pytest.raises(ProcessGroupError, match="process 1 was given the dtype bfloat16, process 0 float32: give all"):
        worker.check_agreement({"the dtype": "bfloat16"})
