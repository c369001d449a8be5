"""How the page listens: without a spinner, and so that the last of many events is the one that counts."""

from typing import Any

QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
# What follows a slider is not queued, which would cost as long as the edit itself; of the drags that come while one is
# computed the last one counts.
DRAG: dict[str, Any] = QUIET | {"queue": False}
