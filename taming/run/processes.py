"""The processes of a run in Lightning's hands: how they are started and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from taming.run.signals import PARENT, watch


class Launcher(_SubprocessScriptLauncher):
    """Start the other processes of this machine, and leave them to `signals.watch`.

    Lightning's observer would kill this process, without a word, 5 s after another one failed.
    """

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Start the processes unless they are running, then call the function in this one."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            try:
                self._call_children_scripts()
            finally:
                del os.environ[PARENT]
            watch.watch_children(self.procs, environment.node_rank() * self.num_processes + 1)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class SignalConnector(_SignalConnector):
    """Leave SIGTERM and SIGINT to `signals.watch`, and to Lightning only the requeueing of Slurm.

    Lightning's handler broadcasts, in the midst of whatever collective operation there is.
    """

    def register_signal_handlers(self) -> None:
        """Register the handlers for Slurm if Lightning is to requeue."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if not watch.is_active:
            super().register_signal_handlers()
        elif isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal or signal.SIGUSR1, signal.SIG_DFL)
            before = signal.getsignal(signal.SIGTERM)
            super().register_signal_handlers()
            signal.signal(signal.SIGTERM, before)


def with_environment(given: Any) -> list[Any]:
    """Return the given plugins, and Slurm's environment without Lightning's requeueing.

    Requeueing expects its checkpoint in the folder of the first start; `LastCheckpoint` saves one.
    """
    plugins = [*given] if isinstance(given, list | tuple) else [given] if given else []
    has_own = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    elastic = TorchElasticEnvironment.detect()
    if not has_own and not elastic and SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def take_over(trainer: Trainer) -> None:
    """Replace the launcher and the signal handlers of a Trainer by those of this module."""
    trainer._signal_connector = SignalConnector(trainer)
    strategy = trainer.strategy
    launcher = strategy.launcher
    if isinstance(strategy, ParallelStrategy) and isinstance(launcher, _SubprocessScriptLauncher):
        strategy._launcher = Launcher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )
