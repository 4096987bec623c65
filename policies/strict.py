"""Views that show what the contract shows, and nothing else: for tests of policies.

A policy that reads the simulator's or vLLM's private state works in one place only; behind a
strict view it fails at once, with the name of what it touched.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar, cast

from policies.api import BlockView, ClusterView, EngineView, InstanceView, PolicyError, RequestView

__all__ = ["VIEWS", "strict", "unwrapped"]

T = TypeVar("T")

VIEWS: dict[type, tuple[str, ...]] = {
    view: tuple(name for name in vars(view) if not name.startswith("_"))
    for view in (RequestView, BlockView, EngineView, InstanceView, ClusterView)
}
"""Every kind of view and its members."""


def strict(view: T, kind: type | None = None, *, policy: str = "policy") -> T:
    """The view behind a guard: reading anything else or setting anything is a ``PolicyError``.

    Args:
        view: what a backend would show.
        kind: ``BlockView``, ``EngineView``...; found by the members of ``view`` if not given.
        policy: who is blamed in the message.

    Raises:
        TypeError: ``view`` is no view, or of more than one kind and ``kind`` is not given.
    """
    if isinstance(view, _Guard):
        return view
    if kind is None:
        kinds = [k for k, names in VIEWS.items() if all(hasattr(view, name) for name in names)]
        if len(kinds) != 1:
            found = " and ".join(k.__name__ for k in kinds) or "no view"
            raise TypeError(f"{view!r} is {found}; say which kind of view it is")
        kind = kinds[0]
    return cast(T, _Guard(view, kind, policy))


def unwrapped(view: Any) -> Any:
    """What is behind a strict view; anything else as it is."""
    return object.__getattribute__(view, "_view") if isinstance(view, _Guard) else view


class _Guard:
    __slots__ = ("_cache", "_kind", "_policy", "_view")

    def __init__(self, view: object, kind: type, policy: str) -> None:
        put = object.__setattr__
        put(self, "_view", view)
        put(self, "_kind", kind)
        put(self, "_policy", policy)
        put(self, "_cache", {})

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        kind = get(self, "_kind")
        if name not in VIEWS[kind]:
            if name == "__class__":
                return _Guard
            near = get_close_matches(name, VIEWS[kind], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(VIEWS[kind])}"
            raise PolicyError(
                f"{get(self, '_policy')} read {kind.__name__}.{name}, which is not in the view; "
                f"{hint}"
            )
        value = getattr(get(self, "_view"), name)
        if callable(value):
            return lambda *args, **options: value(
                *map(unwrapped, args), **{key: unwrapped(v) for key, v in options.items()}
            )
        if kind is ClusterView and name == "instances":
            # The same guards every time, as policies may keep what they have seen.
            known = get(self, "_cache")
            policy = get(self, "_policy")
            for instance in value:
                if id(instance) not in known:
                    known[id(instance)] = strict(instance, InstanceView, policy=policy)
            return [known[id(instance)] for instance in value]
        return tuple(value) if isinstance(value, list) else value

    def __setattr__(self, name: str, value: object) -> None:
        _refuse(self, "set", name)

    def __delattr__(self, name: str) -> None:
        _refuse(self, "deleted", name)

    def __repr__(self) -> str:
        return f"strict({object.__getattribute__(self, '_view')!r})"


def _refuse(guard: _Guard, verb: str, name: str) -> None:
    get = object.__getattribute__
    raise PolicyError(
        f"{get(guard, '_policy')} {verb} {get(guard, '_kind').__name__}.{name}; views are read-only"
    )
