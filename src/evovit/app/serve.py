"""The page's server: on this machine alone by default, without telemetry, shares or fonts from elsewhere."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any

from evovit.app.known import Known
from evovit.app.workbench import Workbench
from evovit.errors import EvoViTError, shown
from evovit.report.page import style

LARGEST_FILE = "100mb"
VISITORS = 50  # whose photographs stay in memory
FONTS = ["system-ui", "sans-serif"]
MONOSPACED = ["ui-monospace", "monospace"]


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def expect_gradio() -> None:
    """Raise `EvoViTError` where gradio is missing."""
    if find_spec("gradio") is None:
        raise EvoViTError("evovit app needs gradio, which is not installed; use: pip install 'evovit[app]'.")


@contextmanager
def served(
    workbench: Workbench, known: Known, host: str, port: int | None, published: bool, browse: bool
) -> Iterator[str]:
    """Serve the page in a thread of its own and give its address; stop at the end.

    What visitors upload lies in a folder that goes at the end.

    Args:
        host: name or number of the address to listen on.
        port: default: the first free one from 7860.
        browse: open it in a browser.
    """
    expect_gradio()
    with tempfile.TemporaryDirectory(prefix="evovit_app_") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # read on import
        import gradio as gr

        from evovit.app.page import Page

        blocks = Page(workbench, known, published).build()
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONOSPACED, radius_size="sm"
        )
        own = files("evovit.app").joinpath("style.css").read_text(encoding="utf-8")
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                theme=theme,
                head=f"<style>{style()}{own}</style>",
                max_file_size=LARGEST_FILE,
                state_session_capacity=VISITORS,
                footer_links=["settings"],
                share=False,
                inbrowser=browse,
                **QUIETLY,
            )
        except OSError as error:
            raise EvoViTError(
                f"The page cannot listen on {shown(host)}, port {port or '7860 to 7959'}: it is in use, "
                "or not an address of this machine; give another --port or --host."
            ) from error
        try:
            yield address
        finally:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of what is cut off
            blocks.server.force_exit = True  # pages that are still open would hold it
            blocks.close(verbose=False)


QUIETLY: dict[str, Any] = {
    "quiet": True,
    "prevent_thread_lock": True,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "run_history": False,
    "enable_monitoring": False,
    "strict_cors": True,
    "show_error": False,
}
