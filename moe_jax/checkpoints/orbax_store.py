"""Trees of sharded arrays saved with orbax, and restored onto any mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from moe_jax.errors import CheckpointError

Tree = TypeVar("Tree")


def save(path: Path, tree: Any) -> None:
    """Write a tree of arrays to the new directory `path`, which appears only when it is complete."""
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(_flat(tree)))


def restore(path: Path, abstract: Tree) -> Tree:
    """Read a tree with the shapes, dtypes and shardings of `abstract`, whatever mesh saved it.

    Raises:
      CheckpointError: nothing there, or other arrays than `abstract` has.
    """
    with _explained(path), ocp.Checkpointer(_handler()) as checkpointer:
        return _like(abstract, checkpointer.restore(path.absolute(), args=_wanted(abstract)))


class Steps:
    """The newest few states of a training run, by step number, in one directory. A context manager."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=_handler())

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, tree: Any) -> None:
        """Begin to write; a state that a kill cuts short is never restored."""
        self._manager.save(step, args=ocp.args.PyTreeSave(_flat(tree)))

    def restore_newest(self, abstract: Tree) -> Tree | None:
        """The newest complete state, as `restore` gives it; `None` if there is none. If it is damaged, removing its
        directory makes the one before it the newest."""
        newest = self._manager.latest_step()
        if newest is None:
            return None
        with _explained(self._directory / str(newest)):
            return _like(abstract, self._manager.restore(newest, args=_wanted(abstract)))


def _handler() -> ocp.PyTreeCheckpointHandler:
    """One replica of an array writes it: to share that, orbax would cut each array by a program of its own."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _wanted(abstract: Any) -> ocp.args.PyTreeRestore:
    flat = _flat(abstract)
    return ocp.args.PyTreeRestore(flat, restore_args=ocp.checkpoint_utils.construct_restore_args(flat))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorStore raises nothing more precise for damaged files
        reason = str(error).partition("\n")[0][:500]
        raise CheckpointError(f"{path} is damaged, or does not hold what this model needs: {reason}") from error


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves by their path, so that what is stored does not depend on the classes of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _like(tree: Tree, flat: Mapping[str, Any]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in _flat(tree)])
