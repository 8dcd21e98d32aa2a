"""`evovit methods`: what there is, and what one method is."""

from __future__ import annotations

from typing import Annotated

import tyro


def methods(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = "", /, host: str = ""
) -> None:
    """List the token-reduction methods, or describe one with its options.

    $ evovit methods
    $ evovit methods evo_vit
    $ evovit methods --host hf:google/vit-base-patch16-224

    Args:
        name: of one method.
        host: a model; for each method, say whether it runs on this model by default, or why not.
    """
    from evovit.methods import find_method, list_methods
    from evovit.report.tables import option_lines

    on_host = _refusals(host) if host else {}
    for each in [name] if name else list_methods():
        cls = find_method(each)
        what, *more = (cls.__doc__ or "").strip().splitlines()
        grid = "keeps the grid" if cls.keeps_grid else "drops tokens"
        needs = "; needs a class token" if cls.needs_class_token else ""
        if host:
            print(f"{each:<12} {on_host[each] or 'runs'}")
            continue
        print(f"{each:<12} {what}" if not name else f"{each}: {what}")
        if name:
            print("\n".join([*(line.strip() for line in more), f"({grid}{needs})", ""]).lstrip("\n"))
            print("\n".join(option_lines(cls.Config)))
    if not name:
        print("\nevovit methods NAME describes one; evovit options lists every option.")


def _refusals(host: str) -> dict[str, str]:
    """Return why each method does not run on a host as it is by default, empty where it does."""
    import torch

    from evovit.backbones import read_host
    from evovit.errors import EvoViTError
    from evovit.hosts import create_host
    from evovit.methods import build_config, find_method, list_methods

    with torch.device("meta"):
        backbone = read_host(create_host(host, what="--host"))
    backbone.check_structure()
    found = {}
    for name in list_methods():
        cls, found[name] = find_method(name), ""
        try:
            cls(build_config(cls, {}), backbone.spec)
        except EvoViTError as error:
            found[name] = str(error)
    return found
