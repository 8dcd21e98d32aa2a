"""`evovit recipes`: the recipes that come with evovit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def recipes(
    action: Annotated[Literal["list", "show", "copy"], tyro.conf.Positional] = "list",
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = "",
    /,
    to: Path = Path(),
) -> None:
    """List the recipes that come with evovit; show one, or copy it to change the copy.

    $ evovit recipes
    $ evovit recipes show digits/dense
    $ evovit recipes copy evo_deit_small

    Args:
        action: list, show or copy.
        name: of the recipe.
        to: folder, or .toml file, that gets the copy.
    """
    from evovit.errors import EvoViTError, shown
    from evovit.recipe.reading import find_recipe, list_recipes
    from evovit.runtime.files import write_text

    if action == "list":
        if name:
            raise EvoViTError(
                f"evovit recipes list takes no name; evovit recipes show {shown(name)} shows one."
            )
        recipes = list_recipes()
        width = max(map(len, recipes))
        for each, what in recipes.items():
            print(f"{each:<{width}} {what}")
        return
    if not name:
        raise EvoViTError(f"evovit recipes {action} needs the name of a recipe; evovit recipes lists them.")
    source = find_recipe(name, own_only=True)
    if action == "show":
        print(source.read_text(encoding="utf-8"), end="")
        return
    path = to if to.suffix == ".toml" else to / source.name
    if path.exists():
        raise EvoViTError(f"{str(path)!r} exists already and is not overwritten; give another --to.")
    write_text(path, source.read_text(encoding="utf-8"))
    print(f"{path} written; train it with: evovit train {path}")
