"""Save trees of sharded arrays with orbax and restore them onto any mesh."""

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
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(_flatten(tree)))


def restore(path: Path, abstract: Tree) -> Tree:
    """Read a tree with the shapes, dtypes and shardings of `abstract`. The mesh that saved it may be another.

    Raises:
      CheckpointError: the directory is missing or damaged, or holds other arrays than `abstract`.
    """
    with _explain_errors(path), ocp.Checkpointer(_handler()) as checkpointer:
        return _unflatten(abstract, checkpointer.restore(path.absolute(), args=_restore_args(abstract)))


class TrainingCheckpoints:
    """The newest states of a training run, by step number, in one directory. A context manager.

    Args:
      keep: the number of states to keep.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=_handler())

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, tree: Any) -> None:
        """Start to write the state of a step. A state that is not written to its end is never restored."""
        self._manager.save(step, args=ocp.args.PyTreeSave(_flatten(tree)))

    def restore_newest(self, abstract: Tree) -> Tree | None:
        """Restore the newest complete state; return `None` if there is none.

        If that state is damaged, remove its directory to restore the state before it.

        Raises:
          CheckpointError: the newest state is damaged, or holds other arrays than `abstract`.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return None
        with _explain_errors(self._directory / str(newest)):
            return _unflatten(abstract, self._manager.restore(newest, args=_restore_args(abstract)))


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Return a handler that has one replica write each array.

    To share the writing among replicas, orbax would compile a program to slice each array.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    flat = _flatten(abstract)
    return ocp.args.PyTreeRestore(flat, restore_args=ocp.checkpoint_utils.construct_restore_args(flat))


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorStore raises nothing more precise for damaged files
        reason = str(error).partition("\n")[0][:500]
        raise CheckpointError(f"{path} is damaged, or does not hold what this model needs: {reason}") from error


def _flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths: the stored form does not depend on the classes of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(tree: Tree, flat: Mapping[str, Any]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in _flatten(tree)])
