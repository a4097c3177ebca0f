"""What is known by name: the modules of a package of foveate, and the plug-ins of other distributions.

A module that stands in the package is found because it stands there, and a plug-in through its entry point.
"""

from __future__ import annotations

import threading
from importlib import import_module, metadata
from typing import Generic, TypeVar

T = TypeVar("T")


class PluginError(ValueError):
    """What was asked for is a plug-in that could not be loaded; the message says why."""


class Registry(Generic[T]):
    """Things by name, loaded when they are first asked for.

    what: one of the things, in words. package: whose modules register them. Its name is the entry points' group, too.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._known: dict[str, T] = {}
        self._left_out: dict[str, str] = {}  # entry point -> why
        self._asked_plugins = False
        self._lock = threading.RLock()

    def add(self, name: str, thing: T) -> None:
        """Make a thing known; ValueError where its name is taken."""
        if not self._ours(thing):
            self.built_in()  # they come first, so that the name is taken from the plug-in and not from them
        if self._known.setdefault(name, thing) is not thing:
            owner = self._known[name].__module__
            raise ValueError(f"a {self.what} named {name!r} is registered already, by {owner}: choose another name")

    def built_in(self) -> dict[str, T]:
        """What the package itself brings."""
        import pkgutil

        for module in pkgutil.iter_modules(import_module(self.package).__path__):
            import_module(f"{self.package}.{module.name}")
        return {name: thing for name, thing in self._known.items() if self._ours(thing)}

    def known(self) -> dict[str, T]:
        """Everything; a plug-in that cannot be loaded is left out, and said so once."""
        with self._lock:
            if not self._asked_plugins:
                self.built_in()
                self._asked_plugins = True  # before they load: a plug-in may ask what there is
                for entry in metadata.entry_points(group=self.package):
                    self._load(entry)
        return self._known

    def get(self, name: str) -> T | None:
        """The thing of that name, or None; PluginError where it is the entry point of a plug-in that was left out."""
        thing = self.known().get(name)
        if thing is None and name in self._left_out:
            raise PluginError(f"{self._left_out[name]}. Repair or uninstall it")
        return thing

    def _ours(self, thing: T) -> bool:
        return thing.__module__.startswith(f"{self.package}.")

    def _load(self, entry: metadata.EntryPoint) -> None:
        before = dict(self._known)
        try:
            entry.load()
            roots = {thing.__module__.partition(".")[0] for thing in self._known.values()}
            if self._known == before and entry.value.partition(":")[0].partition(".")[0] not in roots:
                raise ValueError(f"{entry.value} registers no {self.what}")
        except (Exception, SystemExit) as error:  # whatever a stranger's module does, the rest goes on
            import logging

            # Half a plug-in is worse than none.
            self._known.clear()
            self._known.update(before)
            owner = getattr(entry.dist, "name", None) or "an unknown distribution"
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            self._left_out[entry.name] = f"the plug-in {entry.name} of {owner} could not be loaded: {cause}"
            # Logged, not warned: it reaches stderr as one line, and where upstream's warnings are silenced, too.
            logging.getLogger("foveate").warning("foveate: %s; it is left out", self._left_out[entry.name])
