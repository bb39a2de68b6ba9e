"""Modules in the places of wandb, mlflow and trackio, that write down how they were called."""

import importlib.machinery
import sys
import types
from typing import ClassVar

CALLS = []  # (service, what, values)
MISSING = object()


class Recorder:
    """Calls of any name are written down; `broken` ones raise."""

    broken: frozenset[str] = frozenset()

    def __init__(self, service, **fields):
        self._service = service
        self.__dict__.update(fields)

    def __getattr__(self, name):
        def call(*values, **named):
            CALLS.append((self._service, name, (*values, named) if named else values))
            if name in self.broken:
                raise ConnectionError(f'{self._service} is not in reach')
            return MISSING

        return call


def _module(monkeypatch, name, **fields):
    module = types.ModuleType(name)
    module.__dict__.update(fields, __spec__=importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, module)


def _opens(service, **fields):
    def init(*values, **named):
        return Recorder(service).init(*values, **named) and Recorder(service, **fields)

    return init


class MlflowClient(Recorder):
    """Knows the experiments and runs that it made."""

    experiments: ClassVar[dict[str, str]] = {}
    runs: ClassVar[list[str]] = []

    def __init__(self):
        super().__init__('mlflow')

    def get_experiment_by_name(self, name):
        self.__getattr__('get_experiment_by_name')(name)
        found = self.experiments.get(name)
        return found and types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name):
        self.experiments[name] = f'e{len(self.experiments)}'
        return self.experiments[name]

    def create_run(self, experiment, run_name):
        self.__getattr__('create_run')(experiment, run_name)
        self.runs.append(f'r{len(self.runs)}')
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.runs[-1]))


def install(monkeypatch):
    """Puts them in place, with nothing written down."""
    CALLS.clear()
    Recorder.broken = frozenset()
    MlflowClient.experiments.clear()
    MlflowClient.runs.clear()
    summary = Recorder('wandb summary')
    _module(
        monkeypatch,
        'wandb',
        init=_opens('wandb', summary=summary),
        Settings=dict,
        Html=lambda text, inject: text,
    )
    entities = {name: lambda *values: values for name in ('Metric', 'Param')}
    _module(monkeypatch, 'mlflow')
    _module(monkeypatch, 'mlflow.entities', **entities)
    _module(monkeypatch, 'mlflow.tracking', MlflowClient=MlflowClient)
    _module(monkeypatch, 'trackio', init=_opens('trackio'))


def calls(service, what):
    """Values of the calls of this name, in order."""
    return [values for own, name, values in CALLS if (own, name) == (service, what)]
