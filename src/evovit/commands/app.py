"""`evovit app`: a web page on this machine to play with: your photograph, dense and reduced, with sliders."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro


def app(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "",
    /,
    pretrained: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Serve a web page: drop a photograph, choose model, method and keep ratio, see kept patches and time.

    Nothing is uploaded anywhere: the page is served to this machine only and loads nothing from elsewhere.

    $ evovit app
    $ evovit app deit_small_patch16_224 --pretrained
    $ evovit app runs/quickstart/evo_vit --port 8000

    Args:
        model: shown at the start: a timm name, hf: and a name of transformers, the folder of a run of evovit
            train, or one written by save_reduced. Default: the run of evovit quickstart, if there is one,
            else a timm model with random weights.
        pretrained: for a timm name: download the published weights.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: default: the first free one from 7860.
        open_browser: open the page in a browser.
        device: where to compute; auto uses CUDA if available.
    """
    import signal
    from contextlib import suppress
    from pathlib import Path
    from threading import Event

    from evovit.app.known import look_around
    from evovit.app.serve import expect_gradio, is_loopback, served
    from evovit.app.workbench import Workbench
    from evovit.errors import check_count
    from evovit.runtime.world import join_world

    expect_gradio()
    if port is not None:
        check_count("port", port, 1, 65535)
    known = look_around(Path(), model)
    alone = is_loopback(host)
    with join_world(device) as world:
        workbench = Workbench(
            world.device, None if alone else [*known.models, *known.exports, *known.searches]
        )
        workbench.open(known.models[0], pretrained)  # a wrong one is refused before gradio is imported
        if not alone:
            print(
                "evovit: every machine that reaches this address can use the page: there is no password, and "
                "it computes for all of them. It opens only the models and folders in its lists."
            )
        with served(workbench, known, host, port, pretrained, open_browser) as address:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed then, too
            print(f"{address} shows it; Ctrl+C ends it", flush=True)
            with suppress(KeyboardInterrupt):
                Event().wait()
