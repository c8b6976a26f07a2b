"""Trackers: what shows the rounds of a run elsewhere, each through its project's own client."""

from server_app.trackers.tracking import TrackerConfig, Tracking

__all__ = ["TrackerConfig", "Tracking"]
