"""Errors of the plugin. All of them end an engine's start; none is raised inside a forward.

MoonshardError
├── PluginSettingsError    a setting of the plugin is missing, unknown or wrong
├── UnsupportedModelError  the model, its checkpoint or the engine's set-up cannot run remotely
└── ExpertsNotReadyError   no shards took up the experts before the start's deadline
"""

from __future__ import annotations

from routing.exceptions import MoonshardError

__all__ = ["ExpertsNotReadyError", "PluginSettingsError", "UnsupportedModelError"]


class PluginSettingsError(MoonshardError, ValueError):
    """A setting of the plugin is missing, unknown or wrong; the message names it."""


class UnsupportedModelError(MoonshardError, ValueError):
    """Remote experts cannot serve this; the message names the architecture and the feature."""


class ExpertsNotReadyError(MoonshardError):
    """The first whole routing table did not arrive in time, or does not fit the model."""
