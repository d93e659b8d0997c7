"""Whether the Hugging Face hub can be reached, asked once and answered at once.

Without a network the hub's clients repeat every request for about 23 seconds before they give up. Scripts ask here
first, so that a run on a machine without a network fails, or falls back to what is cached, immediately.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse

EXAMPLES_INSTALL = 'pip install "hf_actcompress[examples]"'
DEMO_INSTALL = 'pip install "hf_actcompress[demo]"'


def hub_state() -> str:
    """ "online", "offline mode" (HF_HUB_OFFLINE is set) or "no network" (the hub's name does not resolve)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline mode"
    return "online" if _resolves(constants.ENDPOINT) else "no network"


@functools.lru_cache(maxsize=4)
def _resolves(endpoint: str) -> bool:
    # Behind a proxy it is the proxy that resolves names, so a failing lookup here would prove nothing.
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def cached_only_when_offline() -> Iterator[str]:
    """Switches the hub's clients to their caches while the hub cannot be reached; yields `hub_state()`."""
    import datasets
    from huggingface_hub import constants

    state = hub_state()
    if state == "online":
        yield state
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield state
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
