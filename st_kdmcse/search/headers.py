"""HTTP headers that keep the pages of the search server to themselves."""

from __future__ import annotations

import base64
import hashlib
import re


def page_headers(page: str) -> dict[str, str]:
    """Headers of all answers: the page runs its own script and style, and loads from here alone."""
    return {
        "Content-Security-Policy": _policy(_source(page, "script"), _source(page, "style")),
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def docs_policy(page: str) -> str:
    """That of the page at /docs, whose library writes styles into it."""
    return _policy(f"'self' {_source(page, 'script')}", "'self' 'unsafe-inline'")


def _policy(script: str, style: str) -> str:
    policy = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in policy.items())


def _source(page: str, tag: str) -> str:
    """The hash by which a policy allows what is written in the page."""
    written = "".join(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    return f"'sha256-{base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()}'"
