"""What installed packages and the user's environment add by name. Importing this loads no torch."""

from __future__ import annotations

import functools
import os
from importlib.metadata import EntryPoint, entry_points

from hal.errors import ConfigError


def named(group: str, variable: str, form: str) -> dict[str, EntryPoint]:
    """The entry points of a group and those of an environment variable, by name. The variable's come first.

    Args:
        variable: "name=module:attribute,...". form: of one of its items, for an error's text.

    Raises:
        ConfigError: an item of the variable has another form.
    """
    found = dict(_installed(group))
    for item in filter(None, os.environ.get(variable, "").split(",")):
        name, _, value = item.partition("=")
        if not name or not all(value.partition(":")):
            raise ConfigError(f"{variable} is not usable", got=item, expected=form)
        found[name] = EntryPoint(name, value, group)
    return found


@functools.cache  # it reads the metadata of every installed package
def _installed(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
