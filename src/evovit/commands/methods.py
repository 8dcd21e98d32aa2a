"""`evovit methods`: what there is, and what one method is."""

from __future__ import annotations

from typing import Annotated

import tyro


def methods(name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = "", /) -> None:
    """List the token-reduction methods, or describe one with its options.

    $ evovit methods
    $ evovit methods evo_vit

    Args:
        name: of one method.
    """
    from evovit.methods import find_method, list_methods
    from evovit.report.tables import option_lines

    for each in [name] if name else list_methods():
        cls = find_method(each)
        what, *more = (cls.__doc__ or "").strip().splitlines()
        grid = "keeps the grid" if cls.keeps_grid else "drops tokens"
        needs = "; needs a class token" if cls.needs_class_token else ""
        print(f"{each:<12} {what}" if not name else f"{each}: {what}")
        if name:
            print("\n".join([*(line.strip() for line in more), f"({grid}{needs})", ""]).lstrip("\n"))
            print("\n".join(option_lines(cls.Config)))
    if not name:
        print("\nevovit methods NAME describes one; evovit options lists every option.")
