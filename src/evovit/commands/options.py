"""`evovit options`: every option of recipes and methods, with default, range and meaning."""

from __future__ import annotations

from typing import Annotated

import tyro


def options(name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = "", /) -> None:
    """List every option: of all tables of a recipe, of one table, or of one method.

    A value is written as in TOML: evovit train RECIPE --set method.keep_ratio=0.7, and for a method
    --method evit:keep_ratio=0.5,blocks=[2,4].

    $ evovit options
    $ evovit options run
    $ evovit options tome

    Args:
        name: of a table of the recipe, or of a method.
    """
    from evovit.errors import EvoViTError, nearest
    from evovit.methods import find_method, list_methods
    from evovit.recipe.tables import TABLES
    from evovit.report.tables import option_lines

    kinds = {f"[{table}]": kind for table, kind in TABLES.items()}
    kinds |= {f"[method] name = {each}": find_method(each).Config for each in list_methods()}
    names = [*TABLES, *list_methods()]
    if name and name not in names:
        raise EvoViTError(
            f"{name!r} is neither a table of a recipe ({', '.join(TABLES)}) nor a method "
            f"({', '.join(list_methods())}).{nearest(name, names)}"
        )
    for (title, kind), own in zip(kinds.items(), names, strict=True):
        if not name or name == own:
            print("\n".join([f"{title}  {(kind.__doc__ or '').splitlines()[0]}", *option_lines(kind), ""]))
