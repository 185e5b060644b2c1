"""Why an engine did not start is found in the output of its processes."""

from __future__ import annotations

from deployments.engine_start import find_cause

OUTPUT = """\
(Worker pid=1) INFO 11-23 21:07:31 [x.py:1] fine: Error: not this one
(Worker pid=1) ERROR 11-23 21:07:31 [multiproc_executor.py:944]     raise PluginSettingsError(
(Worker pid=1) ERROR 11-23 21:07:31 [multiproc_executor.py:944] \
routing.vllm_plugin.exceptions.PluginSettingsError: unset safetensors_load_strategy
(EngineCore pid=2) ERROR 11-23 21:07:33 [core.py:1374] Exception: WorkerProc initialization failed
"""


def test_the_first_exception_is_the_cause() -> None:
    assert find_cause(OUTPUT) == "PluginSettingsError: unset safetensors_load_strategy"


def test_without_an_exception_there_is_none() -> None:
    assert find_cause(OUTPUT.splitlines()[0]) is None
